"""A configuration checked for another machine: no weights, no GPUs, no prompts needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.known_models import KnownTokenizer, known_model
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.errors import ConfigError
from megatron_tip.observability.trackers import check_trackers
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.memory_estimate import MemoryEstimate, estimate_memory, has_servers_beside
from megatron_tip.planning.plan import (
    check_settings,
    check_vocabulary,
    make_selector,
    plan_grids,
    plan_run,
)
from megatron_tip.rollout.engines import engine_kind
from megatron_tip.teachers.setup import check_teacher


@dataclass(frozen=True)
class DryRun:
    """A configuration that can run on `world_size` GPUs, as far as can be seen from here.

    `notes`: what could not be seen.
    """

    world_size: int
    student_grid: ModelGrid
    teacher_grid: ModelGrid
    memory: MemoryEstimate
    notes: tuple[str, ...]

    def report(self, gpu_memory_gib: float) -> str:
        """Returns the result in words."""
        grids = ", ".join(
            f"{owner} tp {grid.tp_size} x pp {grid.pp_size} x dp {grid.dp_size}"
            for owner, grid in (("student", self.student_grid), ("teacher", self.teacher_grid))
        )
        total = self.memory.total_bytes / 2**30
        lines = [
            f"{self.world_size} workers: {grids}",
            f"memory of the fullest GPU, to the first order: {total:.1f} of {gpu_memory_gib:g} GiB",
            *self.memory.lines(),
            *(f"not checked here: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def dry_run(config: Config, world_size: int, *, gpu_memory_gib: float) -> DryRun:
    """Checks all that the configuration, the models' shapes and the number of workers decide.

    A model whose folder is missing here is known by its folder's name (`known_models`); one that is here with its
    weights is checked as it would be at the start of the run.

    Raises:
        ConfigError: what cannot run, by name; also an estimate beyond `gpu_memory_gib`.
    """
    models = [
        _described(path, owner) for owner, path in (("model", config.model.path), ("teacher", config.teacher.path))
    ]
    notes = [model.note for model in models if model.note]
    student = models[0].architecture.with_dropped_layers(config.model.drop_layers)
    teacher = models[1].architecture
    in_trainer = teacher if config.teacher.kind == "megatron" else None
    student_grid, teacher_grid = plan_grids(config, student, in_trainer, world_size)
    check_settings(config, {"student": student.max_position_embeddings, "teacher": teacher.max_position_embeddings})
    check_trackers(config.tracking)
    check_teacher(config, make_selector(config), elsewhere=True)
    if notes:
        notes += _check_tokenizers(config, models)
    engine_kind(config).check(config, (student.vocab_size, teacher.vocab_size), elsewhere=True)
    missing = [path for path in (config.prompts.path, config.rollout.replay_folder) if path and not path.exists()]
    notes += [f"{path} is not on this machine" for path in missing]
    if not notes:
        plan_run(config, world_size)
    if has_servers_beside(config, world_size) and not config.sglang.memory_fraction:
        notes.append("what SGLang takes beside the trainer: set sglang.memory_fraction, or sglang.gpus")
    memory = estimate_memory(config, student, teacher, student_grid, teacher_grid, gpu_memory_gib=gpu_memory_gib)
    result = DryRun(world_size, student_grid, teacher_grid, memory, tuple(notes))
    if memory.total_bytes > gpu_memory_gib * 2**30:
        raise ConfigError(
            f"memory: expected at most {gpu_memory_gib:g} GiB a GPU (--gpu-memory), got an estimate of "
            f"{memory.total_bytes / 2**30:.1f} GiB; raise tensor or pipeline parallel sizes, set optimizer.distributed "
            "or model.recompute_activations, lower training.max_tokens_per_micro_batch, or give servers beside the "
            "trainer less (sglang.memory_fraction) or GPUs of their own (sglang.gpus)\n" + result.report(gpu_memory_gib)
        )
    return result


@dataclass(frozen=True)
class _Described:
    architecture: ModelArchitecture
    tokenizer: KnownTokenizer | None
    note: str


def _described(path: Path, owner: str) -> _Described:
    if (path / "config.json").exists():
        has_weights = any(path.glob("*.safetensors"))
        note = "" if has_weights else f"weights and tokenizer of {path} are not on this machine; its config.json is"
        return _Described(ModelFolder(path).architecture, None, note)
    known = known_model(path, owner=owner)
    return _Described(known.architecture, known.tokenizer, f"{path} is not on this machine; its shape: {known.source}")


def _check_tokenizers(config: Config, models: list[_Described]) -> list[str]:
    """Compares what is known of the tokenizers; returns what is not."""
    student, teacher = (model.tokenizer for model in models)
    if student is None or teacher is None:
        return ["whether both models share one tokenizer"]
    same_text = student.text_vocabulary == teacher.text_vocabulary
    if student != teacher and not (same_text and config.teacher.special_tokens == "may_differ"):
        remedy = (
            'set teacher.special_tokens = "may_differ"' if same_text else "choose a teacher of the student's family"
        )
        raise ConfigError(
            f"teacher.path: expected the student's tokenizer ({student.name}), got that of {teacher.name}; {remedy}"
        )
    largest = max(student.largest_id, teacher.largest_id)
    check_vocabulary(largest, [model.architecture.vocab_size for model in models])
    return []
