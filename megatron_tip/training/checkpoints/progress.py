"""The state of a run between two steps, apart from weights and optimizer."""

from dataclasses import dataclass
from typing import Any

from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import rollout_from_record, rollout_to_record


@dataclass(frozen=True)
class Heldout:
    """A held-out measurement: mean reverse KL in nats per token (NaN: none), and the responses for the samples.

    `accuracy`: the share of right answers; NaN if they are not verified.
    """

    reverse_kl: float
    rollouts: list[Rollout]
    accuracy: float = float("nan")


@dataclass
class RunProgress:
    """The state of the training loop, the same on every rank.

    `step`: steps taken. `unrecorded`: metrics of the last step, until they are in metrics.jsonl with the measurements
    that belong to them. `num_updates`: steps that updated the student. `skipped_in_a_row`: steps whose loss or
    gradient was not finite, since the last update or the last end for too many of them. `before`: the measurement
    before the first step, once it exists.

    Prompts and their order, rollouts and selections are not part of it: they follow from seed, step and weights. An
    unfinished step is repeated.
    """

    step: int = 0
    unrecorded: dict[str, float] | None = None
    num_updates: int = 0
    skipped_in_a_row: int = 0
    before: Heldout | None = None

    def take_step(self, metrics: dict[str, float], *, is_update: bool, is_finite: bool = True) -> None:
        """Counts a step that was taken; its metrics are still to be recorded.

        Args:
            is_update: it updated the student.
            is_finite: without an update, that was not for lack of finite numbers.
        """
        self.step += 1
        self.unrecorded = metrics
        self.num_updates += is_update
        self.skipped_in_a_row = 0 if is_update else self.skipped_in_a_row + (not is_finite)

    def as_json(self) -> dict[str, Any]:
        before = self.before and {
            "reverse_kl": self.before.reverse_kl,
            "rollouts": [rollout_to_record(rollout) for rollout in self.before.rollouts],
            "accuracy": self.before.accuracy,
        }
        return {**vars(self), "before": before}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunProgress":
        """Returns the progress that `as_json` described.

        A checkpoint that was written before updates were counted is taken to have one per step.
        """
        before = values["before"]
        heldout = before and Heldout(
            before["reverse_kl"],
            [rollout_from_record(one) for one in before["rollouts"]],
            before.get("accuracy", float("nan")),
        )
        return cls(**{"num_updates": values["step"], **values, "before": heldout})
