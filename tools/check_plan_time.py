"""Compares the time of a simulated step with that of a real one, on this machine's CPU.

    python -m tools.check_plan_time     some three minutes; with nothing else running

One process with two threads, random Qwen2 models. The step of a small pair (4 layers each, few tokens) is timed and
counted, and two rates are fitted to its phases: of matrix products, and of everything else's bytes. Nothing else is
known of this CPU. The steps of larger pairs are then predicted from what a simulation counts, and timed. Exit code 1 if
a step's time differs by more than 25 %.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.planning.plan import plan_run
from megatron_tip.simulation.assumptions import assumed_rollouts
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.ledger import Work
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import learn
from tests.helpers.distributed import run_workers
from tests.helpers.simulation import simulated
from tests.helpers.tiny import make_qwen
from tests.helpers.training import Layout, make_config, this_worker

THREADS, STEPS, TOLERANCE = 2, 4, 0.25
PHASES = ("teacher", "score", "train")
RULE: dict[str, Any] = {"rule": "random", "retention_ratio": 0.3}


@dataclass(frozen=True)
class Pair:
    """Sizes of a pair, of its step, and the step's settings besides them."""

    student_layers: int
    teacher_layers: int
    hidden_size: int
    num_rollouts: int
    sections: dict[str, dict[str, Any]]


SMALL = Pair(4, 4, 384, 8, {})
PAIRS = {
    "12 layers from 20": Pair(12, 20, 384, 16, {}),
    "twice as wide": Pair(6, 8, 768, 16, {}),
    "recomputed layers": Pair(12, 20, 384, 16, {"model": {"recompute_activations": True}}),
    "one pass": Pair(12, 20, 384, 16, {"selection": RULE | {"passes": "one"}}),
}


def configured(pair: Pair, folder: Path) -> Config:
    """The run of a pair, whose random models are written to `folder`."""
    sizes = {"hidden_size": pair.hidden_size, "intermediate_size": 3 * pair.hidden_size, "vocab_size": 16384}
    for name, layers in (("student", pair.student_layers), ("teacher", pair.teacher_layers)):
        make_qwen(folder / name, qk_norm=False, seed=1, num_hidden_layers=layers, num_attention_heads=8, **sizes)
    sections: dict[str, dict[str, Any]] = {
        "prompts": {"max_prompt_tokens": 128},
        "rollout": {"prompts_per_step": pair.num_rollouts, "max_response_tokens": 128, "importance_cap": 2.0},
        "selection": RULE | {"passes": "two"},
        "training": {"steps": STEPS, "max_tokens_per_micro_batch": 512},
    }
    for name, section in pair.sections.items():
        sections[name] = sections.get(name, {}) | section
    return make_config(folder, Layout(1), **sections)


def timed(config: Config) -> dict[str, float]:
    """Seconds of each phase: medians of all steps but the first. Call it inside `run_workers`."""
    torch.set_num_threads(THREADS)
    worker = this_worker()
    timer = PhaseTimer(worker.device)
    plan = plan_run(config, dist.get_world_size())
    run = build_run(config, plan, worker, timer, num_threads=THREADS, generates=False)
    steps: list[dict[str, float]] = []
    for step in range(1, STEPS + 1):
        learn(run, run.batch_of(assumed_rollouts(config, longest=False)), step)
        steps.append(timer.step_metrics())
    names = {phase: f"time/{phase}_seconds" for phase in PHASES}
    return {phase: statistics.median(step.get(name, 0.0) for step in steps[1:]) for phase, name in names.items()}


def counted(config: Config) -> dict[str, Work]:
    """The arithmetic of each phase; that of the optimizer belongs to the training."""
    (rank,) = simulated(config, 1)
    work, update = rank.ledger.work, rank.ledger.work["update"]
    train = Work(work["train"].matrix_flops + update.matrix_flops, work["train"].memory_bytes + update.memory_bytes)
    return {phase: work[phase] for phase in PHASES} | {"train": train}


def fitted(work: Mapping[str, Work], seconds: Mapping[str, float]) -> Device:
    """Returns a device of which two rates are known, of matrix products and of bytes: by least relative squares."""
    rows = [
        (work[phase].matrix_flops / seconds[phase], work[phase].memory_bytes / seconds[phase])
        for phase in PHASES
        if seconds[phase]
    ]
    (per_flop, per_byte), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    if min(per_flop, per_byte) <= 0:
        sys.exit(f"no two rates fit these times, {dict(seconds)}: run it with nothing else running")
    rates = {"tflops": 1e-12 / per_flop, "memory_tb_per_s": 1e-12 / per_byte, "matrix_share": 1.0, "memory_share": 1.0}
    links = {"link_gb_per_s": 1.0, "network_gb_per_s": 1.0}  # of one process, which sends nothing
    return Device(name="cpu", source="fitted", memory_gib=1.0, launch_us=0.0, **links, **rates)


def main() -> None:
    """Prints one line per pair and phase."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(SMALL, folder / "small")
        cpu = fitted(counted(config), _seconds(config, folder))
        rates = f"{1e3 * cpu.tflops:.0f} GFLOP/s in products, {1e3 * cpu.memory_tb_per_s:.1f} GB/s in the rest"
        print(f"fitted to 4 layers: {rates}")
        print(f"{'pair':<20}{'phase':<9}{'real, s':>9}{'predicted':>11}{'difference':>12}")
        are_good = [_check(pair, folder, cpu) for pair in PAIRS]
    sys.exit(0 if all(are_good) else 1)


def _check(name: str, folder: Path, cpu: Device) -> bool:
    config = configured(PAIRS[name], folder / name.replace(" ", "_"))
    real, work = _seconds(config, folder), counted(config)
    predicted = {phase: cpu.seconds_of(work[phase]) for phase in PHASES}
    real["step"], predicted["step"] = sum(real.values()), sum(predicted.values())
    for phase, seconds in real.items():
        if seconds > 0.01:
            difference = predicted[phase] / seconds - 1
            print(f"{name:<20}{phase:<9}{seconds:>9.2f}{predicted[phase]:>11.2f}{difference:>11.0%}")
    return abs(predicted["step"] / real["step"] - 1) <= TOLERANCE


def _seconds(config: Config, folder: Path) -> dict[str, float]:
    return run_workers(timed, 1, folder, config, timeout_seconds=600)[0]


if __name__ == "__main__":
    main()
