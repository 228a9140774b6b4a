"""Where a run stands between two steps, beside weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import rollout_from_record


@dataclass(frozen=True)
class Heldout:
    """A held-out measurement: mean reverse KL in nats a token (NaN: none), and the responses that samples show."""

    reverse_kl: float
    rollouts: list[Rollout]


@dataclass
class RunProgress:
    """What the loop knows; equal on every rank.

    `step`: steps taken. `unrecorded`: metrics of the last one, until they are in metrics.jsonl with the measurements
    that belong to them. `skipped_in_a_row`: steps without an update since the last, their loss or gradient not being
    finite. `before`: the measurement before the first step, once it is made.

    Prompts and their order, rollouts and selections are no state: they follow from seed, step and weights. A step that
    was not finished is made again.
    """

    step: int = 0
    unrecorded: dict[str, float] | None = None
    skipped_in_a_row: int = 0
    before: Heldout | None = None

    def take_step(self, metrics: dict[str, float], *, is_skipped: bool) -> None:
        """Counts a step that was taken; its metrics are still to be recorded."""
        self.step += 1
        self.unrecorded = metrics
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunProgress:
        before = values["before"]
        heldout = before and Heldout(before["reverse_kl"], [rollout_from_record(one) for one in before["rollouts"]])
        return cls(**{**values, "before": heldout})
