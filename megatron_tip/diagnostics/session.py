"""Models for work on a bank, built as a run would: the same layouts and kernels; an engine only on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import load_hf
from megatron_tip.conversion.megatron_checkpoint import MANIFEST_NAME, MegatronCheckpoint, load_shards
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.tensor_load import INDEX_NAME, read_index
from megatron_tip.diagnostics.bank import ContextBank, check_bank, read_bank
from megatron_tip.diagnostics.fingerprint import model_fingerprint, tokenizer_fingerprint
from megatron_tip.errors import ConfigError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads
from megatron_tip.planning.plan import RunPlan, plan_run
from megatron_tip.planning.settings import check_whole_teacher
from megatron_tip.training.checkpoints.files import SHARDS_NAME, CheckpointFiles
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.setup import build_run


@dataclass(frozen=True)
class Subject:
    """The models, bank and checkpoint to examine, checked from files alone before any process group exists.

    It is the same on every rank.

    `checkpoint`: the folder of the student's weights; None: the student at the start of a run. `student`, `teacher`:
    their fingerprints.
    """

    plan: RunPlan
    bank: ContextBank
    checkpoint: Path | None
    student: str
    teacher: str


def examine(config: Config, world_size: int, *, checkpoint: Path | None = None) -> Subject:
    """Returns the configured models and bank, and the checkpoint (see `resolve_checkpoint`).

    Raises:
        ConfigError, WeightsError, InputError: as for `plan_run`, `open_bank` and `resolve_checkpoint`.
    """
    plan = plan_run(config, world_size, reads_prompts=False, generates=False)
    bank = open_bank(config, plan)
    teacher = model_fingerprint(config.teacher.path, plan.teacher)
    if checkpoint is None:
        return Subject(plan, bank, None, model_fingerprint(config.model.path, plan.student), teacher)
    found = resolve_checkpoint(checkpoint, plan)
    return Subject(plan, bank, found, model_fingerprint(found, _description(found)), teacher)


def bank_folder(config: Config) -> Path:
    if config.diagnostics.bank is None:
        raise ConfigError("diagnostics.bank: expected the folder of a context bank, got none; set diagnostics.bank=...")
    return config.diagnostics.bank


def open_bank(config: Config, plan: RunPlan) -> ContextBank:
    """Returns the configured bank, after checking that it belongs to the plan's models.

    Raises:
        ConfigError: no bank is named, its tokenizer or vocabulary differ, or the teacher is served and does not give
            its whole distribution. InputError: the bank is damaged.
    """
    check_whole_teacher(config)
    bank = read_bank(bank_folder(config))
    check_bank(bank, tokenizer=tokenizer_fingerprint(plan.tokenizer), vocab_size=plan.vocab_size)
    return bank


@contextmanager
def built_run(
    config: Config, plan: RunPlan, *, checkpoint: Path | None = None, generates: bool = False
) -> Iterator[TrainingRun]:
    """Yields this rank's student and teacher, with weights from `checkpoint`, of any layout. Collective over the world.

    Args:
        checkpoint: a folder from `resolve_checkpoint`; None: the student at the start of a run.
    """
    worker = init_distributed(device_index=plan.device_index)
    timer = PhaseTimer(worker.device)
    num_threads = config.run.threads or available_threads()
    run = build_run(config, plan, worker, timer, num_threads=num_threads, generates=generates)
    if checkpoint is not None:
        load_student(run, checkpoint)
    yield run
    destroy_distributed()


def resolve_checkpoint(path: Path, plan: RunPlan) -> Path:
    """Returns the folder with the weights that `path` refers to, after the checks that need no communication.

    Args:
        path: a Hugging Face directory, a Megatron checkpoint of this package, a step's folder in a run's checkpoints/,
            or the folder of a run: its checkpoint/, hf/ or the last of its checkpoints/.

    Raises:
        ConfigError: `path` is none of these, or has another architecture than the student. WeightsError: it is damaged.
    """
    folder = RunFolder(path)
    steps = CheckpointFiles(folder.checkpoints).steps()
    last = [CheckpointFiles(folder.checkpoints).step_folder(steps[-1])] if steps else []
    for found in (path, folder.checkpoint, folder.hf, *last):
        if (found / SHARDS_NAME).is_dir():
            read_index(found / SHARDS_NAME / INDEX_NAME)
            return found
        if (description := _description(found)) is not None:
            if differences := plan.student.architecture.differences(description.architecture):
                raise ConfigError(
                    f"{found}: expected the student's architecture, got another one ({'; '.join(differences)}); set "
                    "model.path and model.drop_layers to this student's"
                )
            return found
    raise ConfigError(
        f"{path}: expected a Hugging Face directory, a Megatron checkpoint, a step of checkpoints/ or a run's folder "
        "with one of these in it, found none"
    )


def load_student(run: TrainingRun, source: Path) -> None:
    """Sets the student's weights to those in `source`, of any layout, and resets its optimizer. Collective."""
    student = run.student
    if (source / SHARDS_NAME).is_dir():
        load_shards(student.model, source / SHARDS_NAME, student.groups)
    elif _is_megatron(source):
        load_shards(student.model, MegatronCheckpoint(source).weights, student.groups)
    else:
        load_hf(student.model, HfCheckpoint(source), student.groups)
    student.optimizer.reload_model_params()


def _description(folder: Path) -> ModelFolder | None:
    """Returns the description of a folder with a model; None for a run's shards, or if it is not a model."""
    if (folder / SHARDS_NAME).is_dir():
        return None
    if _is_megatron(folder):
        return MegatronCheckpoint(folder)
    return HfCheckpoint(folder) if (folder / "config.json").exists() else None


def _is_megatron(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).exists()
