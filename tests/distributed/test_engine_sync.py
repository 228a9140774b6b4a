"""The student's probe, verified syncs and repaired ones, over several ranks and layouts."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_tip.errors import EngineError, OutputError, ServersLostError, WeightsLostError
from megatron_tip.rollout.engine import RolloutEngine
from megatron_tip.training.probe import probe_ids, probe_logprobs
from megatron_tip.training.rollouts import generate_rollouts
from megatron_tip.training.weight_sync import median_gap, sync_engine, tolerance_of
from tests.helpers.distributed import run_workers
from tests.helpers.training import (
    Layout,
    build_tiny_run,
    engine_of,
    make_config,
    make_models,
    make_rollouts,
    with_source,
)

LAYOUTS = [
    Layout(1),
    Layout(2, student=(2, 1)),
    Layout(2, student=(1, 2)),
    Layout(4, student=(2, 2), sequence_parallel=True),
    Layout(2, student=(1, 1)),  # two replicas
    Layout(4, student=(1, 2), cp=(2, 2)),
]
SERVED = {"rollout": {"engine": "sglang", "server_urls": ("http://nobody",)}, "sync": {"verify": "always"}}


class ServedFake(RolloutEngine):
    """Stands in for servers. `wrong_syncs`: syncs from the first on after which the logprobs are off by 1.

    `lost`: calls of generate, from the first on, that find the weights lost. `gone`: what finds no server any more.
    """

    def __init__(self, run, rollouts, *, wrong_syncs=0, lost=0, gone=""):
        self.run, self.rollouts = run, rollouts
        self.wrong_syncs, self.lost = wrong_syncs, lost
        self.gone = gone
        self.versions, self.distrusted = [], []
        self.truth = None

    def generate(self, prompts, sampling):
        if self.gone == "generate":
            raise ServersLostError("all gone")
        if self.lost:
            self.lost -= 1
            raise WeightsLostError("lost")
        return self.rollouts

    def update_weights(self, weights, weight_version):
        for _ in weights:
            pass
        if self.gone == "sync":
            raise ServersLostError("all gone")
        if self.gone == "disk":
            raise OutputError("the shared folder is full")
        self.versions.append(weight_version)

    def input_logprobs(self, input_ids):
        shift = 1.0 if len(self.versions) <= self.wrong_syncs else 0.0
        return {"good": list(self.truth), "bad": [value + shift for value in self.truth]}

    def distrust(self, url):
        self.distrusted.append(url)


def served_run(folder, layout, **fake):
    config = make_config(folder, layout, **SERVED)
    embedded = make_config(folder, layout)
    run = replace(build_tiny_run(embedded, []), config=config)
    return with_source(run, ServedFake(run, make_rollouts([3, 4]), **fake))


def probe_of(folder, layout):
    run = build_tiny_run(make_config(folder, layout), [])
    return probe_logprobs(run.student, run.architecture.vocab_size, run.device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_probe_is_the_students_own_logprobs_on_the_first_rank(tmp_path, layout):
    folder = make_models(tmp_path)
    found, *others = run_workers(probe_of, layout.world_size, tmp_path, folder, layout)
    ids = probe_ids(307)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logprobs[place, ids[place + 1]].item() for place in range(len(ids) - 1)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-5, rtol=0)
    assert others == [[]] * len(others)


def synced(folder, layout, wrong_syncs):
    run = served_run(folder, layout, wrong_syncs=wrong_syncs)
    truth = probe_logprobs(run.student, run.architecture.vocab_size, run.device)
    engine = engine_of(run)
    if engine is not None:
        engine.truth = truth
    try:
        measured = sync_engine(run, weight_version=5)
    except EngineError as error:
        measured = str(error)
    return measured, (engine.versions, engine.distrusted) if engine is not None else None


@pytest.mark.parametrize("wrong_syncs", [0, 1, 2])
def test_a_server_whose_logprobs_differ_is_synced_once_more(tmp_path, wrong_syncs):
    layout = Layout(2, student=(2, 1))
    results = run_workers(synced, 2, tmp_path, make_models(tmp_path), layout, wrong_syncs)
    (versions, distrusted) = results[0][1]
    assert versions == [5] * min(wrong_syncs + 1, 2)
    assert distrusted == ["bad"] * wrong_syncs
    for measured, _ in results:  # every rank comes to the same end
        if wrong_syncs < 2:
            assert measured == {"sync/probe_gap": 0.0}
        else:
            assert "'bad': 1.0" in measured


def generated(folder, layout, lost):
    run = served_run(folder, layout, lost=lost)
    run = replace(run, config=make_config(folder, layout, **{**SERVED, "sync": {"verify": "never"}}))
    rollouts = generate_rollouts(run, [], run.sampling.for_step(3), weight_version=2)
    return rollouts, engine_of(run).versions if dist.get_rank() == 0 else None


def test_lost_weights_are_synced_again_by_all_ranks_before_generation_goes_on(tmp_path):
    layout = Layout(2, student=(1, 2))
    (rollouts, versions), (received, _) = run_workers(generated, 2, tmp_path, make_models(tmp_path), layout, 2)
    assert versions == [2, 2]
    assert rollouts == received == make_rollouts([3, 4])


def error_of(folder, layout, gone):
    run = served_run(folder, layout, gone=gone)
    try:
        if gone == "sync":
            sync_engine(run, weight_version=1)
        else:
            generate_rollouts(run, [], run.sampling.for_step(1), weight_version=0)
    except ServersLostError as error:
        return str(error)
    return None


def sync_failure(folder, layout):
    run = served_run(folder, layout, gone="disk")
    with pytest.raises(OutputError) as caught:
        sync_engine(run, weight_version=1)
    return str(caught.value)


def test_a_full_shared_folder_is_the_same_error_on_every_rank(tmp_path):
    layout = Layout(2, student=(2, 1))
    messages = run_workers(sync_failure, 2, tmp_path, make_models(tmp_path), layout)
    assert messages == ["the shared folder is full"] * 2


def test_the_probe_in_bfloat16_passes_rounding_and_notices_a_wrong_layer(tmp_path):
    """The logprobs are those of SmolLM2-135M-Instruct: their spread, and what rounding and a wrong layer change."""
    config = make_config(tmp_path, LAYOUTS[0], **{**SERVED, "rollout": {**SERVED["rollout"], "dtype": "bfloat16"}})
    generator = torch.Generator().manual_seed(0)
    expected = (-14.0 + 3.0 * torch.randn(47, generator=generator)).tolist()
    tolerance = tolerance_of(config, torch.device("cpu"), expected)
    for scale, is_wrong in ((0.1, False), (0.6, True)):
        found = [value + scale * torch.randn((), generator=generator).item() for value in expected]
        found[3] += 4.0  # one position of huge activations, where rounding alone changes nats
        assert (median_gap(found, expected) > tolerance) == is_wrong


def test_the_probe_in_float32_allows_no_more_than_summation_order(tmp_path):
    config = make_config(tmp_path, LAYOUTS[0], **SERVED)
    assert tolerance_of(config, torch.device("cpu"), [-1.0, -2.0]) == 1e-4
    config = make_config(tmp_path, LAYOUTS[0], **{**SERVED, "sync": {"tolerance": 0.3}})
    assert tolerance_of(config, torch.device("cpu"), [-1.0, -2.0]) == 0.3


@pytest.mark.parametrize("place", [0, 2])
def test_a_gap_that_is_no_number_is_within_no_tolerance(place):
    found = [0.0, 0.0, 0.0]
    found[place] = float("nan")
    assert not median_gap(found, [0.0, 0.0, 0.0]) <= 1e9


@pytest.mark.parametrize("gone", ["sync", "generate"])
def test_servers_that_are_gone_are_the_same_error_on_every_rank(tmp_path, gone):
    layout = Layout(2, student=(2, 1))
    errors = run_workers(error_of, 2, tmp_path, make_models(tmp_path), layout, gone)
    assert all(error is not None and "all gone" in error for error in errors), errors
