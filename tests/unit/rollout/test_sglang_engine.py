"""The engine over several servers: balance, faults and weight versions, against fakes that die, lie and come back."""

import json
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest

from megatron_tip.errors import EngineError, InputError, ServerMismatchError, ServersLostError, WeightsLostError
from megatron_tip.records import Prompt
from megatron_tip.rollout import sglang_jobs
from megatron_tip.rollout.ahead import AheadGenerator
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.sglang_client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang_engine import EngineSettings, SGLangEngine
from megatron_tip.rollout.sglang_jobs import ProgressClock
from megatron_tip.rollout.sglang_pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.weight_broadcast import BroadcastTransport
from tests.helpers.fake_sglang import VOCAB_SIZE, CutError, FakeSGLang, StatusError
from tests.helpers.processes import wait_until

FAST = Timeouts(connect=1.0, silence=1.0, control=1.0, retries=0, back_off=0.01)
SAMPLING = SamplingParams(6, 1.0, 1.0, samples_per_prompt=2, stop_token_ids=(2,), seed=1, batch_name="step_000001")
PROMPTS = [Prompt(10 * place, f"prompt {place}", (1, 4 + place)) for place in range(6)]


class VersionTransport:
    """Brings no tensors, but tells servers their version; `refuse` names those that do not take it."""

    def __init__(self):
        self.num_bytes = 0
        self.refuse = set()
        self.num_syncs = 0
        self.version = None
        self.keeps = False

    def send(self, servers, weights, version):
        self.num_syncs += 1
        self.version = version
        taken = [server for server in servers if server.url not in self.refuse]
        for server in taken:
            server.http.weights_endpoint("update_weight_version", {"new_version": version})
        next(iter(weights))  # and leaves the rest of the stream to its caller
        return taken

    def check(self, server):
        pass

    def refresh(self, server):
        if not self.keeps or self.version is None:
            return None
        server.http.weights_endpoint("update_weight_version", {"new_version": self.version})
        return self.version

    def close(self):
        pass


class Cluster:
    def __init__(self, stack, tmp_path, num_servers=2, **settings):
        self.fakes = [stack.enter_context(FakeSGLang()) for _ in range(num_servers)]
        self.transport = VersionTransport()
        self.set_aside_path = tmp_path / "set_aside.jsonl"
        values = {"concurrency": 3, "heartbeat": 0.05, "heartbeat_timeout": 0.5, "missed_heartbeats": 2, "wait": 1.0}
        engine_values = {name: settings.pop(name) for name in ("attempts", "drop_wrong_version") if name in settings}

        def connect(url):
            return SGLangClient(url, vocab_size=VOCAB_SIZE, timeouts=FAST)

        servers = [PooledServer(connect, url=fake.url) for fake in self.fakes]
        self.router = stack.enter_context(FakeSGLang()) if settings.pop("with_router", False) else None
        router = connect(self.router.url) if self.router else None
        self.pool = ServerPool(servers, PoolSettings(**values | settings), model_type="llama", router=router)
        self.engine = SGLangEngine(
            self.pool,
            self.transport,
            EngineSettings("run", engine_values.pop("attempts", 3), self.set_aside_path, **engine_values),
        )
        stack.callback(self.engine.close)

    def sync(self, version=0):
        stream = iter([("a", None), ("b", None)])
        self.engine.update_weights(stream, version)
        assert next(stream, None) is None, "the stream was not consumed to its end"


@pytest.fixture
def stack():
    with ExitStack() as one:
        yield one


def assert_complete(rollouts, prompts=PROMPTS, samples=2, weight_version=0):
    expected = [(prompt.index, sample, prompt.prompt_ids) for prompt in prompts for sample in range(samples)]
    assert [(r.prompt_index, r.sample_index, r.prompt_ids) for r in rollouts] == expected
    assert {r.weight_version for r in rollouts} == {weight_version}
    assert {len(r.response_ids) for r in rollouts} == {6}


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


