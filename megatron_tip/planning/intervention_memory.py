"""The memory of `diagnose intervene`: a training step's, and what an intervention keeps from arm to arm."""

from dataclasses import dataclass

from megatron_tip.config import Config
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.memory_estimate import MemoryEstimate, estimate_memory
from megatron_tip.planning.plan import Outline
from megatron_tip.statistics import STATISTICS

_PHASES = ("ask", "score", "train", "update")
_FLOAT32 = 4
KEPT_START = "the start: weights, and their float32 copies"
KEPT_ROWS = "contexts: the teacher's hidden states"
KEPT_STATISTICS = "contexts: the start's statistics"


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of all replicas whose teacher's output is kept.

    `by_seed`: of all seeds' contexts, trained on and held out. `trained`: those of them that are trained on. `bank`: of
    the whole bank, until every plain distillation is done.
    """

    by_seed: int
    trained: int
    bank: int


def estimate_intervention(
    config: Config, outline: Outline, kept: KeptTokens, *, memory_gib: float, on_gpu: bool
) -> MemoryEstimate:
    """Returns the estimate of the rank that needs the most, in the phases of an arm's step.

    Args:
        memory_gib: of each rank's device; a tenth is set aside.
    """
    assert outline.teacher is not None, "a served teacher is refused"
    dtypes, dp_size = Dtypes.of(config, on_gpu=on_gpu), outline.student_grid.dp_size * outline.student_grid.cp_size
    two = config.selection.model_copy(update={"passes": "two"})
    config = config.model_copy(update={"selection": two})
    step = estimate_memory(config, outline, gpu_memory_gib=memory_gib, on_gpu=on_gpu)
    row = outline.teacher.architecture.hidden_size * dtypes.teacher.itemsize
    num_columns = len(STATISTICS) * len({config.selection.support_size, *config.diagnostics.support_sizes})
    weights = step.parts["student: weights"]
    copies = _FLOAT32 / dtypes.student.itemsize / (dp_size if config.optimizer.distributed else 1)
    always = {
        KEPT_START: weights * (1 + copies * (dtypes.student.itemsize < _FLOAT32)),
        KEPT_ROWS: row * (kept.by_seed + kept.bank) / dp_size,
        KEPT_STATISTICS: float(_FLOAT32 * num_columns * kept.trained / dp_size),
    }
    sent = {"teacher: hidden states to send": row * kept.bank / outline.teacher_grid.dp_size}
    phases = {name: _of_a_step(step.phases[name]) | always for name in _PHASES}
    phases["ask"] |= sent
    return MemoryEstimate(phases, step.host_bytes, held_tokens=0, held_total_bytes=0.0)


def _of_a_step(parts: dict[str, float]) -> dict[str, float]:
    """Returns the parts that an arm's step has too: no engine, no servers, and no rows of its own."""
    left_out = ("embedded engine", "SGLang", "teacher: hidden states")
    selected = "the selected"
    return {name: value for name, value in parts.items() if selected in name or not name.startswith(left_out)}
