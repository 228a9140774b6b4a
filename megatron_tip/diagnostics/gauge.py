"""The bank during a run: the running student's gain since the start, as metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from megatron_tip.diagnostics.bank import ContextBank
from megatron_tip.diagnostics.parquet import read_table, write_table
from megatron_tip.diagnostics.score import FrozenContexts, forward_kl, freeze
from megatron_tip.diagnostics.session import open_bank
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.plan import RunPlan
from megatron_tip.training.run import TrainingRun

FORMAT = "megatron_tip start on bank 1"


class BankGauge:
    """Scores the student on a bank after every so many steps, and after the last.

    The teacher is asked once. What the start made of the bank lies in the run's diagnostics/start.parquet, so that a
    run that is continued measures against the same start; a run that was begun without has no gain, but its KL.
    """

    def __init__(self, run: TrainingRun, bank: ContextBank, start: Path) -> None:
        """Collective over the world: the teacher's forward pass over the bank."""
        self._run, self._bank, self._path = run, bank, start
        self._frozen: FrozenContexts = freeze(run, bank.contexts)

    def __call__(self, step: int) -> dict[str, float]:
        """The metrics after `step` steps, equal on every rank; none where nothing is due. Collective over the world.

        `diagnostics/forward_kl`: mean KL(teacher || student) over the bank, nats a token. `diagnostics/gain`: how far
        it fell since step 0 (TA-OPD Eq. 1); `diagnostics/gain_relative`: as a share of what it was.
        """
        config = self._run.config
        if step % config.diagnostics.every_steps and step != config.training.steps:
            return {}
        values = forward_kl(self._run, self._frozen).double().numpy()
        if step == 0 and dist.get_rank() == 0:
            table = pa.table({"forward_kl": values})
            write_table(self._path, table, {"format": FORMAT, "bank": self._bank.sha256})
        metrics = {"diagnostics/forward_kl": float(values.mean())}
        before = values if step == 0 else self._start()
        if before is not None:
            gain = float((before - values).mean())
            metrics |= {"diagnostics/gain": gain, "diagnostics/gain_relative": gain / max(float(before.mean()), 1e-12)}
        return metrics

    def _start(self) -> np.ndarray | None:
        """What the start made of this bank, as every rank reads it; None where it was not measured."""
        if not self._path.exists():
            return None
        table, about = read_table(self._path, format_name=FORMAT)
        return table.column("forward_kl").to_numpy() if about["bank"] == self._bank.sha256 else None


def make_gauge(run: TrainingRun, plan: RunPlan) -> BankGauge:
    """The gauge that the run's configuration asks for. Collective over the world."""
    start = RunFolder(run.config.run.folder).diagnostics / "start.parquet"
    return BankGauge(run, open_bank(run.config, plan), start)
