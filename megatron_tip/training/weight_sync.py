"""New weights to whoever generates."""

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.models.student import Student
from megatron_tip.rollout.engine import RolloutEngine


def sync_weights(
    student: Student, architecture: ModelArchitecture, engine: RolloutEngine | None, *, weight_version: int
) -> None:
    """Streams the student's weights to the engine, one Hugging Face tensor at a time.

    Collective over the tp x pp ranks of replica 0; other replicas hold the same weights and return at once. `engine`
    lives in the first process of the world, a rank of replica 0; None elsewhere.
    """
    if student.groups.dp_rank != 0:
        return
    stream = export_hf(student.model, architecture, student.groups)
    if engine is not None:
        engine.update_weights(stream, weight_version)
    else:
        for _ in stream:
            pass
