"""Prompts for training and for held-out measurements."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_tip.config.section import Section


class PromptsConfig(Section):
    """Where prompts come from."""

    source: Literal["file", "reasoning_gym"] = "file"
    """file: a JSONL or Parquet file; reasoning_gym: generated reasoning-gym tasks."""
    path: Path | None = None
    """With source = "file": the .jsonl or .parquet file. Of rows with the same prompt and teacher the first is used."""
    field: str = "prompt"
    """With source = "file": the field or column that contains the prompt, a text or a list of chat messages."""
    tasks: tuple[str, ...] = ()
    """With source = "reasoning_gym": names of tasks, used in turn."""
    task_options: dict[str, bool | int | float | str | tuple[str, ...]] = Field(default={})
    """With source = "reasoning_gym": options of the tasks, as { max_terms = 2 }; each task must take all of them."""
    num_prompts: int = Field(default=0, ge=0)
    """With source = "reasoning_gym": number of prompts to generate for training; 0: as many as the run needs."""
    apply_chat_template: bool = True
    """Render a text as a single user message with the tokenizer's chat template; chat messages are always rendered."""
    system_prompt: str = ""
    """System message before each prompt; empty: none."""
    template_arguments: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the chat template: { enable_thinking = false }."""
    teacher_field: str = ""
    """With several teachers and source = "file": the field that names each prompt's teacher."""
    teacher_prompt_field: str = ""
    """With source = "file": the field with what the teacher reads in place of the prompt, a text or a list of chat
    messages; empty: the prompt."""
    answer_field: str = ""
    """With source = "file": the field with the right answer, a text or a number, for heldout.verify; empty: none."""
    teacher_system_prompt: str = ""
    """System message before what the teacher reads; empty: system_prompt."""
    teacher_template_arguments: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the chat template for what the teacher reads, besides or in place of template_arguments."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are skipped and counted."""
    max_teacher_prompt_tokens: int = Field(default=0, ge=0)
    """Prompts whose teacher's prompt is longer are skipped and counted; 0: max_prompt_tokens."""
    shuffle: bool = True
    """Draw prompts in a seeded random order that changes each epoch; false: in the order of the file."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> "PromptsConfig":
        if self.source == "file" and self.path is None:
            raise ValueError('prompts.path: expected a .jsonl or .parquet file with prompts.source = "file", got none')
        if self.source == "reasoning_gym" and not self.tasks:
            raise ValueError('prompts.tasks: expected task names with prompts.source = "reasoning_gym", got none')
        for name in ("teacher_prompt_field", "answer_field"):
            if getattr(self, name) and self.source != "file":
                raise ValueError(f'prompts.{name}: expected prompts.source = "file", got "{self.source}"')
        if not self.teacher_reads_another and self.max_teacher_prompt_tokens:
            raise ValueError("prompts.max_teacher_prompt_tokens: expected a prompt of the teacher's own, got none")
        ignored = ("tasks", "task_options") if self.source == "file" else ("path",)
        for name in ignored:
            if value := getattr(self, name):
                raise ValueError(f'prompts.{name}: expected none with prompts.source = "{self.source}", got {value}')
        return self

    @property
    def row_fields(self) -> tuple[str, str, str, str]:
        """The fields of a file's rows, as `read_prompt_file` takes them."""
        return self.field, self.teacher_field, self.teacher_prompt_field, self.answer_field

    @property
    def teacher_reads_another(self) -> bool:
        """Whether the teacher reads something else than the student."""
        return bool(self.teacher_prompt_field or self.teacher_system_prompt or self.teacher_template_arguments)

    @property
    def longest_teacher_prompt(self) -> int:
        """Maximum tokens of what the teacher reads before the response."""
        return (self.teacher_reads_another and self.max_teacher_prompt_tokens) or self.max_prompt_tokens

    def as_read_by_the_teacher(self) -> "PromptsConfig":
        """Returns the settings under which the teacher's prompts are rendered."""
        return self.model_copy(
            update={
                "system_prompt": self.teacher_system_prompt or self.system_prompt,
                "template_arguments": self.template_arguments | self.teacher_template_arguments,
                "max_prompt_tokens": self.longest_teacher_prompt,
            }
        )


class HeldoutConfig(Section):
    """Prompts that are never trained on. KL(student || teacher) is measured on the student's own responses to them.

    It is measured at loss.temperature. With rollout.engine = "replay" the responses are those of the earlier run.
    """

    num_prompts: int = Field(default=16, ge=0)
    """Number, taken from the end of the prompt source or generated with another seed; 0: no held-out measurement."""
    every_steps: int = Field(default=0, ge=0)
    """Also measure every this many steps; 0: only before the first and after the last."""
    num_samples: int = Field(default=4, ge=0)
    """Responses written to samples.jsonl, before and after."""
    verify: Literal["no", "whole", "last_number", "contains"] = "no"
    """What of a response is taken as the answer, for the metrics heldout/task_accuracy and heldout/task_score: all of
    it, or its last number. A reasoning-gym task scores it by its own verifier; that of a file's prompt is compared with
    prompts.answer_field, which with "contains" need only occur in it. no: answers are not scored."""
