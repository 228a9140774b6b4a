"""The engine over several servers of which some die, lie, fall silent and come back."""

import json
import threading
import time
from dataclasses import replace

import pytest

from megatron_tip.errors import EngineError, ServersLostError, WeightsLostError
from megatron_tip.rollout.sglang import jobs as sglang_jobs
from tests.helpers.fake_sglang import VOCAB_SIZE, CutError, StatusError
from tests.helpers.processes import wait_until
from tests.helpers.sglang_engine import (
    PROMPTS,
    SAMPLING,
    Cluster,
    assert_complete,
)


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
    with pytest.raises(EngineError, match=r"3 batches in a row, the last of them step_6 with 4 .*HTTP 400"):
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
