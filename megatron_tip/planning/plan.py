"""What a run will be, found and checked from files alone: before any process group or weight exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import ConfigError, OptionalDependencyError, WeightsError
from megatron_tip.models.layout import check_layout
from megatron_tip.observability.trackers import check_trackers
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.prompts.files import read_prompt_file
from megatron_tip.prompts.reasoning_tasks import check_tasks
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.rollout.multi_turn import check_environment
from megatron_tip.selection import Selector, rollout_budget
from megatron_tip.teachers.setup import check_teacher, teacher_limits
from megatron_tip.vocab_parallel import padded_vocab_size
from megatron_tip.vocab_parallel.statistics import FULL_STATISTICS


@dataclass(frozen=True)
class RunPlan:
    """Models, grids and vocabulary of a run that can start.

    `vocab_size`: the entries that both models have, which their distributions are over. `padded_vocab_size`: of the
    student's embeddings and of both LM heads, a multiple of the student's tp size.
    """

    student: HfCheckpoint
    teacher: HfCheckpoint | None
    student_grid: ModelGrid
    teacher_grid: ModelGrid
    tokenizer: PreTrainedTokenizerBase
    selector: Selector
    vocab_size: int
    padded_vocab_size: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]


def plan_run(config: Config, world_size: int) -> RunPlan:
    """Reads both models' headers and the tokenizers and checks that the run fits together.

    Needs no process group; every rank comes to the same result or raises the same error.

    Raises:
        ConfigError: layouts, lengths, schedule, rule, tokenizers or vocabularies that cannot run.
        WeightsError: a model directory that is incomplete or not supported.
    """
    check_trackers(config.tracking)
    student = _checkpoint("model", config.model.path, config.model.drop_layers)
    teacher = _checkpoint("teacher", config.teacher.path) if config.teacher.kind == "megatron" else None
    student_grid, teacher_grid = plan_grids(
        config, student.architecture, teacher.architecture if teacher else None, world_size
    )
    teacher_vocab_size, teacher_positions = _limits(teacher) if teacher else teacher_limits(config.teacher.path)
    check_settings(config, {"student": _limits(student)[1], "teacher": teacher_positions})
    selector = make_selector(config)
    check_teacher(config, selector)
    check_inputs(config)
    tokenizer = _shared_tokenizer(config)
    sizes = (student.architecture.vocab_size, teacher_vocab_size)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    check_vocabulary(max(vocabulary.values()), sizes)
    engine_kind(config).check(config, sizes)
    stop_token_ids = stop_ids(config.model.path, tokenizer)
    check_environment(config.rollout, tokenizer, stop_token_ids)
    return RunPlan(
        student=student,
        teacher=teacher,
        student_grid=student_grid,
        teacher_grid=teacher_grid,
        tokenizer=tokenizer,
        selector=selector,
        vocab_size=min(sizes),
        padded_vocab_size=padded_vocab_size(max(sizes) if teacher else sizes[0], student_grid.tp_size),
        pad_token_id=stop_token_ids[0],  # any id of the vocabulary: padding lies behind what is read
        stop_token_ids=stop_token_ids,
    )


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: those of generation_config.json and the tokenizer's end-of-sequence id.

    Raises:
        ConfigError: there are none, so that no response would ever end.
    """
    eos: Any = tokenizer.eos_token_id
    ids: set[int] = set() if eos is None else {eos}
    if (folder / "generation_config.json").exists():
        try:
            named = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / 'generation_config.json'}: expected a JSON object, got: {error}") from error
        ids |= {named} if isinstance(named, int) else set(named or ())
    if not ids:
        raise ConfigError(
            f"{folder}: expected an end-of-sequence id in the tokenizer or generation_config.json, found none"
        )
    return tuple(sorted(ids))


