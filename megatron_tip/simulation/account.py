"""What a rank's step costs, as numbers that can be added and scaled: bytes, messages, arithmetic, host syncs."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields

from megatron_tip.simulation.ledger import Ledger, Route, Traffic, Work


@dataclass(frozen=True)
class Account:
    """The cost of one rank's step by item.

    `values`: by ("live", phase, purpose) bytes at the phase's peak, ("left", phase, purpose) at its end, ("work",
    phase, field of Work), ("traffic", route, field of Traffic) and ("syncs", phase).
    """

    values: Mapping[tuple[Hashable, ...], float]

    @classmethod
    def of(cls, ledger: Ledger) -> "Account":
        """Returns what `ledger` counted."""
        values: dict[tuple[Hashable, ...], float] = {}
        for phase, peak in ledger.peaks.items():
            values |= {("live", phase, purpose): size for purpose, size in peak.parts.items()}
        for phase, parts in ledger.left.items():
            values |= {("left", phase, purpose): size for purpose, size in parts.items() if size}
        for phase, work in ledger.work.items():
            values |= {("work", phase, one.name): getattr(work, one.name) for one in fields(Work)}
        for route, traffic in ledger.traffic.items():
            values |= {("traffic", route, one.name): getattr(traffic, one.name) for one in fields(Traffic)}
        values |= {("syncs", phase): count for phase, count in ledger.host_syncs.items()}
        return cls(values)

    def with_layers(self, more: "Account", *, student: float, teacher: float) -> "Account":
        """Returns the account of models with more layers; nothing is below 0.

        Args:
            more: the account with one more layer in each model.
            student, teacher: layers of each model that are added to those of this account.
        """
        values: dict[tuple[Hashable, ...], float] = {}
        for key in self.values.keys() | more.values.keys():
            few = self.values.get(key, 0.0)
            layers = teacher if _is_of_teacher(key) else student
            values[key] = max(0.0, few + layers * (more.values.get(key, 0.0) - few))
        return Account(values)

    def live(self, phase: str) -> dict[str, float]:
        """Returns the bytes by purpose at the phase's peak."""
        return self._bytes("live", phase)

    def left(self, phase: str) -> dict[str, float]:
        """Returns the bytes by purpose at the phase's end."""
        return self._bytes("left", phase)

    def _bytes(self, moment: str, phase: str) -> dict[str, float]:
        return {str(key[2]): value for key, value in self.values.items() if key[:2] == (moment, phase)}

    def work(self, phase: str) -> Work:
        """Returns the arithmetic of a phase."""
        found = {str(key[2]): value for key, value in self.values.items() if key[:2] == ("work", phase)}
        return Work(**found)

    def traffic(self) -> dict[Route, Traffic]:
        """Returns the messages by route, those of the set-up included."""
        found: dict[Route, Traffic] = {}
        for key, value in self.values.items():
            if isinstance(key[1], Route):
                setattr(found.setdefault(key[1], Traffic()), str(key[2]), value)
        return found

    def host_syncs(self, phase: str) -> float:
        """Returns how often the host waits for the device."""
        return self.values.get(("syncs", phase), 0.0)


def _is_of_teacher(key: tuple[Hashable, ...]) -> bool:
    """Returns whether an item grows with the teacher's layers; any other can only grow with the student's."""
    phase = key[1].phase if isinstance(key[1], Route) else key[1]
    return str(key[2]).startswith("teacher: ") if key[0] in ("live", "left") else phase == "teacher"
