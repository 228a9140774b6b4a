"""The engine over several servers: balance, seeds, weight versions and progress, against fakes."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest

from megatron_tip.errors import InputError, ServerMismatchError, ServersLostError, WeightsLostError
from megatron_tip.records import Prompt
from megatron_tip.rollout.ahead import AheadEngine
from megatron_tip.rollout.progress_clock import ProgressClock
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang.weights.broadcast import BroadcastTransport
from tests.helpers.fake_sglang import VOCAB_SIZE, FakeSGLang, StatusError
from tests.helpers.sglang_engine import (
    FAST,
    PROMPTS,
    SAMPLING,
    Cluster,
    VersionTransport,
    assert_complete,
    num_generated,
)


def test_a_quick_server_gets_more_of_a_batch(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    slow, quick = cluster.fakes
    slow.seconds_per_request, quick.seconds_per_request = 0.6, 0.05
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert slow.most_at_once == quick.most_at_once == 3
    counts = [len([body for body in fake.generations() if body.get("stream")]) for fake in cluster.fakes]
    assert sum(counts) == 12
    assert counts[1] > counts[0]


def test_the_bound_holds_on_the_server_that_is_left(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.transport.refuse = {cluster.fakes[0].url}
    cluster.sync()
    cluster.fakes[1].seconds_per_request = 0.1
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert cluster.fakes[1].most_at_once == 3


def test_each_request_goes_where_the_fewest_are_under_way(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=3)
    cluster.sync()
    with ExitStack() as leases:
        servers = [leases.enter_context(cluster.pool.lease("run/0")) for _ in range(6)]
    assert Counter(server.url for server in servers) == {fake.url: 2 for fake in cluster.fakes}


def test_ids_travel_and_text_does_not(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.sync(version=4)
    rollouts = cluster.engine.generate(PROMPTS, SAMPLING)
    assert_complete(rollouts, weight_version=4)
    assert all(rollout.rollout_logprobs == (-1.5,) * 6 for rollout in rollouts)
    sent = Counter(tuple(body["input_ids"]) for body in cluster.fakes[0].generations() if body.get("stream"))
    assert sent == {prompt.prompt_ids: 2 for prompt in PROMPTS}


def test_each_sample_has_a_seed_that_follows_from_the_runs_whoever_takes_it(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()

    def seeds(seed, names=SAMPLING.batch_name):
        before = [len(fake.seen) for fake in cluster.fakes]
        cluster.engine.generate(PROMPTS, replace(SAMPLING, seed=seed, batch_name=names))
        bodies = [body for fake, start in zip(cluster.fakes, before, strict=True) for _, body, _ in fake.seen[start:]]
        return {
            (tuple(body["input_ids"]), body["sampling_params"]["sampling_seed"])
            for body in bodies
            if body and body.get("stream")
        }

    first = seeds(1)
    assert len({seed for _, seed in first}) == 12
    assert seeds(1, "another batch") == first
    assert not seeds(2) & first


def test_without_weights_nothing_is_generated(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    with pytest.raises(WeightsLostError):
        cluster.engine.generate(PROMPTS, SAMPLING)
    cluster.transport.refuse = {fake.url for fake in cluster.fakes}
    cluster.sync()
    with pytest.raises(WeightsLostError):
        cluster.engine.generate(PROMPTS, SAMPLING)
    assert not any(body.get("stream") for fake in cluster.fakes for body in fake.generations())


def test_a_server_that_missed_a_sync_generates_nothing(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    cluster.transport.refuse = {cluster.fakes[0].url}
    cluster.sync(version=1)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=1)
    assert not any(body.get("stream") for body in cluster.fakes[0].generations())


def test_a_router_chooses_while_all_servers_hold_the_weights_and_gets_none_itself(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, with_router=True)
    cluster.sync()
    cluster.router.version = "run/0"  # of the server that it would ask
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert (num_generated(cluster.router), num_generated(*cluster.fakes)) == (12, 0)
    assert {path for path, *_ in cluster.router.seen} == {"/generate"}
    cluster.transport.refuse = {cluster.fakes[0].url}  # a router would not know that it missed a sync
    cluster.sync(version=1)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=1)
    assert (num_generated(cluster.router), num_generated(cluster.fakes[1])) == (12, 12)


def test_the_calls_of_a_batch_of_several_turns_are_counted_together(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1, attempts=1)
    cluster.sync()

    def fail_on_one(number, request, chunks):
        if request["input_ids"] == list(PROMPTS[2].prompt_ids):
            raise StatusError(500)
        return chunks

    cluster.fakes[0].misbehave = fail_on_one
    for name in ("step_000001", "step_000001_call_1", "step_000001_call_2", "step_000002"):
        cluster.engine.generate(PROMPTS, replace(SAMPLING, batch_name=name))
    assert cluster.engine.take_metrics("step_000001")["rollout/num_set_aside"] == 6
    assert cluster.engine.take_metrics("step_000002")["rollout/num_set_aside"] == 2


def test_a_server_of_another_model_is_refused_at_the_start(tmp_path):
    with FakeSGLang(model_type="qwen2") as fake:
        pool = ServerPool(
            [PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE, timeouts=FAST), url=fake.url)],
            PoolSettings(),
            model_type="llama",
        )
        with pytest.raises(ServerMismatchError, match="qwen2"):
            SGLangEngine(pool, VersionTransport(), EngineSettings("run", 3, tmp_path / "x", num_layers=1))


def test_a_layout_that_takes_no_broadcast_is_refused_at_the_start(tmp_path):
    transport = BroadcastTransport(run_id="run", bucket_bytes=8, backend="gloo", device="cpu", timeout_seconds=1.0)
    with FakeSGLang() as fake:
        fake.layout = {"tp_size": 2, "pp_size": 2}
        pool = ServerPool(
            [PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE, timeouts=FAST), url=fake.url)],
            PoolSettings(),
            model_type="llama",
        )
        with pytest.raises(ServerMismatchError, match=r'got 2 stages .* sync.transport = "folder"'):
            SGLangEngine(pool, transport, EngineSettings("run", 3, tmp_path / "x", num_layers=1))


def test_the_probe_asks_every_server_that_holds_the_weights(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=3)
    cluster.sync()
    cluster.fakes[1].whole = lambda body: FakeSGLang.whole(cluster.fakes[1], {"input_ids": [1, 2]})
    cluster.engine.distrust(cluster.fakes[2].url)
    assert cluster.engine.input_logprobs([7, 8, 9]) == {cluster.fakes[0].url: [-2.0, -2.0]}
    assert [server.url for server in cluster.pool.up("run/0")] == [cluster.fakes[0].url]


def test_one_batch_ahead_is_taken_once_and_raises_what_its_generation_raised(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    ahead = AheadEngine(cluster.engine)
    stack.callback(ahead.close)
    ahead.start_next(PROMPTS, SAMPLING)
    ahead.wait()
    sent = sum(len(fake.generations()) for fake in cluster.fakes)
    assert_complete(ahead.generate(PROMPTS, SAMPLING))
    assert sum(len(fake.generations()) for fake in cluster.fakes) == sent
    ahead.start_next([Prompt(0, "", (VOCAB_SIZE,))], SAMPLING)
    ahead.wait()  # raises nothing, whatever went wrong: other ranks wait for the sync that is next
    with pytest.raises(InputError):
        ahead.generate([], SAMPLING)
    for fake in cluster.fakes:
        fake.stop()
    ahead.start_next(PROMPTS, SAMPLING)
    ahead.wait()
    with pytest.raises(ServersLostError):
        ahead.generate(PROMPTS, SAMPLING)


def test_a_batch_shows_how_far_it_is(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(ProgressClock, "is_due", True)
    shown: list[str] = []
    cluster = Cluster(stack, tmp_path, show=shown.append)
    cluster.sync()
    cluster.engine.generate(PROMPTS, SAMPLING)
    assert all("of 12 responses" in text and "tokens/s" in text for text in shown)
    assert any(f"{12 * 6} tokens" in text for text in shown), "the last token of the last response is counted"