def test_syncs_that_reach_nobody_end_the_run(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.transport.refuse = {fake.url for fake in cluster.fakes}
    for version in range(3):
        cluster.sync(version)
    with pytest.raises(ServersLostError, match="reached no server"):
        cluster.sync(3)


def num_generated(*fakes):
    return sum(bool(body.get("stream")) for fake in fakes for body in fake.generations())


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


@pytest.mark.parametrize("fault", ["dead", "another trainer"])
def test_what_fails_by_way_of_the_router_is_asked_of_the_servers_themselves(stack, tmp_path, fault):
    cluster = Cluster(stack, tmp_path, with_router=True)
    cluster.sync()
    if fault == "dead":
        cluster.router.stop()
    else:
        cluster.router.version = cluster.fakes[0].version = "another-run/0"
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert cluster.pool.num_lost == 0
    holding = [server.url for server in cluster.pool.up("run/0")]
    assert holding == [fake.url for fake in cluster.fakes[0 if fault == "dead" else 1 :]]


def test_what_a_dying_server_leaves_is_generated_elsewhere_exactly_once(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    dying, other = cluster.fakes

    def die(number, request, chunks):
        threading.Thread(target=dying.stop).start()
        raise CutError(chunks[:1])

    dying.misbehave = die
    other.seconds_per_request = 0.05
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    metrics = cluster.engine.take_metrics(SAMPLING.batch_name)
    assert metrics["rollout/num_repeated"] >= 1
    assert metrics["rollout/num_set_aside"] == 0
    wait_until(lambda: cluster.engine.take_metrics(SAMPLING.batch_name)["servers/num_lost"] == 1)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_server_that_comes_back_generates_once_it_has_the_weights(stack, tmp_path, keeps):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.transport.keeps = keeps
    cluster.sync(version=2)
    cluster.fakes[0].stop()
    wait_until(lambda: not cluster.pool.up())
    cluster.fakes[0].come_back()
    wait_until(lambda: bool(cluster.pool.up()))
    if not keeps:
        with pytest.raises(WeightsLostError):
            cluster.engine.generate(PROMPTS, SAMPLING)
        cluster.sync(version=2)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=2)


def test_a_server_that_was_only_cut_off_needs_no_sync(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.sync(version=2)
    cluster.fakes[0].stop()
    wait_until(lambda: not cluster.pool.up())
    cluster.fakes[0].come_back(with_weights=True)
    wait_until(lambda: bool(cluster.pool.up()))
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=2)
    assert cluster.transport.num_syncs == 1


def test_generation_goes_on_where_it_was_when_the_weights_are_back(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1, concurrency=1)
    cluster.sync()
    fake = cluster.fakes[0]

    def forget(number, request, chunks):
        if number == 7:
            fake.version = "default"
            return fake.chunks(request, number)
        return chunks

    fake.misbehave = forget
    with pytest.raises(WeightsLostError):
        cluster.engine.generate(PROMPTS, SAMPLING)
    done = len([body for body in fake.generations() if body.get("stream")])
    cluster.sync()
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert len([body for body in fake.generations() if body.get("stream")]) == 12 + 1
    assert done < 12


def test_two_trainers_on_one_server_are_noticed_and_their_rollouts_generated_anew(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=2)
    cluster.sync()
    cluster.fakes[0].version = "another-run/0"
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert cluster.engine.take_metrics(SAMPLING.batch_name)["rollout/num_wrong_version"] >= 1
    assert [server.url for server in cluster.pool.up("run/0")] == [cluster.fakes[1].url]


def test_rollouts_of_other_weights_are_dropped_where_configured(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=2, concurrency=1, drop_wrong_version=True)
    cluster.sync()
    cluster.fakes[0].version = "another-run/0"
    rollouts = cluster.engine.generate(PROMPTS, SAMPLING)
    metrics = cluster.engine.take_metrics(SAMPLING.batch_name)
    assert metrics["rollout/num_dropped"] == metrics["rollout/num_wrong_version"] == 1
    assert len(rollouts) == 11


def test_a_prompt_that_keeps_failing_is_set_aside_with_its_error_and_the_others_are_not(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, attempts=3)
    cluster.sync()

    def fail_on_one(number, request, chunks):
        if request["input_ids"] == list(PROMPTS[2].prompt_ids):
            chunks[1]["output_ids"][0] = VOCAB_SIZE + 5
        return chunks

    for fake in cluster.fakes:
        fake.misbehave = fail_on_one
    rollouts = cluster.engine.generate(PROMPTS, SAMPLING)
    assert_complete(rollouts, [prompt for prompt in PROMPTS if prompt is not PROMPTS[2]])
    entries = [json.loads(line) for line in cluster.set_aside_path.read_text().splitlines()]
    assert sorted((entry["prompt_index"], entry["sample_index"]) for entry in entries) == [(20, 0), (20, 1)]
    assert all(entry["num_attempts"] == 3 and "below 307" in entry["error"] for entry in entries)
    assert all(entry["prompt_text"] == "prompt 2" for entry in entries)
    assert cluster.engine.take_metrics(SAMPLING.batch_name)["rollout/num_set_aside"] == 2


def test_http_500_now_and_then_costs_nothing_but_time(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, attempts=8)
    cluster.sync()

    def sometimes(number, request, chunks):
        if number % 3 == 0:
            raise StatusError(500)
        return chunks

    for fake in cluster.fakes:
        fake.misbehave = sometimes
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))


