"""Scores and interventions are the same on every layout, those of a float64 single process, and free of each other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.config import Config
from megatron_tip.diagnostics.arms import Arm, ArmResult
from megatron_tip.diagnostics.bank import ContextBank
from megatron_tip.diagnostics.gauge import BankGauge
from megatron_tip.diagnostics.intervene import prepare_seed, run_arm, split_of
from megatron_tip.diagnostics.measure import freeze, score_contexts
from megatron_tip.diagnostics.snapshot import StudentStart
from megatron_tip.errors import InputError
from megatron_tip.records import Rollout
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

CONTEXTS = make_rollouts([12, 7, 15, 9, 1, 11, 8, 10])
CONTEXTS[2] = replace(CONTEXTS[2], environment_spans=((3, 6),))
SIZES = (4, 8)
ARMS = [Arm("ta_opd_teachability", 0.1, 4, 1), Arm("full", 1.0, 8, 1), Arm("random", 0.1, 8, 1)]
LAYOUTS = [
    Layout(2, student=(1, 1)),  # dp 2
    Layout(2, student=(2, 1), sequence_parallel=True),
    Layout(4, student=(2, 2), teacher=(4, 1)),
    Layout(4, student=(1, 2), teacher=(1, 1), cp=(2, 4)),
]


@dataclass(frozen=True)
class Observed:
    """Scores of the whole bank, and what became of ARMS and then of the first arm again."""

    columns: dict[str, np.ndarray]
    results: list[ArmResult]


def observe(config: Config, contexts: list[Rollout]) -> Observed:
    run = build_tiny_run(config, contexts)
    bank = ContextBank(Path(), contexts, {"sha256": ""})
    columns = score_contexts(run, freeze(run, contexts), SIZES)
    start = StudentStart(run.student)
    state = prepare_seed(run, bank, split_of(config, bank, 1))
    results = [run_arm(run, start, state, arm) for arm in [*ARMS, ARMS[0]]]
    return Observed({name: values.numpy() for name, values in columns.items()}, results)


def config_of(models: Path, layout: Layout, **sections: dict[str, Any]) -> Config:
    return make_config(
        models,
        layout,
        **sections,
        rollout={"prompts_per_step": 2, "max_response_tokens": 16},
        heldout={"num_prompts": 3},
        training={"steps": 2, "max_tokens_per_micro_batch": 48},
        selection={"support_size": 8, "tie_break": "random"},
        diagnostics={"support_sizes": SIZES, "bank": models / "bank", "every_steps": 1},
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    (folder / "bank").touch()  # the plan asks whether it exists; the tests pass the contexts themselves
    return folder


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return run_workers(observe, 1, tmp_path_factory.mktemp("single"), config_of(models, Layout(1)), CONTEXTS)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_and_arms_are_those_of_a_single_process(models, single, layout, tmp_path):
    ranks: list[Observed] = run_workers(observe, layout.world_size, tmp_path, config_of(models, layout), CONTEXTS)
    for observed in ranks:
        for name, expected in single.columns.items():
            np.testing.assert_allclose(observed.columns[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)
        for result, expected in zip(observed.results, single.results, strict=True):
            assert (result.num_valid, result.num_selected) == (expected.num_valid, expected.num_selected)
            np.testing.assert_allclose(result.before, expected.before, rtol=1e-4)
            # Adam divides by the gradient's own size: rounding counts where a gradient is about zero
            np.testing.assert_allclose(result.after, expected.after, rtol=2e-2)


def test_every_arm_begins_from_the_same_start(single):
    first, _, _, again = single.results
    assert first.after == again.after
    assert first.before == again.before
    assert len({tuple(result.after) for result in single.results}) == len(ARMS)


def test_the_start_is_restored_with_a_distributed_optimizer_in_bfloat16(models, tmp_path):
    """The optimizer steps float32 copies of the weights there, and each replica holds a part of them."""
    config = config_of(models, Layout(2), optimizer={"lr": 1e-2, "distributed": True}, model={"dtype": "bfloat16"})
    for observed in run_workers(observe, 2, tmp_path, config, CONTEXTS):
        first, _, _, again = observed.results
        assert first.after == again.after
        assert first.after != first.before


def test_an_arm_trains_on_an_exact_budget_and_measures_elsewhere(models, single):
    for result in single.results:
        steps = [[CONTEXTS[place].num_generated for place in step] for step in _steps(models)]
        ratio = result.arm.retention_ratio
        assert result.num_valid == sum(map(sum, steps))
        assert result.num_selected == sum(int(np.ceil(ratio * sum(step) - 1e-9)) for step in steps)
        assert not set(result.contexts) & set(result.trained_contexts)
        assert result.num_tokens == [CONTEXTS[place].num_generated for place in result.contexts]
    assert single.results[1].gain > 0  # all tokens teach


def _steps(models: Path) -> list[list[int]]:
    return split_of(config_of(models, Layout(1)), ContextBank(Path(), CONTEXTS, {}), 1).steps


def test_scores_are_the_formulas_in_float64(models, single):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    )
    expected: dict[str, list[float]] = {
        "forward_kl": [],
        "student_entropy": [],
        "compatibility_k4": [],
        "teacher_logprobs": [],
    }
    for context in CONTEXTS:
        ids = torch.tensor([context.prompt_ids + context.response_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0].log_softmax(-1) for model in (student, teacher))
        for position, token in enumerate(context.response_ids):
            if any(start <= position < end for start, end in context.environment_spans):
                continue
            row = len(context.prompt_ids) + position - 1
            expected["forward_kl"].append(float((q[row].exp() * (q[row] - p[row])).sum()))
            expected["student_entropy"].append(float(-(p[row].exp() * p[row]).sum()))
            expected["compatibility_k4"].append(float(q[row][p[row].topk(4).indices].exp().sum()))
            expected["teacher_logprobs"].append(float(q[row][token]))
    for name, values in expected.items():
        np.testing.assert_allclose(single.columns[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def observe_gauge(config: Config, contexts: list[Rollout], start: Path) -> list[dict[str, float] | str]:
    """The metrics of a run from its start on; those of the run continued; what another teacher's start is answered."""
    run = build_tiny_run(config, contexts)
    bank = ContextBank(Path(), contexts, {"sha256": "bank"})
    gauge = BankGauge(run, bank, start, teacher="t")
    seen: list[dict[str, float] | str] = [gauge(0)]
    with torch.no_grad():
        for parameter in run.student.model.parameters():
            parameter.mul_(1.1)
    seen.append(gauge(2))
    seen.append(BankGauge(run, bank, start, teacher="t")(2))
    try:
        BankGauge(run, bank, start, teacher="other")
    except InputError as error:
        seen.append(str(error))
    return seen


