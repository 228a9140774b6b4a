"""A checked run in a few lines: its models, their layout, what it learns from and where it writes."""

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.models import FoundModel
from megatron_tip.planning.plan import Outline
from megatron_tip.prompts.source import fewer_than_a_step


def description_of(config: Config, outline: Outline) -> list[str]:
    """Returns the lines: student, teacher, what is learned, prompts if their file was read, folder."""
    on_gpu = bool(outline.placement.hosts.gpus)
    dtypes = Dtypes.of(config, on_gpu=on_gpu)
    teacher = f"{config.teacher.path.name}, behind servers"
    if outline.teacher is not None:
        teacher = _model(config.teacher.path.name, outline.teacher, outline.teacher_grid, str(dtypes.teacher))
    rule = outline.selector.active_rule.name
    return [
        f"student: {_model(config.model.path.name, outline.student, outline.student_grid, str(dtypes.student))}",
        f"teacher: {teacher}",
        f"{config.training.steps} steps of {config.rollout.prompts_per_step} prompts x "
        f"{config.rollout.samples_per_prompt} responses; {outline.selector.asked_share:.0%} of their tokens by rule "
        f"{rule}; {config.loss.divergence}; rollouts: {config.rollout.engine}",
        *_prompts(config, outline),
        f"folder: {config.run.folder}",
    ]


def parameters_in_words(architecture: ModelArchitecture) -> str:
    """Returns the number of parameters; with experts, also of those that each token passes through."""
    every, active = (_in_words(num_parameters(architecture, active=active)) for active in (False, True))
    return f"{every} parameters" + (f", {active} of them active" if architecture.experts else "")


def _in_words(count: int) -> str:
    size = count / 1e6
    return f"{size:.0f} M" if size < 1000 else f"{size / 1000:.1f} B"


def _model(name: str, model: FoundModel, grid: ModelGrid, dtype: str) -> str:
    return (
        f"{name}, {model.architecture.num_layers} layers, {parameters_in_words(model.architecture)}, "
        f"{dtype.removeprefix('torch.')}, {grid.in_words()}"
    )


def _prompts(config: Config, outline: Outline) -> list[str]:
    """Returns what is known of the prompts before they are tokenised."""
    if outline.prompts is None:
        return []
    distinct = len(outline.prompts.rows)
    left, per_step = distinct - config.heldout.num_prompts, config.rollout.prompts_per_step
    lines = [f"prompts: {config.prompts.path}, {distinct} distinct, {config.heldout.num_prompts} of them held out"]
    return [*lines, fewer_than_a_step(left, per_step)] if left < per_step else lines
