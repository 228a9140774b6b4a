"""The commands that read inputs, as functions that can be called in a forked process."""

import importlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_tip.cli import app
from megatron_tip.commands.outcome import errors_reported
from megatron_tip.config.io import load_config
from megatron_tip.observability.metrics_file import MetricsWriter, recorded_steps
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.run_lock import RunLock
from megatron_tip.parallel.distributed import init_distributed
from megatron_tip.planning.plan import plan_run
from megatron_tip.prompts.source import load_prompts
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.resume import newest_whole, read_progress
from megatron_tip.training.checkpoints.same_run import check_same_run
from megatron_tip.training.loop import take_folder
from megatron_tip.training.recorder import RecorderState
from tools import convert_hf_to_megatron as to_megatron
from tools import convert_megatron_to_hf as to_hf

for name in ("diagnostics.freeze", "diagnostics.papers.token_tables", "planning.dry_run", "report.page"):
    importlib.import_module(f"megatron_tip.{name}")  # here once, instead of in each forked process


@dataclass(frozen=True)
class Command:
    """A command. `name`: for the report. `run`: takes further arguments; ends as a command does, or returns."""

    name: str
    run: Callable[[list[str]], None]


def _cli(*arguments: str) -> Command:
    return Command(" ".join(arguments), lambda more: app([*arguments, *more]))


def _as_only_worker() -> None:
    """Tells this process that it is the one worker of a world of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@errors_reported()
def _prompts(overrides: list[str]) -> None:
    """Reads and renders the prompts as a run does, after the checks of a dry run."""
    config = load_config("run.toml", overrides)
    tokenizer = plan_run(config, 1).tokenizer
    per_step, steps = config.rollout.prompts_per_step, config.training.steps
    load_prompts(
        config.prompts, config.heldout, tokenizer, prompts_per_step=per_step, steps=steps, seed=config.run.seed
    )


@errors_reported()
def _resume(overrides: list[str]) -> None:
    """Opens an unfinished run's folder as a continued run does, up to its weights."""
    config = load_config("run.toml", overrides)
    folder = RunFolder.create(config.run.folder)
    check_same_run(config)
    _as_only_worker()
    device = init_distributed().device
    take_folder(folder, RunLock(folder.path))
    files, state = CheckpointFiles(folder.checkpoints), RecorderState()
    step = newest_whole(files, device)
    if step is not None:
        _, state = read_progress(files, step)
    with MetricsWriter(folder.metrics, keep_until_step=state.step):
        recorded_steps(folder.metrics)


@errors_reported()
def _to_megatron(_: list[str]) -> None:
    to_megatron.check_conversion(to_megatron.open_checkpoint(Path("model"), []), Path("converted"), 1, 1)
    _as_only_worker()
    to_megatron.convert(Path("model"), Path("converted"), 1, 1, "auto", [])


@errors_reported()
def _to_hf(_: list[str]) -> None:
    to_hf.check_conversion(to_hf.open_folder(Path("megatron")), Path("converted"), 1, 1)
    _as_only_worker()
    to_hf.convert(Path("megatron"), Path("converted"), 1, 1, "auto")


def convert_model() -> None:
    """Writes `megatron`, the good model as a Megatron checkpoint."""
    _to_megatron([])
    Path("converted").rename("megatron")


_PARQUET = "prompts.path=prompts.parquet"
DRY_RUNS = (
    _cli("train", "run.toml", "--dry-run"),
    _cli("train", "run.toml", "--dry-run", "--world-size", "8"),
    _cli("doctor", "run.toml"),
    _cli("submit", "run.toml", "--dry-run", "--gpus-per-node", "2"),
)
FROZEN = _cli("diagnose", "bank", "run.toml")
PROMPTS = Command("render the prompts", _prompts)
PARQUET_PROMPTS = Command("render the prompts of a Parquet file", lambda more: _prompts([_PARQUET, *more]))
RESUME = Command("continue a run", _resume)
REPORT = _cli("report", "done")
REPORT_OF_BOTH = _cli("report", "done", "run", "--output", "page.html")
GAIN = _cli("diagnose", "gain", "bank", "start", "after", "--resamples", "20")
TO_MEGATRON = Command("convert_hf_to_megatron", _to_megatron)
TO_HF = Command("convert_megatron_to_hf", _to_hf)
