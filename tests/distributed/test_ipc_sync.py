"""Syncs by IPC in which several ranks of the trainer each hand their neighbour the full weights."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_tip.conversion.bridge import export_hf
from megatron_tip.errors import EngineError, OutputError
from megatron_tip.rollout.handover import exchange as exchange_module
from megatron_tip.rollout.handover.exchange import HandleExchange
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang.weights.ipc import IpcTransport
from megatron_tip.training.weight_sync import sync_engine
from tests.helpers.distributed import run_workers
from tests.helpers.fake_sglang import VOCAB_SIZE
from tests.helpers.processes import wait_until
from tests.helpers.shared_weights import OpeningSGLang, assert_same_tensors
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, with_source

BUCKET_BYTES = 40_000
SERVED = {"rollout": {"engine": "sglang", "server_urls": ("http://nobody",)}, "sync": {"verify": "never"}}


def served_run(folder, layout, fakes, neighbours):
    """A run whose engine, on rank 0, sends by IPC to `fakes`."""
    run = build_tiny_run(make_config(folder, layout), [])
    handing = {rank for ranks in neighbours for rank in ranks}
    exchange = HandleExchange(BUCKET_BYTES, run.device, handing)
    run = replace(run, config=make_config(folder, layout, **SERVED), exchange=exchange)
    if dist.get_rank() != 0:
        return run, None
    servers = [
        PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url=fake.url, neighbours=ranks)
        for fake, ranks in zip(fakes, neighbours, strict=True)
    ]
    pool = ServerPool(servers, PoolSettings(heartbeat=30.0), model_type="llama")
    transport = IpcTransport(bucket_bytes=BUCKET_BYTES, device=run.device, exchange=exchange)
    engine = SGLangEngine(pool, transport, EngineSettings("run", 3, folder / "set_aside.jsonl", num_layers=4))
    return with_source(run, engine), engine


def synced(folder, layout, neighbours, fails_at):
    fakes = [OpeningSGLang(tp_size=len(ranks)) for ranks in neighbours]
    fakes[-1].fails_at = fails_at
    run, engine = served_run(folder, layout, fakes, neighbours)
    for version in range(2):
        sync_engine(run, weight_version=version)
        if engine is not None:  # a server that failed is left alone until a health check
            wait_until(lambda: not any(server.is_suspect for server in engine._pool.servers))
    groups = run.student.groups
    stream = export_hf(run.student.model, run.architecture, groups) if groups.dp_cp_rank == 0 else ()
    expected = {name: tensor.clone() for name, tensor in stream}
    if engine is None:
        return None
    complete = fakes if fails_at < 0 else fakes[:-1]
    for fake in complete:
        assert fake.num_buckets > 4
        for taken in fake.taken:
            assert_same_tensors(taken, expected)
    engine.close()
    return [fake.version for fake in fakes]


@pytest.mark.parametrize(
    "layout, neighbours",
    [
        (Layout(2, student=(2, 1)), ((0, 1),)),
        (Layout(2, student=(1, 2)), ((1,), (0,))),
        (Layout(2, student=(1, 1)), ((1,), (1,))),  # two replicas, two servers on the second one's GPU
        (Layout(2, cp=(2, 2)), ((1,), (0,))),
    ],
    ids=str,
)
def test_every_neighbour_hands_over_the_full_weights_whatever_the_layout(tmp_path, layout, neighbours):
    versions, *_ = run_workers(
        synced, layout.world_size, tmp_path, make_models(tmp_path), layout, neighbours, -1, timeout_seconds=240
    )
    assert versions == ["run/1"] * len(neighbours)


def test_a_server_that_fails_in_mid_sync_is_left_out_and_takes_the_next_sync(tmp_path):
    layout, neighbours = Layout(2, student=(2, 1)), ((0,), (1,))
    versions, _ = run_workers(synced, 2, tmp_path, make_models(tmp_path), layout, neighbours, 1, timeout_seconds=240)
    assert versions == ["run/1", "run/1"]


def failed(folder, layout, name, error):
    fakes = [OpeningSGLang()]
    run, engine = served_run(folder, layout, fakes, ((1,),))
    if dist.get_rank() == 1:

        def fail(*arguments):
            raise error

        setattr(exchange_module, name, fail)
    with pytest.raises(type(error)) as caught:
        sync_engine(run, weight_version=0)
    if engine is not None:
        engine.close()
    return str(caught.value), fakes[0].num_buckets


@pytest.mark.parametrize(
    "name, error", [("shared_buffer", OutputError("/dev/shm: full")), ("handles", EngineError("no CUDA IPC"))]
)
def test_memory_that_another_rank_cannot_share_is_the_same_error_on_every_rank(tmp_path, name, error):
    layout = Layout(2, student=(2, 1))
    results = run_workers(failed, 2, tmp_path, make_models(tmp_path), layout, name, error, timeout_seconds=240)
    assert results == [(str(error), 0)] * 2