def default_num_workers(config: Config) -> int:
    """Returns how many workers to start on this machine: one a GPU; without a GPU the fewest that hold both models."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    models = (config.model, config.teacher)
    return math.lcm(*(model.tensor_parallel_size * model.pipeline_parallel_size for model in models))


def plan_grids(
    config: Config, student: ModelArchitecture, teacher: ModelArchitecture | None, world_size: int
) -> tuple[ModelGrid, ModelGrid]:
    """Returns the grids of student and teacher over `world_size` ranks; raises ConfigError for one that cannot be.

    `teacher=None`: it is behind servers; its grid is the student's then.
    """
    grids: list[ModelGrid] = []
    models = (("model", "student", config.model, student), ("teacher", "teacher", config.teacher, teacher))
    for section, owner, model, architecture in models:
        if architecture is None:
            return grids[0], grids[0]
        tp_size, pp_size = model.tensor_parallel_size, model.pipeline_parallel_size
        check_layout(architecture, tp_size=tp_size, pp_size=pp_size, owner=section)
        grids.append(ModelGrid.over(world_size, tp_size=tp_size, pp_size=pp_size, owner=owner))
    return grids[0], grids[1]


def _checkpoint(section: str, path: Path, drop_layers: Sequence[int] = ()) -> HfCheckpoint:
    """The model's directory; errors name the key of the configuration."""
    try:
        return HfCheckpoint(path, drop_layers)
    except WeightsError as error:
        raise WeightsError(f"{section}.path: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from error  # drop_layers


def _limits(checkpoint: HfCheckpoint) -> tuple[int, int]:
    """Vocabulary and positions."""
    return checkpoint.architecture.vocab_size, checkpoint.architecture.max_position_embeddings


def check_settings(config: Config, positions: Mapping[str, int]) -> None:
    """Refuses lengths, schedules and samplings that do not fit together or the models. Reads no files.

    `positions`: most tokens that a sequence may have, of "student" and "teacher".
    """
    _check_one_pass(config)
    longest = config.prompts.max_prompt_tokens + config.rollout.max_response_tokens
    for owner, limit in positions.items():
        if longest > limit:
            raise ConfigError(
                f"prompts.max_prompt_tokens + rollout.max_response_tokens: expected at most the {owner}'s "
                f"max_position_embeddings {limit}, got {longest}; shorten one of them"
            )
    if config.optimizer.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps: expected fewer than training.steps = {config.training.steps}, "
            f"got {config.optimizer.warmup_steps}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr: expected at most optimizer.lr = {config.optimizer.lr}, got {config.optimizer.min_lr}"
        )
    rollout, temperature = config.rollout, config.loss.temperature
    if config.loss.divergence == "sampled_token" and (rollout.temperature, rollout.top_p) != (temperature, 1.0):
        raise ConfigError(
            'loss.divergence = "sampled_token": expected rollout.temperature = loss.temperature and rollout.top_p = 1, '
            f"got {rollout.temperature}, {temperature} and {rollout.top_p}; its mean is the reverse KL only over "
            "tokens drawn from the student's own distribution"
        )
    if config.loss.divergence == "sampled_token" and not engine_kind(config).generates:
        raise ConfigError(
            'loss.divergence = "sampled_token": expected an engine that generates, got rollout.engine = "replay"; its '
            "gradient is that of the reverse KL only over tokens drawn from the student as it is"
        )
    if rollout.importance_cap and rollout.temperature != temperature:
        raise ConfigError(
            "rollout.importance_cap: expected rollout.temperature = loss.temperature, got "
            f"{rollout.temperature} and {temperature}; the ratio compares both distributions"
        )
    if config.model.sequence_parallel and config.model.tensor_parallel_size == 1:
        raise ConfigError("model.sequence_parallel: expected model.tensor_parallel_size above 1, got 1; turn it off")


def check_inputs(config: Config) -> None:
    """Refuses prompts, rollouts and layers that are not there or cannot be used. Reads the prompt file.

    Raises:
        ConfigError, InputError: a path; the prompts.
        OptionalDependencyError: reasoning-gym or Transformer Engine are asked for and not installed.
    """
    prompts, replay = config.prompts, config.rollout.replay_folder
    for name, path in (("prompts.path", prompts.path), ("rollout.replay_folder", replay)):
        if path is not None and not path.exists():
            raise ConfigError(f"{name}: expected an existing path, got {path}")
    if prompts.source == "reasoning_gym":
        check_tasks(prompts.tasks)
    elif prompts.path is not None:
        read_prompt_file(prompts.path, prompts.field)
    for owner, model in (("model", config.model), ("teacher", config.teacher)):
        if model.transformer_impl == "transformer_engine" and not find_spec("transformer_engine"):
            raise OptionalDependencyError(
                f"{owner}.transformer_impl: Transformer Engine is not installed; install the extra "
                "megatron_tip[transformer-engine] on a machine with a GPU, or set local"
            )


