"""The fixed-context diagnostic: its bank, and what is tried on it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megatron_tip.config.section import MAX_SUPPORT_SIZE, Section


class DiagnosticsConfig(Section):
    """The fixed-context diagnostic (docs/diagnostics.md): read by `megatron-tip diagnose`, and by a run that asks for
    it with every_steps.
    """

    bank: Path | None = None
    """Folder of the context bank; `diagnose bank` makes it."""
    every_steps: int = Field(default=0, ge=0)
    """Score the student of a run on the bank every so many steps, and log its gain since the start; 0: never."""
    rollouts: Path | None = None
    """For `diagnose bank`: the rollouts/ folder of a run, or one file of it, to freeze; none: answers to [prompts]."""
    num_contexts: int = Field(default=300, ge=1)
    """For `diagnose bank`: responses in it, each with at most rollout.max_response_tokens tokens."""
    support_sizes: tuple[int, ...] = (8, 16, 32)
    """K of the top-K supports that a bank is scored with."""
    rules: tuple[str, ...] = ()
    """For `diagnose intervene`: the rules to train with; none: every published one."""
    retention_ratios: tuple[float, ...] = (0.03, 0.05)
    """For `diagnose intervene`: the budgets beside selection.retention_ratio, which is always tried, and at which alone
    other support_sizes than selection.support_size are."""
    seeds: int = Field(default=3, ge=1)
    """For `diagnose intervene`: how often everything is repeated, with other contexts to train on and to measure on."""

    @model_validator(mode="after")
    def _values_are_usable(self) -> DiagnosticsConfig:
        if self.every_steps and self.bank is None:
            raise ValueError("diagnostics.bank: expected a folder with diagnostics.every_steps, got none")
        if (
            not self.support_sizes
            or not 1 <= min(self.support_sizes) <= max(self.support_sizes) <= MAX_SUPPORT_SIZE
            or len(set(self.support_sizes)) < len(self.support_sizes)
        ):
            raise ValueError(
                f"diagnostics.support_sizes: expected different numbers from 1 to {MAX_SUPPORT_SIZE}, got "
                f"{list(self.support_sizes)}"
            )
        if not self.retention_ratios or not all(0 < ratio <= 1 for ratio in self.retention_ratios):
            raise ValueError(
                f"diagnostics.retention_ratios: expected numbers in (0, 1], got {list(self.retention_ratios)}"
            )
        return self
