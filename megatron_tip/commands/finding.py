"""One fact that `megatron-tip doctor` found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """Facts, a line each. `state`: "missing" if a run cannot do without them. `remedy`: what fixes that."""

    state: State
    text: str
    remedy: str = ""

    def line(self) -> str:
        mark = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}[self.state]
        text = self.text.replace("\n", "\n" + " " * 9)
        return f"{mark}  {text}" + (f"\n         fix: {self.remedy}" if self.remedy else "")
