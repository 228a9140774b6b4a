"""A plan simulates one rank of each kind for a few micro-batches, and scales these to the step."""

from pathlib import Path

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.machine import Machine
from megatron_tip.planning.passes import OnePass
from megatron_tip.planning.plan import outline_run
from megatron_tip.simulation.assumptions import AssumedSelection, assumed_rollouts
from megatron_tip.simulation.device import find_device
from megatron_tip.simulation.kinds import RankKind, rank_kinds
from megatron_tip.simulation.layers import count_rank
from megatron_tip.simulation.ledger import EXCHANGE
from megatron_tip.simulation.parts import ROWS_RECEIVED, ROWS_SELECTED, ROWS_SENT
from megatron_tip.simulation.plan import as_simulated, make_plan, own_bytes, planned_hosts, shortened
from megatron_tip.simulation.rank import step_batch
from megatron_tip.simulation.timing import PER_TOKEN, STEP_PHASES, message_scale, seconds_of
from tests.helpers.tiny import make_experts, make_llama
from tests.helpers.training import Layout, make_config, make_models

ONE_PASS, TWO_PASSES = OnePass(10**9, 1.0, 1.0), OnePass(0, 0.0, 1.0)
RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"


def kinds_of(config: Config, nodes: int) -> list[RankKind]:
    hosts = planned_hosts(config, nodes, 8)
    outline = outline_run(config, 8 * nodes, Machine(is_elsewhere=True), hosts)
    return rank_kinds(config, outline, step_batch(config, outline, assumed_rollouts(config, longest=True)))


def test_of_the_parts_of_sequences_the_first_is_planned_and_the_one_with_most_rows():
    config = load_config(RECIPE, ["model.context_parallel_size=4", "teacher.context_parallel_size=4"])
    kinds = kinds_of(config, 8)
    assert [(kind.stages, kind.count, kind.rank) for kind in kinds] == [
        ("student whole, teacher whole, first part of each sequence", 16, 0),
        ("student whole, teacher whole, another part of each sequence", 48, 4),
    ], "tp 2: ranks 4 and 5 have the third parts, which have the most rows"


def test_ranks_of_a_large_world_are_of_few_kinds():
    overrides = ["model.pipeline_parallel_size=4", "teacher.pipeline_parallel_size=4", "sglang.gpus=[0,1]"]
    config = load_config(RECIPE, overrides)
    kinds = kinds_of(config, 128)
    assert {(kind.stages, kind.beside): kind.count for kind in kinds} == {
        ("student last, teacher last", "SGLang server"): 64,
        ("student last, teacher last", ""): 192,
        ("student first, teacher first", "SGLang server"): 64,
        ("student first, teacher first", ""): 192,
        ("student middle, teacher middle", "SGLang server"): 128,
        ("student middle, teacher middle", ""): 384,
    }
    assert kinds[0].rank == 768, "the rank that reports the metrics is simulated first"
    assert {kind.rank for kind in kinds} == {768, 770, 0, 2, 256, 258}, "of the middle stages, the earliest ones"


@pytest.mark.parametrize("passes", [ONE_PASS, TWO_PASSES], ids=["one", "two"])
@pytest.mark.timeout(900)
def test_a_few_micro_batches_scaled_to_the_step_cost_what_all_of_them_do(passes: OnePass, tmp_path: Path):
    rollout = {"prompts_per_step": 16, "max_response_tokens": 64}
    config = make_config(
        make_models(tmp_path), Layout(2), rollout=rollout, training={"max_tokens_per_micro_batch": 260}
    )
    outline = outline_run(config, 2, Machine(is_elsewhere=True))
    rollouts = assumed_rollouts(config, longest=True)
    planned = []
    takes_one_pass = passes is ONE_PASS
    short = shortened(config, outline, passes, rollouts, longest=True)
    assert short[2] == takes_one_pass
    for batch, scale, _ in ((step_batch(config, outline, rollouts), 1.0, takes_one_pass), short):
        assumed = AssumedSelection.of(outline.selector, batch, takes_one_pass=takes_one_pass)
        counted = count_rank(config, outline, 0, batch, assumed, by_layers=False)
        seconds = seconds_of(config, outline, find_device("h800"), counted, scale)
        sent = {
            route: messages.num_bytes * message_scale(route, scale)
            for route, messages in counted.account.traffic().items()
            if route.phase in STEP_PHASES
        }
        planned.append((counted.account, scale, own_bytes(config, outline, counted.account, scale), seconds, sent))
    (whole, _, whole_bytes, whole_seconds, whole_sent), (short, scale, short_bytes, short_seconds, short_sent) = planned
    assert short_sent == pytest.approx(whole_sent, rel=0.1)
    assert short_bytes["train"][ROWS_SELECTED] == pytest.approx(whole_bytes["train"][ROWS_SELECTED], rel=0.1)
    for purpose in (ROWS_SENT, ROWS_RECEIVED):
        exchanged = [account.live(EXCHANGE)[purpose] for account in (short, whole)]
        assert scale * exchanged[0] == pytest.approx(exchanged[1], rel=0.1), purpose
    assert scale == 2.0, "2 of 4 micro-batches"
    for phase in STEP_PHASES:
        times = scale if phase in PER_TOKEN else 1
        assert sum(short_bytes[phase].values()) == pytest.approx(sum(whole_bytes[phase].values()), rel=0.1), phase
        assert short.work(phase).matrix_flops * times == pytest.approx(whole.work(phase).matrix_flops, rel=0.02), phase
        assert short_seconds[phase] == pytest.approx(whole_seconds[phase], rel=0.1), phase


