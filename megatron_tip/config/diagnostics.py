"""The fixed-context diagnostic: its bank and the measurements on it."""

from pathlib import Path

from pydantic import Field, model_validator

from megatron_tip.config.section import MAX_SUPPORT_SIZE, Section


class DiagnosticsConfig(Section):
    """The fixed-context diagnostic (docs/diagnostics.md): used by `megatron-tip diagnose`, and by a run that sets
    every_steps.
    """

    bank: Path | None = None
    """Folder of the context bank; `diagnose bank` creates it."""
    every_steps: int = Field(default=0, ge=0)
    """Score a run's student on the bank every this many steps, and log its gain since the start; 0: never."""
    rollouts: Path | None = None
    """For `diagnose bank`: a run's rollouts/ folder, or one file of it, to freeze; none: new answers to [prompts]."""
    num_contexts: int = Field(default=300, ge=1)
    """For `diagnose bank`: number of responses, each with at most rollout.max_response_tokens tokens."""
    support_sizes: tuple[int, ...] = (8, 16, 32)
    """The values of K, the size of the top-K supports, with which a bank is scored."""
    rules: tuple[str, ...] = ()
    """For `diagnose intervene`: the rules to train with; none: all published rules."""
    retention_ratios: tuple[float, ...] = (0.03, 0.05)
    """For `diagnose intervene`: budgets besides selection.retention_ratio, which is always tried. support_sizes other
    than selection.support_size are tried only at selection.retention_ratio."""
    seeds: int = Field(default=5, ge=1)
    """For `diagnose intervene`: number of repeats, each with other contexts to train on and to measure on. With fewer
    than 5, `diagnose report` gives no verdicts."""

    @model_validator(mode="after")
    def _values_are_usable(self) -> "DiagnosticsConfig":
        if self.every_steps and self.bank is None:
            raise ValueError("diagnostics.bank: expected a folder with diagnostics.every_steps, got none")
        if (
            not self.support_sizes
            or not 1 <= min(self.support_sizes) <= max(self.support_sizes) <= MAX_SUPPORT_SIZE
            or len(set(self.support_sizes)) < len(self.support_sizes)
        ):
            raise ValueError(
                f"diagnostics.support_sizes: expected distinct numbers from 1 to {MAX_SUPPORT_SIZE}, got "
                f"{list(self.support_sizes)}"
            )
        if not self.retention_ratios or not all(0 < ratio <= 1 for ratio in self.retention_ratios):
            raise ValueError(
                f"diagnostics.retention_ratios: expected numbers in (0, 1], got {list(self.retention_ratios)}"
            )
        return self
