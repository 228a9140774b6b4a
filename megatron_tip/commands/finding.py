"""One fact that `megatron-tip doctor` found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One fact. `state`: "missing" if a run cannot do without it. `remedy`: the command or change that fixes it."""

    state: State
    text: str
    remedy: str = ""

    def line(self) -> str:
        mark = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}[self.state]
        return f"{mark}  {self.text}" + (f"\n         fix: {self.remedy}" if self.remedy else "")
