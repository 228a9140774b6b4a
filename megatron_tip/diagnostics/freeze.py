"""Creation of a context bank, from a run's rollouts or from the student's answers to the run's prompts."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.diagnostics.bank import GENERATED, ContextBank, write_bank
from megatron_tip.diagnostics.fingerprint import model_fingerprint, tokenizer_fingerprint
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.planning.plan import RunPlan
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.rollout.storage import read_rollouts
from megatron_tip.training.rollouts import generate_rollouts
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.weight_sync import update_engine

logger = logging.getLogger(__name__)

_SPARE = 1.3
"""Number of prompts drawn for each one needed, because generated prompts repeat."""


def bank_of_rollouts(config: Config, plan: RunPlan, folder: Path, source: Path) -> ContextBank:
    """Creates a bank in `folder` of the first rollouts in `source`, a run's rollouts/ or one file of it.

    Raises:
        InputError: `source` has no rollouts, or fewer than diagnostics.num_contexts with a token.
    """
    paths = sorted(source.glob("step_*.jsonl")) if source.is_dir() else [source]
    found = (rollout for path in paths for rollout in read_rollouts(path))
    contexts = cut_contexts(found, config.diagnostics.num_contexts, config.rollout.max_response_tokens)
    _require(contexts, config, f"in {source}")
    largest = max(max(*context.prompt_ids, *context.response_ids) for context in contexts)
    if largest >= plan.vocab_size:
        raise InputError(
            f"diagnostics.rollouts: expected ids below {plan.vocab_size}, which student and teacher share, got "
            f"{largest} in {source}; give the models of the run that left the rollouts"
        )
    versions = sorted({context.weight_version for context in contexts})
    manifest = _manifest(config, plan) | {"source": str(source), "weight_versions": versions}
    return write_bank(folder, contexts, manifest | _origin_of_rollouts(config, source))


def bank_config(config: Config) -> Config:
    """Returns `config` with as many prompts per step as a bank may need, and nothing written to a run's folder."""
    num_prompts = math.ceil(_SPARE * config.diagnostics.num_contexts / config.rollout.samples_per_prompt)
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"prompts_per_step": num_prompts, "ahead": 0}),
            "heldout": config.heldout.model_copy(update={"num_prompts": 0}),
            "training": config.training.model_copy(update={"steps": 1}),
            "optimizer": config.optimizer.model_copy(update={"warmup_steps": 0}),
            "output": config.output.model_copy(update={"save_rollouts": False}),
        }
    )


def generated_bank(run: TrainingRun, plan: RunPlan, folder: Path) -> ContextBank | None:
    """Creates a bank in `folder` of the student's answers to distinct prompts; None except on rank 0. Collective.

    `run` is built from `bank_config`.
    """
    config = run.config
    update_engine(run, weight_version=0, first=True)
    wanted = math.ceil(config.diagnostics.num_contexts / config.rollout.samples_per_prompt)
    prompts = distinct(run.source.prompts.batch(1) if run.source else [])[:wanted]
    rollouts = generate_rollouts(run, prompts, run.sampling.for_step(0), weight_version=0)
    if dist.get_rank():
        return None
    contexts = cut_contexts(rollouts, config.diagnostics.num_contexts, config.rollout.max_response_tokens)
    _require(contexts, config, "among the answers to the prompts")
    student = _student(config) | {"fingerprint": model_fingerprint(config.model.path, plan.student)}
    origin = {"source": GENERATED, "student": student, "sampling": _sampling(config), "seed": config.run.seed}
    return write_bank(folder, contexts, _manifest(config, plan) | origin)


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the first prompt of each text: contexts of one prompt are not independent."""
    found: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.prompt_ids, prompt)
    return list(found.values())


def cut_contexts(rollouts: Iterable[Rollout], num_contexts: int, max_tokens: int) -> list[Rollout]:
    """Returns the first `num_contexts` rollouts that have a token, each cut after `max_tokens` response tokens."""
    contexts: list[Rollout] = []
    for rollout in _cut(rollouts, max_tokens):
        if len(contexts) == num_contexts:
            break
        contexts.append(rollout)
    return contexts


def _cut(rollouts: Iterable[Rollout], max_tokens: int) -> Iterator[Rollout]:
    for rollout in rollouts:
        end = min(max_tokens, len(rollout.response_ids))
        # a response ends with a token of the student, not within an environment's text
        end = next((start for start, stop in rollout.environment_spans if start < end <= stop), end)
        if not end:
            continue
        yield replace(
            rollout,
            response_ids=rollout.response_ids[:end],
            rollout_logprobs=rollout.rollout_logprobs[:end],
            finish_reason=rollout.finish_reason if end == len(rollout.response_ids) else "length",
            environment_spans=tuple(span for span in rollout.environment_spans if span[1] < end),
        )


def _require(contexts: Sequence[Rollout], config: Config, where: str) -> None:
    wanted = config.diagnostics.num_contexts
    if len(contexts) < wanted:
        raise InputError(
            f"diagnostics.num_contexts: expected {wanted} responses with a token, got {len(contexts)} {where}; lower "
            "it, or give more rollouts or prompts"
        )


def _manifest(config: Config, plan: RunPlan) -> dict[str, Any]:
    """Returns the manifest's common part; the caller adds the origin of the contexts."""
    teacher = config.teacher.path
    return {
        "teacher": {"path": str(teacher), "fingerprint": model_fingerprint(teacher, plan.teacher)},
        "tokenizer": tokenizer_fingerprint(plan.tokenizer),
        "vocab_size": plan.vocab_size,
    }


def _origin_of_rollouts(config: Config, source: Path) -> dict[str, Any]:
    """Returns student, sampling and seed from the run's own config.toml beside its rollouts/; null without one.

    The student is the one that the run began with: the weights behind a later step's rollouts are not known.
    """
    path = (source if source.is_dir() else source.parent).parent / RunFolder(Path()).config
    try:
        run = load_config(path) if path.exists() else None
    except ConfigError as error:
        logger.warning("the origin of the rollouts in %s is not known: %s", source, error)
        run = None
    if run is None or not engine_kind(run).generates:
        return {"student": None, "sampling": None, "seed": None}
    cut = {"max_response_tokens": min(config.rollout.max_response_tokens, run.rollout.max_response_tokens)}
    return {
        "student": _student(run) | {"fingerprint": None},
        "sampling": _sampling(run) | cut,
        "seed": run.run.seed,
    }


def _student(config: Config) -> dict[str, Any]:
    return {"path": str(config.model.path), "drop_layers": list(config.model.drop_layers)}


def _sampling(config: Config) -> dict[str, Any]:
    names = ("temperature", "top_p", "max_response_tokens", "samples_per_prompt", "engine")
    return {name: getattr(config.rollout, name) for name in names}
