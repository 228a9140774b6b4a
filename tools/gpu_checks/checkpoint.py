"""What a checkpoint takes: memory of GPU and host, and the seconds that training waits."""

import time

import torch

from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.writer import Checkpointer
from tests.helpers.checkpoints import checkpointer_of, take_step
from tests.helpers.tiny import make_tokenizer
from tests.helpers.training import build_tiny_run, make_rollouts
from tools.gpu_checks.qwen3 import write_qwen3
from tools.gpu_checks.ranks import join_alone
from tools.gpu_checks.resumes import config_in
from tools.gpu_checks.task import Task
from tools.meter import read_call


def peak(task: Task) -> None:
    """Notes the checkpoint of two layers of Qwen3-4B with their optimizer: half a billion parameters."""
    join_alone()
    folder, model = write_qwen3(task, layers=2)
    task.note(parameters=sum(parameter.numel() for parameter in model.parameters()))
    del model
    make_tokenizer(folder)
    for name in ("student", "teacher"):
        (task.folder / name).symlink_to(folder)
    run = build_tiny_run(config_in(task.folder, max_tokens=task.size(2048, 48)), make_rollouts([40, 300, 7]))
    files = CheckpointFiles(task.folder / "run/checkpoints")
    checkpointer = checkpointer_of(run, files)
    take_step(run, 1)
    for step in (1, 2):  # the second one finds the buffers of the first
        _note_save(task, checkpointer, step)
    newest = files.step_folder(files.steps()[-1])
    task.note(file_mb=round(sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6, 1))


def _note_save(task: Task, checkpointer: Checkpointer, step: int) -> None:
    """Saves once, and notes what it took."""
    seconds: list[float] = []

    def save() -> None:
        start = time.monotonic()
        checkpointer.save(RunProgress(step=step))
        seconds.append(time.monotonic() - start)
        checkpointer.finish()
        seconds.append(time.monotonic() - start)

    host, (device, _) = read_call(lambda: read_call(save, torch.device(task.device)), torch.device("cpu"))
    figures = {"training_waits_s": seconds[0], "written_after_s": seconds[1], "host_peak_mb": host.peak_bytes / 1e6}
    if task.on_gpu:
        figures["gpu_peak_mb"] = device.peak_bytes / 1e6
    task.note(**{f"save {step}": {name: round(value, 2) for name, value in figures.items()}})
