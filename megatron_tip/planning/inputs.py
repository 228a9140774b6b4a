"""Checks of the packages and files that a configuration needs, whatever its engine and teacher."""

import math
from importlib.util import find_spec

import torch

from megatron_tip.config import Config, ModelConfig, TeacherConfig
from megatron_tip.errors import ConfigError, InputError, OptionalDependencyError
from megatron_tip.machine import Machine
from megatron_tip.observability.trackers import check_trackers
from megatron_tip.placement.placement import num_workers_on
from megatron_tip.prompts.files import PromptFile, read_prompt_file
from megatron_tip.prompts.reasoning_tasks import check_tasks

MAX_GENERATED_PROMPTS = 1_000_000


def default_num_workers(config: Config) -> int:
    """Returns how many workers to start here: one per GPU that servers leave; on a CPU the fewest for both models."""
    if torch.cuda.is_available():
        return num_workers_on(config, torch.cuda.device_count())
    return math.lcm(_fewest_workers(config.model), _fewest_workers(config.teacher))


def _fewest_workers(model: ModelConfig | TeacherConfig) -> int:
    tp_size = model.tensor_parallel_size
    experts = (model.expert_tensor_parallel_size or tp_size) * model.expert_model_parallel_size
    return model.pipeline_parallel_size * math.lcm(tp_size * model.context_parallel_size, experts)


def check_packages(config: Config, machine: Machine) -> None:
    """Raises OptionalDependencyError for a missing package that the configuration needs; elsewhere, notes it."""
    with machine.lacks_packages():
        check_trackers(config.tracking)
    for owner, model in (("model", config.model), ("teacher", config.teacher)):
        with machine.lacks_packages():
            if model.transformer_impl == "transformer_engine" and not find_spec("transformer_engine"):
                raise OptionalDependencyError(
                    f"{owner}.transformer_impl: Transformer Engine is not installed; install the extra "
                    "megatron_tip[transformer-engine] on a machine with a GPU, or set local"
                )


def check_inputs(config: Config, machine: Machine) -> None:
    """Checks that prompts can be generated and that the bank exists.

    Raises:
        ConfigError: a file is missing here.
        OptionalDependencyError: reasoning-gym is needed but not installed.
    """
    prompts = config.prompts
    num_prompts = prompts.num_prompts or config.rollout.prompts_per_step * config.training.steps
    if prompts.source == "reasoning_gym" and num_prompts > MAX_GENERATED_PROMPTS:
        raise ConfigError(
            f"prompts.num_prompts: expected at most {MAX_GENERATED_PROMPTS} generated prompts, got {num_prompts} "
            "(0: rollout.prompts_per_step x training.steps); they are made before the first step: set it lower"
        )
    if prompts.source == "reasoning_gym":
        with machine.lacks_packages():
            check_tasks(prompts.tasks, prompts.task_options)
    if config.diagnostics.every_steps and config.diagnostics.bank is not None:
        machine.has(config.diagnostics.bank, "diagnostics.bank")


def read_prompts(config: Config, machine: Machine) -> PromptFile | None:
    """Returns the content of the prompt file; None if prompts are generated, or if the run and its file are elsewhere.

    Raises:
        ConfigError, InputError: the file is missing here or has the wrong content.
    """
    prompts = config.prompts
    if prompts.path is None or not machine.has(prompts.path, "prompts.path"):
        return None
    return read_prompt_file(prompts.path, *prompts.row_fields)


def check_number(config: Config, file: PromptFile | None) -> None:
    """Raises InputError if a prompt file cannot have enough prompts, whatever the tokenizer makes of them."""
    if file is not None and len(file.rows) <= config.heldout.num_prompts:
        raise InputError(
            f"{config.prompts.path}: expected at least {config.heldout.num_prompts} held-out prompts and one for "
            f"training, got {len(file.rows)} different ones; lower heldout.num_prompts"
        )
