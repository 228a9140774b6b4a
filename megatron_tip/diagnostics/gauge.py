"""A gauge of the running student on a bank: its gain since the start, as metrics."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tip.config import Config
from megatron_tip.diagnostics.bank import ContextBank, warn_of_strangers
from megatron_tip.diagnostics.fingerprint import model_fingerprint
from megatron_tip.diagnostics.measure import FrozenContexts, forward_kl, freeze
from megatron_tip.diagnostics.parquet import read_table, write_table
from megatron_tip.diagnostics.session import open_bank
from megatron_tip.errors import InputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.together import run_on
from megatron_tip.planning.plan import RunPlan
from megatron_tip.training.run import TrainingRun

FORMAT = "megatron_tip start on bank 1"


class BankGauge:
    """A gauge that scores the student on a bank at regular steps, and after the last.

    The teacher scores the bank once. The start's scores are kept in the run's diagnostics/start.parquet, so that a
    continued run measures against the same start; a run that began without a bank has no gain, but its KL.
    """

    def __init__(self, run: TrainingRun, bank: ContextBank, start: Path, *, teacher: str) -> None:
        """Reads the start on rank 0 and runs the teacher over the bank. Collective over the world.

        Args:
            start: the file; it exists if the run is continued. teacher: its fingerprint.

        Raises:
            InputError: on every rank; the start is damaged, or was measured with other settings.
        """
        self._run, self._path = run, start
        self._about = {"bank": bank.sha256, "teacher": teacher, "temperature": run.config.loss.temperature}
        self._before = self._agreed_start()
        self._frozen: FrozenContexts = freeze(run, bank.contexts)

    def __call__(self, step: int) -> dict[str, float]:
        """Returns the metrics after `step` steps, the same on every rank; empty if none are due. Collective.

        `diagnostics/forward_kl`: mean KL(teacher || student) over the bank, nats per token. `diagnostics/gain`: how far
        it fell since step 0 (TA-OPD Eq. 1). `diagnostics/gain_relative`: the same as a share of the value at step 0.
        """
        config = self._run.config
        if step % config.diagnostics.every_steps and step != config.training.steps:
            return {}
        values = forward_kl(self._run, self._frozen).double().numpy()
        if step == 0:
            self._before = values
            table, about = pa.table({"forward_kl": values}), {"format": FORMAT, **self._about}
            run_on(0, lambda: write_table(self._path, table, about, setting="run.folder"), device=self._run.device)
        metrics = {"diagnostics/forward_kl": float(values.mean())}
        if self._before is not None:
            gain, before = float((self._before - values).mean()), float(self._before.mean())
            metrics |= {"diagnostics/gain": gain, "diagnostics/gain_relative": gain / max(before, 1e-12)}
        return metrics

    def _agreed_start(self) -> np.ndarray | None:
        """Returns the start's KL on this bank, `[tokens]` float64; None if not measured. Two broadcasts."""
        found = run_on(
            0, lambda: _read_start(self._path, self._about) if self._path.exists() else None, device=self._run.device
        )
        return np.array(found, dtype=np.float64) if found is not None else None


def _read_start(path: Path, about: Mapping[str, Any]) -> list[float]:
    """Returns the start's KL on the bank; raises InputError unless it was measured with `about`."""
    table, measured = read_table(path, format_name=FORMAT, columns=["forward_kl"])
    changed = [
        f"{key} {value!r}, got {measured.get(key)!r}" for key, value in about.items() if measured.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{path}: expected the start of this run measured with {'; '.join(changed)}; gains over it would mean "
            "nothing: set bank, teacher and temperature back, or remove the file to continue without gains"
        )
    return table.column("forward_kl").to_pylist()


def make_gauge(config: Config, plan: RunPlan) -> Callable[[TrainingRun], BankGauge]:
    """Opens the configured bank; returns a function that builds the gauge, collective over the world.

    Raises:
        ConfigError, InputError: as for `open_bank`; before any collective.
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
