"""The number of layers of each pipeline stage, balanced by their work."""

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import forward_flops, head_flops


def pipeline_layers(
    config: Config, own: ModelArchitecture, teacher: ModelArchitecture | None, section: str
) -> tuple[int, ...]:
    """Returns the number of layers of each stage of the student ("model") or the teacher; empty: equally many.

    Args:
        own: the architecture of the section's model. teacher: None behind servers.
    """
    settings = config.model if section == "model" else config.teacher
    if settings.pipeline_layers != "auto":
        return settings.pipeline_layers
    head = head_in_layers(config, own, teacher) if section == "model" else 0.0
    return balanced_layers(own.num_layers, settings.pipeline_parallel_size, head)


def head_in_layers(config: Config, student: ModelArchitecture, teacher: ModelArchitecture | None) -> float:
    """Returns the work of both output heads in a step, in layers of the student.

    Every token is scored by one forward pass of the layers and both heads. Training passes it through the layers three
    times more (four with recomputation), and the selected ones through the student's head three times and the
    teacher's once. As if all tokens were generated, and without the attention's part that grows with length.
    """
    ratio = config.selection.retention_ratio
    heads = (1 + 3 * ratio) * head_flops(student, num_rows=1)
    if teacher is not None:
        heads += (1 + ratio) * head_flops(teacher, num_rows=1)
    passes = 5 if config.model.recompute_activations else 4
    return heads / (passes * forward_flops(student, num_tokens=1, mean_length=0) / student.num_layers)


def balanced_layers(num_layers: int, num_stages: int, extra: float) -> tuple[int, ...]:
    """Returns the numbers of layers with the least work on the stage that has the most; every stage has a layer.

    The first stages have the fewest of the others' layers, because they keep the most micro-batches.

    Args:
        extra: work of the last stage besides its layers, in layers.
    """
    if num_stages == 1 or num_layers < num_stages:  # the second is refused where the layout is checked
        return ()
    others = num_stages - 1

    def rank(last: int) -> tuple[float, int]:
        return max(-(-(num_layers - last) // others), last + extra), -last

    last = min(range(1, num_layers - others + 1), key=rank)
    each, rest = divmod(num_layers - last, others)
    return (*[each] * (others - rest), *[each + 1] * rest, last)
