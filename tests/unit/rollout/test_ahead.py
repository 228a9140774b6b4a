import threading

import pytest

from megatron_tip.records import Prompt
from megatron_tip.rollout.ahead import AheadEngine
from megatron_tip.rollout.engine import RolloutEngine, SamplingParams

SAMPLING = SamplingParams(6, 1.0, 1.0, samples_per_prompt=1, stop_token_ids=(2,), seed=1)
PROMPTS = [Prompt(3, "three", (1, 4))]


class SlowEngine(RolloutEngine):
    """Generates until it is released; notes what it did."""

    def __init__(self):
        self.release = threading.Event()
        self.done = []

    def generate(self, prompts, sampling):
        assert self.release.wait(30)
        self.done.append(sampling.batch_name)
        return list(prompts)

    def update_weights(self, weights, weight_version):
        self.done.append(("sync", weight_version, list(weights)))

    def input_logprobs(self, input_ids):
        return {"server": [-1.0]}

    def distrust(self, url):
        self.done.append(("distrust", url))

    def take_metrics(self, batch_name):
        return {batch_name: 1.0}

    def close(self):
        self.done.append("close")


@pytest.fixture
def inner():
    return SlowEngine()


@pytest.fixture
def ahead(inner):
    engine = AheadEngine(inner)
    yield engine
    inner.release.set()
    engine.close()


def test_weights_wait_for_the_batch_under_way(inner, ahead):
    ahead.start_next(PROMPTS, SAMPLING.for_step(1))
    threading.Timer(0.2, inner.release.set).start()
    ahead.update_weights([("a", None)], 7)
    assert inner.done == ["step_000001", ("sync", 7, [("a", None)])]


def test_the_batch_begun_is_taken_once_and_others_are_generated_now(inner, ahead):
    inner.release.set()
    ahead.start_next(PROMPTS, SAMPLING.for_step(2))
    ahead.wait()
    assert ahead.generate(PROMPTS, SAMPLING.for_heldout(1)) == PROMPTS
    assert inner.done == ["step_000002", "heldout_000001"]
    assert ahead.generate([], SAMPLING.for_step(2)) == PROMPTS
    assert inner.done == ["step_000002", "heldout_000001"]
    assert ahead.generate([], SAMPLING.for_step(2)) == []


def test_a_batch_that_nobody_took_is_not_passed_over(inner, ahead):
    inner.release.set()
    ahead.start_next(PROMPTS, SAMPLING.for_step(1))
    with pytest.raises(AssertionError, match="step_000001 has not been collected"):
        ahead.start_next(PROMPTS, SAMPLING.for_step(2))


def test_the_rest_is_the_engines_own(inner, ahead):
    assert ahead.input_logprobs([1, 2]) == {"server": [-1.0]}
    assert ahead.take_metrics("step_000001") == {"step_000001": 1.0}
    ahead.distrust("server")
    ahead.close()
    assert inner.done == [("distrust", "server"), "close"]
