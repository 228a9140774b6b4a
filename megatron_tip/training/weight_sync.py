"""New weights to whoever generates."""

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.errors import EngineError, PeerError
from megatron_tip.models.student import Student
from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.rollout.engine import RolloutEngine
from megatron_tip.training.run import TrainingRun


def update_engine(run: TrainingRun, *, weight_version: int) -> None:
    """Gives the engine the student's weights. Collective over the world.

    Raises:
        EngineError: the engine did not take them; in the first process.
        PeerError: on all other ranks then, its `cause` "EngineError".
    """
    failure = None
    with run.timer.phase("sync"):
        try:
            sync_weights(run.student, run.architecture, run.engine, weight_version=weight_version)
        except EngineError as error:
            failure = error
        text = broadcast_json(failure and str(failure), source=0, device=run.device)
    if text is not None:
        raise failure or PeerError(f"weight sync: the first process failed with {text}", cause=EngineError.__name__)


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