def test_a_server_that_falls_silent_loses_its_request_to_another(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    silent = cluster.fakes[0]

    def fall_silent(number, request, chunks):
        time.sleep(1.5)  # longer than what FAST allows
        return chunks

    silent.misbehave = fall_silent
    cluster.fakes[1].seconds_per_request = 0.3
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    metrics = cluster.engine.take_metrics(SAMPLING.batch_name)
    assert metrics["rollout/num_repeated"] >= 1
    assert metrics["rollout/num_set_aside"] == 0
    assert cluster.pool.num_lost == 0, "its heartbeat goes on"


def test_a_response_that_the_server_aborted_is_generated_anew(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.sync()

    def abort_first(number, request, chunks):
        if number == 1:
            chunks[1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "paused"}
        return chunks

    cluster.fakes[0].misbehave = abort_first
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))


def test_a_stop_at_an_id_that_is_not_ours_is_refused(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1, attempts=1)
    cluster.sync()

    def stop(number, request, chunks):
        chunks[1]["meta_info"]["finish_reason"] = {"type": "stop", "matched": 8}
        return chunks

    cluster.fakes[0].misbehave = stop
    assert cluster.engine.generate(PROMPTS[:1], SAMPLING) == []
    assert "eos_token_id" in cluster.set_aside_path.read_text()


def test_a_run_of_which_nothing_is_left_ends_instead_of_going_on(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, attempts=1)
    cluster.sync()

    def refuse(number, request, chunks):
        raise StatusError(400)

    def batch(step):
        return cluster.engine.generate(PROMPTS[:2], replace(SAMPLING, batch_name=f"step_{step}"))

    for fake in cluster.fakes:
        fake.misbehave = refuse
    assert batch(1) == batch(2) == []
    for fake in cluster.fakes:
        fake.misbehave = lambda number, request, chunks: chunks
    assert len(batch(3)) == 4  # the count begins anew
    for fake in cluster.fakes:
        fake.misbehave = refuse
    assert batch(4) == batch(5) == []
    with pytest.raises(EngineError, match=r"3 batches in a row, the last of them step_6 of 4 .*HTTP 400"):
        batch(6)