def _shared_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The student's tokenizer, which must map every token to the same id as the teacher's."""
    student, teacher = config.model.path, config.teacher.path
    tokenizers = [_tokenizer(folder) for folder in (student, teacher)]
    vocabularies = [_compared_tokens(tokenizer, config.teacher.special_tokens) for tokenizer in tokenizers]
    if vocabularies[0] != vocabularies[1]:
        different = sorted(set(vocabularies[0].items()) ^ set(vocabularies[1].items()), key=lambda item: item[1])
        example, place = different[0]
        raise ConfigError(
            f"teacher.path: expected the student's tokenizer ({student}), got another one in {teacher}: "
            f"{len(different)} entries differ, for example {example!r} at id {place}; distillation compares "
            "probabilities id by id, so both models must share one tokenizer (teacher.special_tokens says what of it)"
        )
    return tokenizers[0]


def _compared_tokens(tokenizer: PreTrainedTokenizerBase, special_tokens: str) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if special_tokens == "same":
        return vocabulary
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return {token: place for token, place in vocabulary.items() if token not in added}


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no narrower one for a damaged file
        raise ConfigError(f"{folder}: expected a tokenizer that transformers can load, got: {error}") from error


def check_vocabulary(largest: int, sizes: Sequence[int]) -> None:
    """Refuses models of `sizes` embeddings for a tokenizer whose largest id is `largest`."""
    if largest >= min(sizes):
        raise ConfigError(
            f"vocabulary: expected embeddings of {largest + 1} rows or more in both models, as the tokenizer's largest "
            f"id is {largest}, got {sizes[0]} in the student and {sizes[1]} in the teacher; one of them does not "
            "belong to this tokenizer"
        )


def _check_one_pass(config: Config) -> None:
    """Refuses what needs every score before the training pass where the selection is made within it."""
    selection = config.selection
    if selection.scope == "micro_batch":
        setting = 'selection.scope = "micro_batch"'
    elif selection.thresholds == "last_step":
        setting = 'selection.thresholds = "last_step"'
    else:
        return
    if config.teacher.kind == "sglang":
        raise ConfigError(f'{setting}: expected teacher.kind = "megatron", got "sglang"; servers score whole batches')
    if config.rollout.importance_cap:
        raise ConfigError(
            f"{setting}: expected rollout.importance_cap = 0, got {config.rollout.importance_cap}; importance weights "
            "are taken from a scoring pass"
        )


def make_selector(config: Config) -> Selector:
    """The selector that the configuration describes, whose budget leaves something of the longest response.

    Raises ConfigError for one that cannot be.
    """
    selection = config.selection
    try:
        selector = Selector(
            rule=selection.rule,
            retention_ratio=selection.retention_ratio,
            scope=None if selection.scope == "auto" else selection.scope,
            thresholds=selection.thresholds,
            normaliser=None if selection.normaliser == "auto" else selection.normaliser,
            tie_break=selection.tie_break,
            loss_scale=selection.loss_scale,
            seed=config.run.seed,
            minimum_per_rollout=selection.minimum_per_rollout,
            compare=selection.compare,
        )
    except ConfigError as error:  # names the setting, and knows no sections
        raise ConfigError(f"selection.{error}") from error
    longest = config.rollout.max_response_tokens
    if selector.resolved_scope == "rollout" and not rollout_budget(
        selection.retention_ratio, longest, selection.minimum_per_rollout
    ):
        raise ConfigError(
            f"selection.retention_ratio: expected at least one token of the longest response, got floor("
            f"{selection.retention_ratio} x {longest}) = 0 for every rollout; raise it or selection.minimum_per_rollout"
        )
    selector.check_available(FULL_STATISTICS, "the teacher in this process")
    return selector
