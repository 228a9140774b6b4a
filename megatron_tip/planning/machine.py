"""The machine that a run is checked on. What it lacks is an error for a run here and a note for a run elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, OptionalDependencyError
from megatron_tip.observability.trackers import check_trackers
from megatron_tip.prompts.files import read_prompt_file
from megatron_tip.prompts.reasoning_tasks import check_tasks
from megatron_tip.rollout.replay_engine import ReplayEngine
from megatron_tip.rollout.sglang.server import require_sglang
from megatron_tip.rollout.sglang.setup import read_keys


def default_num_workers(config: Config) -> int:
    """Returns how many workers to start on this machine: one per GPU, or without GPUs the fewest for both models."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    models = (config.model, config.teacher)
    return math.lcm(*(model.tensor_parallel_size * model.pipeline_parallel_size for model in models))


class Machine:
    """This machine, for a run that starts on it or elsewhere. `notes`: what it lacks and the run may find elsewhere."""

    def __init__(self, *, is_elsewhere: bool = False) -> None:
        """`is_elsewhere`: whether the run will start on another machine."""
        self.is_elsewhere = is_elsewhere
        self.notes: list[str] = []

    def has(self, path: Path, setting: str) -> bool:
        """Returns whether `path`, which `setting` names, exists here.

        Raises:
            ConfigError: it does not, and the run starts here.
        """
        if path.exists():
            return True
        if not self.is_elsewhere:
            raise ConfigError(f"{setting}: expected an existing path, got {path}")
        self.notes.append(f"{path} is not on this machine")
        return False

    @contextmanager
    def lacks_packages(self) -> Iterator[None]:
        """Turns an OptionalDependencyError into a note where the run is elsewhere."""
        try:
            yield
        except OptionalDependencyError as error:
            if not self.is_elsewhere:
                raise
            self.notes.append(str(error))


def check_packages(config: Config, machine: Machine) -> None:
    """Raises OptionalDependencyError for a package that the configuration needs and a machine of the run lacks."""
    with machine.lacks_packages():
        check_trackers(config.tracking)
    for owner, model in (("model", config.model), ("teacher", config.teacher)):
        with machine.lacks_packages():
            if model.transformer_impl == "transformer_engine" and not find_spec("transformer_engine"):
                raise OptionalDependencyError(
                    f"{owner}.transformer_impl: Transformer Engine is not installed; install the extra "
                    "megatron_tip[transformer-engine] on a machine with a GPU, or set local"
                )
    with machine.lacks_packages():
        if config.rollout.engine == "sglang" and not config.rollout.server_urls:
            require_sglang()


def check_inputs(config: Config, machine: Machine) -> None:
    """Reads prompts, rollouts to replay and passwords and refuses what cannot be used; a bank has only to exist.

    Raises:
        ConfigError, InputError, EngineError: a file that is missing here or holds something else.
        OptionalDependencyError: reasoning-gym is asked for and not installed.
    """
    prompts, replay = config.prompts, config.rollout.replay_folder
    if prompts.source == "reasoning_gym":
        with machine.lacks_packages():
            check_tasks(prompts.tasks)
    elif prompts.path is not None and machine.has(prompts.path, "prompts.path"):
        read_prompt_file(prompts.path, prompts.field)
    if replay is not None:
        if replay.resolve().is_relative_to(config.run.folder.resolve()):
            raise ConfigError(
                f"rollout.replay_folder: expected a folder of another run, got {replay} within run.folder, where this "
                "run's own rollouts go; give another run.folder"
            )
        if machine.has(replay, "rollout.replay_folder"):
            ReplayEngine(replay).health()
    served = config.rollout.engine == "sglang" and config.rollout.server_urls
    passwords = {"sglang": served and config.sglang.keys_file, "teacher": config.teacher.keys_file}
    for owner, path in passwords.items():
        if path and machine.has(path, f"{owner}.keys_file"):
            read_keys(path, setting=f"{owner}.keys_file")
    if config.diagnostics.every_steps and config.diagnostics.bank is not None:
        machine.has(config.diagnostics.bank, "diagnostics.bank")
