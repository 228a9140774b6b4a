"""Resumed runs: two from the same checkpoint, and the run that went straight on, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tip.config import Config
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.resume import restore
from megatron_tip.training.run import TrainingRun
from tests.helpers.checkpoints import checkpointer_of, take_step, weights_of
from tests.helpers.tiny import make_llama
from tests.helpers.training import Layout, build_tiny_run, make_config, make_rollouts
from tools.gpu_checks.ranks import join_alone
from tools.gpu_checks.task import Task


@dataclass(frozen=True)
class Later:
    """What two steps after the checkpoint gave: the metrics of each, and the weights."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]

    def differences(self, other: "Later") -> list[str]:
        """Returns the names of metrics and weights that are not the same."""
        pairs = [*zip(self.metrics, other.metrics, strict=True), (self.weights, other.weights)]
        return [name for own, theirs in pairs for name in own if not _same(own[name], theirs.get(name))]


def equal(task: Task) -> None:
    """Requires that the resumed runs equal each other, and the straight one."""
    join_alone()
    config = small_config(task)
    rollouts = make_rollouts(task.size([300, 40, 170, 512, 90, 1, 256, 33], [12, 0, 7]))
    files = CheckpointFiles(task.folder / "run/checkpoints")
    run = build_tiny_run(config, rollouts)
    checkpointer = checkpointer_of(run, files)
    for step in (1, 2):
        take_step(run, step)
    checkpointer.save(RunProgress(step=2))
    checkpointer.finish()
    straight = _go_on(run)
    resumed = []
    for _ in range(2):
        again = build_tiny_run(config, rollouts)
        restore(again, files, 2)
        resumed.append(_go_on(again))
    task.note(weights=len(straight.weights), kernels=config.loss.kernels)
    for name, one, other in (("two resumes", *resumed), ("a resume and the straight run", resumed[0], straight)):
        differing = one.differences(other)
        task.note(**{f"differences of {name}": len(differing)})
        task.require(not differing, f"{name} differ in {', '.join(differing[:4])}")


def small_config(task: Task) -> Config:
    """Returns a run on one process, of two models in bfloat16 large enough that a GPU splits their sums."""
    hidden_size, vocab_size, num_layers = task.size((768, 8192, 4), (48, 307, 2))
    for seed, name in enumerate(("student", "teacher")):
        folder = task.folder / name
        make_llama(folder, seed=seed, num_layers=num_layers, hidden_size=hidden_size, vocab_size=vocab_size)
    return config_in(task.folder, max_tokens=task.size(1024, 48))


def config_in(folder: Path, *, max_tokens: int) -> Config:
    """Returns a run on one process of the models `student` and `teacher` in `folder`."""
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "what is {n} ?"}}\n' for n in range(4)))
    sections: dict[str, dict[str, Any]] = {
        "model": {"dtype": "bfloat16"},
        "teacher": {"dtype": "bfloat16"},
        "prompts": {"source": "file", "path": folder / "prompts.jsonl", "tasks": ()},
        "rollout": {"max_response_tokens": 1024},
        "optimizer": {"clip_grad": 1.0, "weight_decay": 0.1},
        "training": {"steps": 4, "max_tokens_per_micro_batch": max_tokens},
    }
    return make_config(folder, Layout(1), **sections)


def _go_on(run: TrainingRun) -> Later:
    metrics = [take_step(run, step) for step in (3, 4)]
    return Later(metrics, {name: tensor.cpu() for name, tensor in weights_of(run).items()})


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
