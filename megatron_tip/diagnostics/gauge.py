"""The bank during a run: the running student's gain since the start, as metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.diagnostics.bank import ContextBank, warn_of_strangers
from megatron_tip.diagnostics.fingerprint import model_fingerprint
from megatron_tip.diagnostics.measure import FrozenContexts, forward_kl, freeze
from megatron_tip.diagnostics.parquet import read_table, write_table
from megatron_tip.diagnostics.session import open_bank
from megatron_tip.errors import InputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.planning.plan import RunPlan
from megatron_tip.training.run import TrainingRun

FORMAT = "megatron_tip start on bank 1"


class BankGauge:
    """Scores the student on a bank after every so many steps, and after the last.

    The teacher is asked once. What the start made of the bank lies in the run's diagnostics/start.parquet, so that a
    run that is continued measures against the same start; a run that was begun without has no gain, but its KL.
    """

    def __init__(self, run: TrainingRun, bank: ContextBank, start: Path, *, teacher: str) -> None:
        """Collective over the world: the start as rank 0 reads it, the teacher's forward pass over the bank.

        Args:
            start: the file; it is there where a run is continued. teacher: its fingerprint.

        Raises:
            InputError: on every rank; the start is damaged, or was measured otherwise.
        """
        self._run, self._path = run, start
        self._about = {"bank": bank.sha256, "teacher": teacher, "temperature": run.config.loss.temperature}
        self._before = self._agreed_start()
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
        if step == 0:
            self._before = values
            if dist.get_rank() == 0:
                table, about = pa.table({"forward_kl": values}), {"format": FORMAT, **self._about}
                write_table(self._path, table, about, setting="run.folder")
        metrics = {"diagnostics/forward_kl": float(values.mean())}
        if self._before is not None:
            gain, before = float((self._before - values).mean()), float(self._before.mean())
            metrics |= {"diagnostics/gain": gain, "diagnostics/gain_relative": gain / max(before, 1e-12)}
        return metrics

    def _agreed_start(self) -> np.ndarray | None:
        """`[tokens]` float64, what the start made of this bank; None where it was not measured. Two broadcasts."""
        found: dict[str, Any] = {}
        if dist.get_rank() == 0 and self._path.exists():
            try:
                found["values"] = _read_start(self._path, self._about)
            except InputError as error:
                found["error"] = str(error)
        found = broadcast_json(found, source=0, device=self._run.device)
        if "error" in found:
            raise InputError(found["error"])
        return np.array(found["values"], dtype=np.float64) if "values" in found else None


def _read_start(path: Path, about: Mapping[str, Any]) -> list[float]:
    """What the start made of the bank; raises InputError unless it was measured with `about`."""
    table, measured = read_table(path, format_name=FORMAT, columns=["forward_kl"])
    changed = [
        f"{key} {value!r}, got {measured.get(key)!r}" for key, value in about.items() if measured.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{path}: expected the start of this run measured with {'; '.join(changed)}; gains over it would mean "
            "nothing: set bank, teacher and temperature back, or remove the file to go on without gains"
        )
    return table.column("forward_kl").to_pylist()


def make_gauge(config: Config, plan: RunPlan) -> Callable[[TrainingRun], BankGauge]:
    """Opens the bank that the configuration names; what it returns builds the gauge, collective over the world.

    Raises:
        ConfigError, InputError: as of `open_bank`; before any collective.
    """
    bank, start = open_bank(config, plan), RunFolder(config.run.folder).diagnostics / "start.parquet"
    student, teacher = (
        model_fingerprint(path, model)
        for path, model in ((config.model.path, plan.student), (config.teacher.path, plan.teacher))
    )

    def build(run: TrainingRun) -> BankGauge:
        warn_of_strangers(bank, student=student, teacher=teacher)
        return BankGauge(run, bank, start, teacher=teacher)

    return build
