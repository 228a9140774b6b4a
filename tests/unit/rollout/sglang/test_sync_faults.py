"""Syncs to servers that are lost for a while, keep their old weights, or come back with others."""

import threading
import time

import pytest

from megatron_tip.errors import ServersLostError, WeightsLostError
from megatron_tip.rollout.sglang import engine as engine_module
from tests.helpers.processes import wait_until
from tests.helpers.sglang_engine import PROMPTS, SAMPLING, Cluster, assert_complete, num_generated


def generated_as_by_a_run(cluster, version=0):
    """Generates as training does: lost weights are synced again, until they are there."""
    while True:
        try:
            return cluster.engine.generate(PROMPTS, SAMPLING)
        except WeightsLostError:
            cluster.engine.wait_for_receivers()
            cluster.sync(version)


def test_syncs_that_reach_nobody_end_the_run_after_the_time_to_wait_and_not_before(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_SECONDS", 0.01)
    cluster = Cluster(stack, tmp_path, wait=1.0)
    cluster.transport.refuse = {fake.url for fake in cluster.fakes}
    begin = time.monotonic()
    with pytest.raises(ServersLostError, match=r"syncs in a row, over 1 s \(sglang.wait_seconds\), reached no server"):
        generated_as_by_a_run(cluster)
    assert time.monotonic() - begin > 1.0
    assert cluster.transport.num_syncs > 4


def test_one_server_that_is_lost_for_seconds_in_the_middle_of_a_sync_does_not_end_the_run(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1, wait=60.0, heartbeat=30.0, missed_heartbeats=2)
    (fake,) = cluster.fakes
    send = cluster.transport.send

    def send_to_nobody(servers, weights, version):
        cluster.transport.num_syncs += 1
        fake.stop()
        threading.Timer(3.0, fake.come_back).start()
        cluster.transport.send = send
        return []

    cluster.transport.send = send_to_nobody
    cluster.sync()
    assert_complete(generated_as_by_a_run(cluster))
    assert cluster.transport.num_syncs == 2, "nothing was sent before it was seen healthy"


@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_server_that_accepts_a_sync_and_keeps_its_old_weights_generates_nothing(stack, tmp_path, caplog, num_servers):
    cluster = Cluster(stack, tmp_path, num_servers=num_servers, wait=10.0)
    cluster.sync(version=0)
    cluster.fakes[0].keeps_weights = True
    cluster.sync(version=1)
    assert "it took the weights run/1, but model.layers.0.self_attn.o_proj.weight are still those of run/0" in (
        caplog.text
    )
    if num_servers == 1:
        with pytest.raises(WeightsLostError):
            cluster.engine.generate(PROMPTS, SAMPLING)
        cluster.fakes[0].keeps_weights = False
    assert_complete(generated_as_by_a_run(cluster, version=1), weight_version=1)
    assert (num_generated(cluster.fakes[0]) == 0) == (num_servers == 2)


def test_a_sync_of_unchanged_weights_proves_nothing_and_is_trusted(stack, tmp_path):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.sync(version=0)
    cluster.fakes[0].keeps_weights = True
    cluster.sync(version=0)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING))


def test_a_server_without_checksums_is_trusted_with_a_warning(stack, tmp_path, caplog):
    cluster = Cluster(stack, tmp_path, num_servers=1)
    cluster.fakes[0].gives_checksums = False
    for version in range(2):
        cluster.sync(version)
    assert_complete(cluster.engine.generate(PROMPTS, SAMPLING), weight_version=1)
    assert caplog.text.count("gives no checksums") == 1


@pytest.mark.parametrize("keeps", [False, True])
def test_a_server_that_comes_back_with_other_weights_under_the_last_version_is_not_trusted(stack, tmp_path, keeps):
    cluster = Cluster(stack, tmp_path, num_servers=1, wait=20.0)
    cluster.transport.keeps = keeps
    cluster.sync(version=2)
    fake = cluster.fakes[0]
    fake.stop()
    wait_until(lambda: not cluster.pool.up())
    fake.held = "of somebody else"
    fake.come_back(with_weights=True)
    wait_until(lambda: any(path == "/weights_checker" for path, *_ in fake.seen[-3:]))
    assert cluster.pool.up("run/2") == []
    fake.version = "default"  # as of a restart
    assert_complete(generated_as_by_a_run(cluster, version=2), weight_version=2)
    assert cluster.transport.num_syncs == (1 if keeps else 2)


def test_servers_are_brought_up_at_once(stack, tmp_path, monkeypatch):
    from tests.helpers import sglang_engine
    from tests.helpers.fake_sglang import FakeSGLang

    all_asked = threading.Barrier(3)

    class Waiting(FakeSGLang):
        def respond(self, handler, path, body):
            if path == "/health":
                all_asked.wait(timeout=20.0)
            super().respond(handler, path, body)

    monkeypatch.setattr(sglang_engine, "FakeSGLang", Waiting)
    cluster = Cluster(stack, tmp_path, num_servers=3, heartbeat_timeout=30.0)
    assert len(cluster.pool.up()) == 3
