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
    num_prompts: int = Field(default=0, ge=0)
    """With source = "reasoning_gym": number of prompts to generate for training; 0: as many as the run needs."""
    apply_chat_template: bool = True
    """Render a text as a single user message with the tokenizer's chat template; chat messages are always rendered."""
    system_prompt: str = ""
    """System message before each prompt; empty: none."""
    teacher_field: str = ""
    """With several teachers and source = "file": the field that names each prompt's teacher."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are skipped and counted."""
    shuffle: bool = True
    """Draw prompts in a seeded random order that changes each epoch; false: in the order of the file."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> "PromptsConfig":
        if self.source == "file" and self.path is None:
            raise ValueError('prompts.path: expected a .jsonl or .parquet file with prompts.source = "file", got none')
        if self.source == "reasoning_gym" and not self.tasks:
            raise ValueError('prompts.tasks: expected task names with prompts.source = "reasoning_gym", got none')
        ignored = self.tasks if self.source == "file" else self.path
        if ignored:
            name = "tasks" if self.source == "file" else "path"
            raise ValueError(f'prompts.{name}: expected none with prompts.source = "{self.source}", got {ignored}')
        return self


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