def test_two_trainers_that_take_the_weights_from_each_other_end_with_a_message(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    for _ in range(3):
        cluster.sync()
        cluster.fakes[0].version = "another-run/0"
        with pytest.raises(WeightsLostError):
            cluster.engine.generate(PROMPTS, SAMPLING)
    cluster.sync()
    cluster.fakes[0].version = "another-run/0"
    with pytest.raises(ServersLostError, match="another trainer"):
        cluster.engine.generate(PROMPTS, SAMPLING)


def test_told_to_stop_a_batch_waits_for_no_server(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, wait=60.0)
    cluster.sync()
    for fake in cluster.fakes:
        fake.stop()
    wait_until(lambda: not cluster.pool.up())
    stopped = threading.Event()
    waiting = threading.Thread(target=lambda: take_a_lease(cluster.pool, stopped))
    waiting.start()
    stopped.set()
    waiting.join(timeout=10.0)
    assert not waiting.is_alive()


def take_a_lease(pool, stopped):
    with pytest.raises(ServersLostError), pool.lease("run/0", stopped):
        pass


def test_a_signal_in_a_batch_without_servers_comes_through_at_once(stack, tmp_path, monkeypatch):
    class StopRequested(BaseException):
        pass

    def interrupted(futures, return_when):
        raise StopRequested

    cluster = Cluster(stack, tmp_path, wait=60.0)
    cluster.sync()
    for fake in cluster.fakes:
        fake.stop()
    wait_until(lambda: not cluster.pool.up())
    monkeypatch.setattr(sglang_jobs, "wait", interrupted)  # as a signal handler does in the main thread
    begin = time.monotonic()
    with pytest.raises(StopRequested):
        cluster.engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - begin < 20.0


def test_a_server_that_refuses_for_a_moment_is_not_taken_for_dead(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1, heartbeat=0.3, missed_heartbeats=3)
    cluster.sync()
    fake = cluster.fakes[0]
    fake.statuses["/server_info"] = [503] * 10_000
    wait_until(lambda: len(fake.statuses["/server_info"]) < 10_000)
    time.sleep(0.2)
    fake.statuses["/server_info"] = []
    looks = [path for path, *_ in fake.seen].count("/server_info")
    wait_until(lambda: [path for path, *_ in fake.seen].count("/server_info") > looks)
    assert cluster.pool.num_lost == 0


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


def test_all_servers_gone_is_a_clear_error_within_the_limit(stack, tmp_path):
    cluster = Cluster(stack, tmp_path)
    cluster.sync()
    for fake in cluster.fakes:
        fake.stop()
    with pytest.raises(ServersLostError, match="none of the 2 servers came back within 1 s"):
        cluster.engine.generate(PROMPTS, SAMPLING)
    wait_until(lambda: not cluster.pool.up())
    with pytest.raises(ServersLostError):
        cluster.sync(version=1)


def test_a_server_of_another_model_is_refused_at_the_start(tmp_path):
    with FakeSGLang(model_type="qwen2") as fake:
        pool = ServerPool(
            [PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE, timeouts=FAST), url=fake.url)],
            PoolSettings(),
            model_type="llama",
        )
        with pytest.raises(ServerMismatchError, match="qwen2"):
            SGLangEngine(pool, VersionTransport(), EngineSettings("run", 3, tmp_path / "x"))


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
            SGLangEngine(pool, transport, EngineSettings("run", 3, tmp_path / "x"))


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
    ahead = AheadGenerator(cluster.engine)
    stack.callback(ahead.close)
    ahead.start(PROMPTS, SAMPLING)
    ahead.wait()
    sent = sum(len(fake.generations()) for fake in cluster.fakes)
    assert_complete(ahead.take(PROMPTS, SAMPLING))
    assert sum(len(fake.generations()) for fake in cluster.fakes) == sent
    ahead.start([Prompt(0, "", (VOCAB_SIZE,))], SAMPLING)
    ahead.wait()  # raises nothing, whatever went wrong: other ranks wait for the sync that is next
    with pytest.raises(InputError):
        ahead.take([], SAMPLING)
    for fake in cluster.fakes:
        fake.stop()
    ahead.start(PROMPTS, SAMPLING)
    ahead.wait()
    with pytest.raises(ServersLostError):
        ahead.take(PROMPTS, SAMPLING)


def test_a_long_batch_says_how_far_it_is(caplog):
    caplog.set_level("INFO")
    clock = ProgressClock(8, every_seconds=0.0)
    clock.note((0, 0), 64, 0)
    clock.note((1, 0), 10, 1)
    assert "1 of 8 responses, 74 tokens" in caplog.text