@pytest.mark.parametrize(
    "student,teacher,recomputes,has_experts",
    [((2, 1), (1, 1), True, False), ((1, 2), (2, 1), False, False), ((1, 1), (1, 1), True, True)],
    ids=["recomputed", "pipeline", "experts"],
)
@pytest.mark.timeout(900)
def test_models_with_few_layers_tell_the_cost_of_whole_ones(
    student: tuple[int, int], teacher: tuple[int, int], recomputes: bool, has_experts: bool, tmp_path: Path
):
    """Of eight layers, as on a GPU: bytes by phase within 3 %, messages and arithmetic nearly exact."""
    for name, width in (("student", 48), ("teacher", 96)):
        if has_experts:
            make_experts(tmp_path / name, seed=1, hidden_size=width, num_hidden_layers=8)
        else:
            make_llama(tmp_path / name, seed=1, tied=name == "student", hidden_size=width, num_layers=8)
    layout = Layout(2, student, teacher, sequence_parallel=student[0] > 1)
    parts = {"expert_model_parallel_size": 2} if has_experts else {}
    sections = {"model": {"recompute_activations": recomputes} | parts, "training": {"max_tokens_per_micro_batch": 260}}
    config = as_simulated(make_config(tmp_path, layout, rollout={"prompts_per_step": 4}, **sections))
    outline = outline_run(config, 2, Machine(is_elsewhere=True))
    batch = step_batch(config, outline, assumed_rollouts(config, longest=True))
    assumed = AssumedSelection.of(outline.selector, batch, takes_one_pass=False)
    metrics = None
    for kind in rank_kinds(config, outline, batch):
        counted = [
            count_rank(
                config, outline, kind.rank, batch, assumed, metrics=metrics, gpu_memory_bytes=2**36, by_layers=by_layers
            )
            for by_layers in (False, True)
        ]
        metrics = counted[0].metrics
        assert "selection/jaccard_tip_divergence" in metrics, "the ranks' own selections compare the rules"
        whole, few = (one.account for one in counted)
        for phase in STEP_PHASES:
            assert sum(few.live(phase).values()) == pytest.approx(sum(whole.live(phase).values()), rel=0.03), phase
            assert few.work(phase).matrix_flops == pytest.approx(whole.work(phase).matrix_flops), phase
            assert few.work(phase).memory_bytes == pytest.approx(whole.work(phase).memory_bytes, rel=0.01), phase
        bytes_of = [{route: one.num_bytes for route, one in part.traffic().items()} for part in (few, whole)]
        assert bytes_of[0] == pytest.approx(bytes_of[1], rel=0.01)


def test_a_rule_with_further_terms_of_the_loss_is_planned(tmp_path: Path):
    models, device = make_models(tmp_path), find_device("h800")
    flops = {}
    for rule in ("eopd", "full"):
        sections = {"selection": {"rule": rule, "retention_ratio": 1.0, "passes": "two"}}
        config = make_config(models, Layout(2), rollout={"prompts_per_step": 8}, **sections)
        plan = make_plan(config, planned_hosts(config, 1, 2), device, batches=("longest",))
        flops[rule] = plan.ranks[0].flops("train")
    assert flops["eopd"] > 1.01 * flops["full"], "a second divergence of the rows"


def test_one_pass_holds_the_activations_of_a_step_and_saves_a_forward_pass(tmp_path: Path):
    models, device, plans = make_models(tmp_path), find_device("h800"), {}
    for passes in ("one", "two"):
        sections = {"selection": {"passes": passes}, "training": {"max_tokens_per_micro_batch": 260}}
        config = make_config(models, Layout(2), rollout={"prompts_per_step": 16}, **sections)
        plan = make_plan(config, planned_hosts(config, 1, 2), device, batches=("longest",))
        plans[passes] = plan.ranks[0]
    one, two = plans["one"], plans["two"]
    activations = "student: activations"
    assert (one.scale, two.scale) == (2.0, 2.0), "2 of 4 micro-batches"
    assert one.live["score"][activations] > 3 * two.live["score"][activations]
    assert one.live["train"][activations] > 3 * two.live["train"][activations]
    assert one.live["measure"][activations] == pytest.approx(two.live["measure"][activations], rel=0.1)
    assert one.flops("score") == pytest.approx(two.flops("score"), rel=0.01)
    assert one.flops("train") < 0.75 * two.flops("train")
