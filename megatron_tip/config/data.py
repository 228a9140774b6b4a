"""Prompts to train on and to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_tip.config.section import Section


class PromptsConfig(Section):
    """Where prompts come from."""

    source: Literal["file", "reasoning_gym"] = "file"
    """A JSONL or Parquet file, or generated reasoning-gym tasks."""
    path: Path | None = None
    """With source = "file": the .jsonl or .parquet file."""
    field: str = "prompt"
    """With source = "file": the field or column that holds the prompt, a text or a list of chat messages."""
    tasks: tuple[str, ...] = ()
    """With source = "reasoning_gym": names of tasks, drawn from in turn."""
    num_prompts: int = Field(default=0, ge=0)
    """With source = "reasoning_gym": how many to generate for training; 0: as many as the run needs."""
    apply_chat_template: bool = True
    """Render a text as a single user message through the tokenizer's chat template; messages always are."""
    system_prompt: str = ""
    """A system message put before each prompt; empty: none."""
    teacher_field: str = ""
    """With several teachers and source = "file": the field that names each prompt's teacher."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """A longer prompt is skipped and counted."""
    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch; false: in the order of the file."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> PromptsConfig:
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
    """Prompts never trained on, on which KL(student || teacher) is measured on the student's own responses.

    At loss.temperature. With rollout.engine = "replay" the responses are those that the earlier run recorded.
    """

    num_prompts: int = Field(default=16, ge=0)
    """Taken from the end of the prompt source, or generated with another seed; 0: no held-out measurement."""
    every_steps: int = Field(default=0, ge=0)
    """Measure every so many steps too; 0: only before the first and after the last."""
    num_samples: int = Field(default=4, ge=0)
    """Responses written to samples.jsonl, before and after."""
