"""Steps of a tiny run, its checkpoints, and the weights that it has."""

import torch

from megatron_tip.observability.metrics_file import MEASURED
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.writer import Checkpointer
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.step import train_step
from megatron_tip.training.weight_sync import update_engine
from tests.helpers.training import engine_of, recorder_of


def checkpointer_of(run: TrainingRun, files: CheckpointFiles) -> Checkpointer:
    files.folder.parent.mkdir(parents=True, exist_ok=True)
    return Checkpointer(run, recorder_of(run, RunFolder(files.folder.parent)), files, run.stop)


def take_step(run: TrainingRun, step: int) -> dict[str, float]:
    update_engine(run, weight_version=step - 1)
    return {name: value for name, value in train_step(run, step).items() if not name.startswith(MEASURED)}


def weights_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    update_engine(run, weight_version=0)
    return getattr(engine_of(run), "weights", {})
