"""The plan of a run, checked by reading files only, before any process group or weights exist."""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.machine import Machine
from megatron_tip.models.layout import check_layout
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.placement.hosts import Hosts, hosts_elsewhere, hosts_here
from megatron_tip.placement.placement import Placement, place
from megatron_tip.planning.balance import pipeline_layers
from megatron_tip.planning.inputs import check_inputs, check_number, check_packages, read_prompts
from megatron_tip.planning.models import FoundModel, find_model, limits, served_limits, shared_tokenizer, stop_ids
from megatron_tip.planning.precision import check_precision
from megatron_tip.planning.settings import check_experts, check_settings, make_selector
from megatron_tip.prompts.files import PromptFile
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.rollout.multi_turn import check_environment
from megatron_tip.rollout.replay_engine import check_same_batches
from megatron_tip.selection import Selector
from megatron_tip.teachers.setup import check_teacher, teacher_kind
from megatron_tip.vocab_parallel import padded_vocab_size

GPUS_PER_NODE = 8
"""Of a run elsewhere, unless the number is given."""


@dataclass(frozen=True)
class Outline:
    """A configuration resolved for a number of workers, as far as this machine can tell.

    `teacher`: None behind servers, and if it is the student itself. `vocab_size`: entries that both models have; their
    distributions cover these.
    `padded_vocab_size`: rows of the student's embeddings and of both LM heads, a multiple of the student's tp size.
    `tokenizer`, `stop_token_ids`: None and empty if the tokenizers are not on this machine. `prompts`: what the prompt
    file holds; None if prompts are generated, the file is elsewhere, or this process did not read it.
    """

    student: FoundModel
    teacher: FoundModel | None
    placement: Placement
    student_grid: ModelGrid
    teacher_grid: ModelGrid
    selector: Selector
    vocab_size: int
    padded_vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None
    stop_token_ids: tuple[int, ...]
    prompts: PromptFile | None

    @property
    def teaching(self) -> FoundModel:
        """The model that teaches in the trainer's own processes: the student where the run has no other."""
        return self.teacher or self.student

    def grids_in_words(self) -> str:
        """Returns the sizes of both layouts; a teacher behind servers has the student's."""
        grids = (("student", self.student_grid), ("teacher", self.teacher_grid))
        return ", ".join(f"{owner} {grid.in_words()}" for owner, grid in grids)


