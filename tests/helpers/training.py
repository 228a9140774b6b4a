"""A tiny training run inside gloo workers: two random models, fixed rollouts, any layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import plan_run
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import RolloutEngine
from megatron_tip.training.recorder import RunRecorder
from megatron_tip.training.run import RolloutSource, TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.throughput import Throughput
from tests.helpers.tiny import make_llama

RUN_TOML = """
[run]
folder = "{folder}"
threads = {threads}
[model]
path = "{models}/student"
drop_layers = [1, 4]
[teacher]
path = "{models}/student"
[prompts]
source = "reasoning_gym"
tasks = ["basic_arithmetic"]
max_prompt_tokens = 200
[heldout]
num_prompts = 3
num_samples = 2
verify = "last_number"
[rollout]
prompts_per_step = 4
max_response_tokens = 12
[selection]
retention_ratio = 0.25
[optimizer]
lr = 2e-3
[training]
steps = 3
max_tokens_per_micro_batch = 300
"""
"""A run of three steps of some 0.1 s of the pruned `student` of `make_models`, through the command."""


@dataclass(frozen=True)
class Layout:
    """Student (tp, pp) and teacher (tp, pp) over `world_size` ranks; `cp`: of student and teacher."""

    world_size: int
    student: tuple[int, int] = (1, 1)
    teacher: tuple[int, int] | None = None
    sequence_parallel: bool = False
    cp: tuple[int, int] = (1, 1)


class FixedEngine(RolloutEngine):
    """Answers every call with the same rollouts, of the version of its last weights, and takes any weights."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts
        self.weights: dict[str, torch.Tensor] = {}

    def generate(self, prompts: Any, sampling: Any) -> list[Rollout]:
        return self.rollouts

    def update_weights(self, weights: Any, weight_version: int) -> None:
        self.rollouts = [replace(rollout, weight_version=weight_version) for rollout in self.rollouts]
        self.weights = {name: tensor.clone() for name, tensor in weights}


class FixedPrompts:
    """Those of the rollouts, at every step."""

    heldout: tuple[Prompt, ...] = ()
    digest = "fixed"
    num_copies = num_skipped = num_duplicates = 0

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.prompts = [
            Prompt(one.prompt_index, "", one.prompt_ids, teacher_prompt_ids=tuple(one.teacher_prompt_ids))
            for one in rollouts
        ]

    def batch(self, step: int) -> list[Prompt]:
        return self.prompts


def make_models(folder: Path, *, tied: bool = True) -> Path:
    """`student` and `teacher` of different widths in `folder`."""
    make_llama(folder / "student", seed=1, tied=tied)
    make_llama(folder / "teacher", seed=2, tied=False, hidden_size=96)
    return folder


def make_rollouts(response_lengths: list[int], *, seed: int = 0) -> list[Rollout]:
    """Random ids; the i-th response has `response_lengths[i]` of them (0: an empty response)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())

    return [
        Rollout(place, 0, ids(4 + place % 3), ids(length), (0.0,) * length, "length", weight_version=0)
        for place, length in enumerate(response_lengths)
    ]


def make_config(folder: Path, layout: Layout, **sections: dict[str, Any]) -> Config:
    """A configuration of the models in `folder`; `sections` are added to its sections."""
    teacher = layout.teacher or layout.student
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": folder / "run"},
        "model": {
            "path": folder / "student",
            "dtype": "float32",
            "tensor_parallel_size": layout.student[0],
            "pipeline_parallel_size": layout.student[1],
            "context_parallel_size": layout.cp[0],
            "sequence_parallel": layout.sequence_parallel,
        },
        "teacher": {
            "path": folder / "teacher",
            "dtype": "float32",
            "tensor_parallel_size": teacher[0],
            "pipeline_parallel_size": teacher[1],
            "context_parallel_size": layout.cp[1],
        },
        "prompts": {"source": "reasoning_gym", "tasks": ("basic_arithmetic",), "max_prompt_tokens": 64},
        "heldout": {"num_prompts": 1},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 64},
        "selection": {"retention_ratio": 0.3, "passes": "two"},
        "optimizer": {"lr": 1e-3, "clip_grad": 0.0},
        "training": {"steps": 4, "max_tokens_per_micro_batch": 48},
        "output": {"save_rollouts": False},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return Config.model_validate(values)


def make_pruned_run(models: Path, folder: Path, *, steps: int, **sections: dict[str, Any]) -> Config:
    """A run into `folder` on two tensor-parallel workers, whose student is its teacher without two layers."""
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": folder, "threads": 2},
        "teacher": {"path": models / "student"},
        "model": {"drop_layers": (1, 4)},
        "prompts": {"max_prompt_tokens": 200},
        "heldout": {"num_prompts": 2, "num_samples": 1, "every_steps": 4},
        "rollout": {"prompts_per_step": 3, "max_response_tokens": 10},
        "optimizer": {"lr": 2e-3},
        "training": {"steps": steps, "max_tokens_per_micro_batch": 300},
        "checkpoint": {"every_steps": 2},
        "output": {"save_rollouts": True, "save_checkpoint": False},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return make_config(models, Layout(2, student=(2, 1), teacher=(1, 1)), **values)


def build_tiny_run(config: Config, rollouts: list[Rollout]) -> TrainingRun:
    """The run of this worker's world, its engine answering with `rollouts`. Call it inside `run_workers`."""
    plan, worker = plan_run(config, dist.get_world_size()), this_worker()
    run = build_run(config, plan, worker, PhaseTimer(worker.device), num_threads=1)
    return with_source(run, FixedEngine(rollouts), FixedPrompts(rollouts))


def with_source(run: TrainingRun, engine: RolloutEngine, prompts: Any = None) -> TrainingRun:
    """`run` with another engine in the first process, and other prompts where they are given."""
    if run.source is None:
        return run
    return replace(run, source=RolloutSource(prompts or run.source.prompts, engine))


def engine_of(run: TrainingRun) -> Any:
    """The run's engine, in the first process; None elsewhere."""
    return run.source and run.source.engine


def recorder_of(run: TrainingRun, folder: RunFolder) -> RunRecorder:
    """A recorder of `run` into `folder`."""
    worker = this_worker()
    return RunRecorder(run.config, folder, worker, Throughput(run.architecture, None, worker.world_size, 0.0))


def this_worker() -> Worker:
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Worker(rank, dist.get_world_size(), rank, device)