def test_a_continued_run_measures_against_the_same_start_and_no_other(models, tmp_path):
    """One rank alone needs to see the file, and all end alike over one that was measured otherwise."""
    config = config_of(models, Layout(2))
    start = tmp_path / "start.parquet"
    ranks = run_workers(observe_gauge, 2, tmp_path, config, CONTEXTS, start)
    for first, later, continued, refused in ranks:
        assert first["diagnostics/gain"] == 0
        assert later["diagnostics/gain"] != 0
        assert continued == later
        assert "teacher 'other', got 't'" in refused
    assert ranks[0] == ranks[1]


class Phases:
    """A stand-in for `DeviceMemory` that records what is asked of it."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def enter(self, phase: str, engine: object) -> None:
        self.entered += [phase] if self.entered[-1:] != [phase] else []


def phases_of_an_arm(config: Config) -> list[str]:
    memory = Phases()
    run = replace(build_tiny_run(config, CONTEXTS), memory=memory)  # type: ignore[arg-type]
    bank = ContextBank(Path(), CONTEXTS, {"sha256": ""})
    start = StudentStart(run.student)
    run_arm(run, start, prepare_seed(run, bank, split_of(config, bank, 1)), ARMS[0])
    return memory.entered


def test_an_arm_has_on_the_device_what_it_computes_with(models, tmp_path):
    """With training.offload, parts are elsewhere until the phase that needs them is entered."""
    entered = run_workers(phases_of_an_arm, 1, tmp_path, config_of(models, Layout(1)))[0]
    assert entered == ["measure", "train", "update", "train", "update", "score"]