@dataclass(frozen=True)
class RunPlan(Outline):
    """The outline of a run that can start on this machine: models with their weights, and the tokenizer."""

    student: HfCheckpoint
    teacher: HfCheckpoint | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_token_id(self) -> int:
        """Any id of the vocabulary, because no model reads the padding."""
        return self.stop_token_ids[0]

    @property
    def device_index(self) -> int | None:
        """This worker's GPU among those that it sees; None on a CPU."""
        if not self.placement.hosts.gpus:
            return None
        return self.placement.visible_position(int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def memory_bytes(self) -> float:
        """The memory of this worker's GPU or, on a CPU, its share of the machine's."""
        if self.device_index is not None:
            return torch.cuda.get_device_properties(self.device_index).total_memory
        return psutil.virtual_memory().total / self.placement.hosts.workers_per_node


def plan_run(config: Config, world_size: int, *, reads_prompts: bool = True, generates: bool = True) -> RunPlan:
    """Returns the plan of a run that starts on this machine; see `outline_run`.

    Needs no process group. On nodes with the same number of workers and GPUs, every rank returns the same plan or
    raises the same error; on others `build_run` refuses placements that differ.
    """
    return RunPlan(**vars(outline_run(config, world_size, Machine(), reads_prompts=reads_prompts, generates=generates)))


def outline_run(
    config: Config,
    world_size: int,
    machine: Machine,
    hosts: Hosts | None = None,
    *,
    reads_prompts: bool = True,
    generates: bool = True,
    like: Outline | None = None,
) -> Outline:
    """Checks a run, here or elsewhere, and returns its outline.

    Reads both models' headers, the tokenizers, the prompts and the other files that the configuration names. What is
    missing on `machine` is an error; if the run is elsewhere, it is noted instead.

    Args:
        hosts: where it will run; None: on machines like this one, or for a run elsewhere on nodes of eight GPUs.
        reads_prompts: False for workers, whose prompt file only the first process reads (`with_prompts`), and for work
            without prompts.
        generates: False for work on existing rollouts, which asks the engine for none.
        like: of a configuration that differs in layout and placement alone; its models, tokenizer and prompts are taken
            over instead of read again.

    Raises:
        ConfigError: layouts, placement, lengths, schedule, rule, tokenizers or vocabularies cannot run.
        WeightsError: a model directory is incomplete or not supported.
        InputError, EngineError: prompts, or rollouts to replay, cannot be used.
        OptionalDependencyError: a package is needed but not installed.
    """
    check_packages(config, machine)
    placement = place(config, hosts or _hosts(world_size, machine))
    student = like.student if like else find_model("model", config.model.path, machine, config.model.drop_layers)
    teacher = like.teacher if like else _teacher(config, student, machine)
    grids = _grids(config, student, teacher, world_size)
    check_experts(config, student.architecture, grids[0])
    sizes, positions = zip(limits(student), limits(teacher) if teacher else served_limits(config, machine), strict=True)
    check_settings(config, dict(zip(("student", "teacher"), positions, strict=True)))
    selector = make_selector(config)
    check_teacher(config, machine)
    check_precision(config, teacher.architecture if teacher else None, machine)
    check_inputs(config, machine)
    tokenizer = like.tokenizer if like else shared_tokenizer(config, machine, sizes)
    engine_kind(config).check(config, sizes, machine)
    if generates and not engine_kind(config).generates:
        check_same_batches(config, machine)
    stop_token_ids = stop_ids(config.model.path, tokenizer) if tokenizer else ()
    if tokenizer:
        check_environment(config.rollout, tokenizer, stop_token_ids)
    prompts = like.prompts if like else None
    if reads_prompts and not like:
        prompts = read_prompts(config, machine)  # last: a large file takes a while
    check_number(config, prompts)
    return Outline(
        student=student,
        teacher=teacher,
        placement=placement,
        student_grid=grids[0],
        teacher_grid=grids[1],
        selector=selector,
        vocab_size=min(sizes),
        padded_vocab_size=padded_vocab_size(max(sizes) if teacher else sizes[0], grids[0].tp_size),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        prompts=prompts,
    )


def _teacher(config: Config, student: FoundModel, machine: Machine) -> FoundModel | None:
    """Returns the model whose weights the run loads for the teacher, if any."""
    if config.teacher.kind == "self":
        return None if config.teacher.update == "live" else student
    return find_model("teacher", config.teacher.path, machine) if teacher_kind(config).has_weights else None


def _hosts(world_size: int, machine: Machine) -> Hosts:
    if machine.is_elsewhere:
        return hosts_elsewhere(world_size, GPUS_PER_NODE)
    return hosts_here(world_size, os.environ, torch.cuda.device_count())


def _grids(
    config: Config, student: FoundModel, teacher: FoundModel | None, world_size: int
) -> tuple[ModelGrid, ModelGrid]:
    """Returns the grids of student and teacher; one behind servers, or that is the student, takes the student's."""
    grids: list[ModelGrid] = []
    models = (("model", "student", config.model, student), ("teacher", "teacher", config.teacher, teacher))
    for section, owner, model, found in models:
        if found is None or (section == "teacher" and config.teacher.kind == "self"):
            return grids[0], grids[0]
        sizes: dict[str, Any] = {
            "tp_size": model.tensor_parallel_size,
            "pp_size": model.pipeline_parallel_size,
            "ep_size": model.expert_model_parallel_size,
            "expert_tp_size": model.expert_tensor_parallel_size,
            "pipeline_layers": pipeline_layers(config, found.architecture, teacher and teacher.architecture, section),
        }
        check_layout(found.architecture, owner=section, **sizes)
        grids.append(ModelGrid.over(world_size, owner=owner, cp_size=model.context_parallel_size, **sizes))
    return grids[0], grids[1]
