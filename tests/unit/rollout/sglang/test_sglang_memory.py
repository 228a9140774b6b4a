"""Servers hold what a phase leaves them; one that fails to give back or take back is left out like any dead one."""

import time
from contextlib import ExitStack

import pytest

from megatron_tip.errors import ServerError, ServerMismatchError, WeightsLostError
from megatron_tip.rollout.engine import ALL_MEMORY, CACHE, WEIGHTS
from megatron_tip.rollout.sglang.pool import PooledServer
from tests.helpers.fake_sglang import FakeSGLang
from tests.helpers.processes import wait_until
from tests.helpers.sglang_engine import PROMPTS, SAMPLING, Cluster, assert_complete

NOTHING = frozenset[str]()
TAGS = {"weights", "kv_cache", "cuda_graph"}


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def cluster_of(stack, tmp_path, **settings) -> Cluster:
    return Cluster(stack, tmp_path, releases_memory=True, **settings)


def test_a_step_gives_back_and_takes_back(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    engine = cluster.engine
    for version in (0, 1):
        engine.hold_memory(frozenset({WEIGHTS}), may_start=True)
        assert [fake.released for fake in cluster.fakes] == [{"kv_cache", "cuda_graph"}] * 2
        cluster.sync(version)
        engine.hold_memory(ALL_MEMORY, may_start=True)
        engine.hold_memory(ALL_MEMORY, may_start=True)  # the same again does nothing
        assert_complete(engine.generate(PROMPTS, SAMPLING), weight_version=version)
        engine.hold_memory(NOTHING, may_start=False)
        assert [fake.released for fake in cluster.fakes] == [TAGS] * 2
    assert not [crash for fake in cluster.fakes for crash in fake.crashes]


def test_weights_that_were_given_back_generate_nothing_until_the_next_sync(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    cluster.sync()
    cluster.engine.hold_memory(frozenset({WEIGHTS}), may_start=True)
    cluster.engine.hold_memory(ALL_MEMORY, may_start=True)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))  # the weights had stayed
    cluster.engine.hold_memory(NOTHING, may_start=False)
    cluster.engine.hold_memory(ALL_MEMORY, may_start=True)
    with pytest.raises(WeightsLostError):
        cluster.engine.generate(PROMPTS, SAMPLING)
    assert cluster.engine.input_logprobs([1, 2, 3]) == {}


def test_requests_that_are_left_are_ended_before_memory_is_given_back(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path, num_servers=1)
    cluster.engine.hold_memory(NOTHING, may_start=False)
    paths = [path.partition("?")[0] for path, *_ in cluster.fakes[0].seen]
    last = [path for path in paths if path not in ("/server_info", "/model_info")][-3:]
    assert last == ["/abort_request", "/flush_cache", "/release_memory_occupation"]


def test_heartbeats_go_on_while_memory_is_given_back_and_wake_nothing(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    cluster.engine.hold_memory(NOTHING, may_start=False)
    seen = [len(fake.seen) for fake in cluster.fakes]
    time.sleep(0.5)  # ten heartbeats
    assert all(len(fake.seen) > number for fake, number in zip(cluster.fakes, seen, strict=True))
    assert len(cluster.pool.up()) == 2
    assert not [crash for fake in cluster.fakes for crash in fake.crashes]


@pytest.mark.parametrize("path", ["/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"])
def test_a_server_that_fails_is_left_out(stack, tmp_path, path):
    cluster = cluster_of(stack, tmp_path)
    good, bad = cluster.fakes
    bad.statuses[path] = [500] * 1000
    cluster.engine.hold_memory(NOTHING, may_start=False)
    if path.startswith("/resume"):
        cluster.engine.hold_memory(frozenset({WEIGHTS}), may_start=True)
    assert [server.url for server in cluster.pool.up()] == [good.url]
    cluster.engine.hold_memory(frozenset({WEIGHTS}), may_start=False)
    cluster.sync()
    cluster.engine.hold_memory(ALL_MEMORY, may_start=False)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))
    assert not good.crashes + bad.crashes


def test_a_given_server_in_doubt_stays_out_until_it_is_restarted(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    cluster.sync()
    bad = cluster.fakes[1]
    bad.statuses["/release_memory_occupation"] = [500]
    cluster.engine.hold_memory(NOTHING, may_start=False)
    cluster.engine.hold_memory(ALL_MEMORY, may_start=True)
    time.sleep(0.5)
    assert len(cluster.pool.up()) == 1, "it still has this run's weight version, so it is the same process"
    bad.stop()
    bad.come_back()
    wait_until(lambda: len(cluster.pool.up()) == 2)
    cluster.sync(1)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=1)
    assert not [crash for fake in cluster.fakes for crash in fake.crashes]


