"""The estimate of an intervention, against the tensors that it keeps with tiny models."""

from pathlib import Path

import pytest

from megatron_tip.config import Config
from megatron_tip.diagnostics.bank import ContextBank
from megatron_tip.diagnostics.intervene import estimate_arms, prepare_seed, split_of
from megatron_tip.diagnostics.measure import freeze
from megatron_tip.diagnostics.session import Subject
from megatron_tip.diagnostics.snapshot import StudentStart
from megatron_tip.planning.intervention_memory import KEPT_ROWS, KEPT_START, KEPT_STATISTICS
from megatron_tip.planning.plan import plan_run
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

CONTEXTS = make_rollouts([8] * 8)
SEEDS = 2


def config_of(models: Path, layout: Layout, dtype: str, *, distributed: bool) -> Config:
    return make_config(
        models,
        layout,
        model={"dtype": dtype},
        teacher={"dtype": dtype},
        optimizer={"distributed": distributed},
        rollout={"prompts_per_step": 2, "max_response_tokens": 16},
        heldout={"num_prompts": 2},
        training={"steps": 2, "max_tokens_per_micro_batch": 48},
        selection={"support_size": 8},
        diagnostics={"support_sizes": (4, 8), "seeds": SEEDS},
    )


def kept(config: Config) -> dict[str, int]:
    """Bytes that this rank keeps from arm to arm while the plain distillations last."""
    run = build_tiny_run(config, CONTEXTS)
    bank = ContextBank(Path(), CONTEXTS, {"sha256": ""})
    start = StudentStart(run.student)
    states = [prepare_seed(run, bank, split_of(config, bank, seed)) for seed in range(1, SEEDS + 1)]
    frozen = [part for state in states for part in (*state.steps, state.heldout)] + [freeze(run, CONTEXTS)]
    rows = [part.teacher_rows.states for part in frozen if part.teacher_rows is not None]  # type: ignore[attr-defined]
    statistics = [by_size for state in states for by_step in state.statistics for by_size in by_step.values()]
    return {
        KEPT_START: sum(tensor.nbytes for tensor in start._weights),
        KEPT_ROWS: sum(tensor.nbytes for tensor in rows),
        KEPT_STATISTICS: sum(
            value.nbytes for found in statistics for value in vars(found).values() if value is not None
        ),
    }


@pytest.mark.parametrize(
    "layout, dtype, distributed",
    [
        (Layout(1), "float32", False),
        (Layout(1), "bfloat16", False),
        (Layout(2, student=(2, 1)), "float32", False),
        (Layout(2), "bfloat16", True),
    ],
    ids=str,
)
def test_what_is_kept_is_what_was_estimated(tmp_path: Path, layout: Layout, dtype: str, distributed: bool):
    config = config_of(make_models(tmp_path), layout, dtype, distributed=distributed)
    bank = ContextBank(Path(), CONTEXTS, {"sha256": ""})
    subject = Subject(plan_run(config, layout.world_size), bank, None, "", "")
    estimate = estimate_arms(config, subject, memory_gib=1.0, on_gpu=False)
    ranks = run_workers(kept, layout.world_size, tmp_path, config, timeout_seconds=300.0)
    for name, expected in estimate.phases["train"].items():
        if name in ranks[0]:
            found = sum(rank[name] for rank in ranks) / len(ranks)  # replicas may share unequally
            assert found == pytest.approx(expected, rel=0.3 if name == KEPT_STATISTICS else 1e-6), name
    assert set(ranks[0]) < set(estimate.phases["train"])


def test_an_intervention_needs_no_engine_and_no_checkpoint(tmp_path: Path):
    config = config_of(make_models(tmp_path), Layout(1), "float32", distributed=False)
    subject = Subject(plan_run(config, 1), ContextBank(Path(), CONTEXTS, {"sha256": ""}), None, "", "")
    estimate = estimate_arms(config, subject, memory_gib=1.0, on_gpu=False)
    assert set(estimate.phases) == {"ask", "score", "train", "update"}
    assert not [name for name in estimate.parts if "engine" in name or "SGLang" in name]
    more = config.model_copy(update={"diagnostics": config.diagnostics.model_copy(update={"seeds": 3})})
    assert estimate_arms(more, subject, memory_gib=1.0, on_gpu=False).parts[KEPT_ROWS] > estimate.parts[KEPT_ROWS]