@pytest.mark.parametrize("with_weights", [True, False], ids=["cut-off", "restarted"])
def test_a_server_that_returns_holds_what_the_others_hold(stack, tmp_path, with_weights):
    cluster = cluster_of(stack, tmp_path)
    cluster.sync()
    lost = cluster.fakes[1]
    cluster.engine.hold_memory(NOTHING, may_start=False)
    lost.stop()
    wait_until(lambda: len(cluster.pool.up()) == 1)
    lost.come_back(with_weights=with_weights)
    time.sleep(0.4)
    assert len(cluster.pool.up()) == 1, "while the trainer trains nobody comes back"
    cluster.engine.hold_memory(frozenset({WEIGHTS}), may_start=True)
    wait_until(lambda: len(cluster.pool.up()) == 2)
    wait_until(lambda: lost.released == {"kv_cache", "cuda_graph"})
    cluster.sync(1)
    cluster.engine.hold_memory(ALL_MEMORY, may_start=True)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=1)
    assert not [crash for fake in cluster.fakes for crash in fake.crashes]


def test_a_server_that_cannot_give_back_its_memory_is_refused(stack, tmp_path):
    fake = stack.enter_context(FakeSGLang())
    cluster = cluster_of(stack, tmp_path, num_servers=1)
    fake.layout = {"device": "cuda"}
    server = PooledServer(cluster.pool.servers[0].connect, url=fake.url)
    with pytest.raises(ServerMismatchError, match="expected a server started with --enable-memory-saver"):
        cluster.engine._weights_of_returned(server)
    fake.layout = {"device": "cuda", "enable_memory_saver": True}
    cluster.engine._weights_of_returned(server)


class StartingProcess:
    """Our own server, which never gets healthy; `stop` is what it waits for."""

    url = "http://127.0.0.1:9"

    def __init__(self):
        self.num_starts, self.num_stops, self.is_running = 0, 0, False

    def start(self):
        self.num_starts, self.is_running = self.num_starts + 1, True

    def stop(self):
        self.num_stops, self.is_running = self.num_stops + 1, False

    def wait_until_healthy(self, timeout_seconds):
        wait_until(lambda: not self.is_running)
        raise ServerError("the server ended while it started")


def test_a_server_that_starts_is_ended_when_the_trainer_needs_its_memory(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    server, process = cluster.pool.servers[1], StartingProcess()
    server.process = process  # as if this one were ours
    cluster.fakes[1].stop()
    wait_until(lambda: process.num_starts == 1)
    cluster.engine.hold_memory(NOTHING, may_start=False)
    assert not process.is_running
    time.sleep(0.5)
    assert process.num_starts == 1, "it does not start again"
    cluster.engine.hold_memory(frozenset({WEIGHTS, CACHE}), may_start=True)
    wait_until(lambda: process.num_starts == 2)


def test_given_servers_have_all_their_memory_after_the_run(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    cluster.fakes[0].statuses["/resume_memory_occupation"] = [500] * 1000
    cluster.engine.hold_memory(NOTHING, may_start=False)
    cluster.engine.close()
    assert [fake.released for fake in cluster.fakes] == [TAGS, set()]
    assert not [crash for fake in cluster.fakes for crash in fake.crashes]


def test_a_server_that_may_have_taken_its_memory_back_is_not_told_to_again(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    cluster.sync()
    lost = cluster.fakes[1]
    cluster.engine.hold_memory(NOTHING, may_start=False)
    lost.stop()
    wait_until(lambda: len(cluster.pool.up()) == 1)
    lost.come_back(with_weights=True)
    lost.statuses["/resume_memory_occupation"] = [500]
    cluster.engine.hold_memory(ALL_MEMORY, may_start=True)
    time.sleep(0.3)
    cluster.pool.servers[1].look_now.set()
    time.sleep(0.3)
    assert [path for path, *_ in lost.seen].count("/resume_memory_occupation") == 1


def test_a_server_that_comes_up_while_others_are_ended_gives_back_as_well(stack, tmp_path):
    cluster = cluster_of(stack, tmp_path)
    starting, coming = cluster.pool.servers
    cluster.pool.may_start = False  # nobody else brings them up
    starting.is_up = coming.is_up = False
    starting.process = StartingProcess()
    starting.process.stop = lambda: setattr(coming, "is_up", True)
    cluster.engine.hold_memory(NOTHING, may_start=False)
    assert cluster.fakes[1].released == TAGS
