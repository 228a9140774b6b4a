"""Weights that servers copy out of the trainer's shared memory. Real servers do so in tests/integration."""

import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from megatron_tip.errors import EngineError, OutputError, ServerMismatchError
from megatron_tip.rollout.handover import shared_memory
from megatron_tip.rollout.handover.buckets import weight_buckets
from megatron_tip.rollout.handover.shared_memory import bucket_limit, handles, shared_buffer
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights import ipc as ipc_module
from megatron_tip.rollout.sglang.weights.ipc import IpcTransport
from tests.helpers.fake_sglang import VOCAB_SIZE, FakeSGLang
from tests.helpers.shared_weights import OpeningSGLang, assert_same_tensors

WEIGHTS = {f"weight_{place}": torch.full((5, 3), float(place), dtype=torch.bfloat16) for place in range(7)}
CPU = torch.device("cpu")


def served(fake, **values):
    server = PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url=fake.url, **values)
    server.tp_size = fake.layout.get("tp_size", 1)
    return server


def test_another_process_reads_what_a_handle_stands_for():
    (bucket,) = weight_buckets(WEIGHTS.items(), 1000, partial(shared_buffer, device=CPU))
    code = "import sys; from tests.helpers.shared_weights import opened; print(opened(sys.argv[1])['weight_6'].sum())"
    for handle in handles(bucket, 2):  # each is for one process
        done = subprocess.run([sys.executable, "-c", code, handle], capture_output=True, text=True, check=False)
        assert done.stdout == "tensor(90., dtype=torch.bfloat16)\n", done.stderr


def test_every_rank_of_every_server_copies_all_buckets_and_a_failing_server_is_left_out():
    transport = IpcTransport(bucket_bytes=70, device=CPU)
    with OpeningSGLang(tp_size=2) as good, OpeningSGLang(fails_at=1) as failing:
        servers = [served(good), served(failing)]
        assert transport.send(servers, iter(WEIGHTS.items()), "run/0") == servers[:1]
        for taken in good.taken:
            assert_same_tensors(taken, WEIGHTS)
        assert good.num_buckets == 4
        assert failing.num_buckets == 2
        assert (good.version, failing.version) == ("run/0", "run/0 incomplete")
    assert transport.num_bytes == 7 * 30
    transport.close()


def test_a_sync_ends_with_the_last_server():
    transport = IpcTransport(bucket_bytes=70, device=CPU)
    with OpeningSGLang(fails_at=0) as failing:
        stream = iter(WEIGHTS.items())
        assert transport.send([served(failing)], stream, "run/0") == []
        assert next(stream, None) is not None, "the rest is left to the caller"


def test_too_little_shared_memory_is_an_error_with_a_remedy_before_it_is_written(monkeypatch):
    usage = shutil.disk_usage("/dev/shm")._replace(free=60)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"/dev/shm: .*lower sync.bucket_bytes, or set sync.transport"):
        shared_buffer(61, CPU)
    assert shared_buffer(60, CPU).is_shared()


def test_buckets_fit_the_model_and_the_shared_memory(monkeypatch):
    usage = shutil.disk_usage("/dev/shm")._replace(free=60)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage)
    assert bucket_limit(100, 50, CPU, num_handing=1) == 20
    assert bucket_limit(100, 50, CPU, num_handing=2) == 12
    assert bucket_limit(100, 15, CPU, num_handing=1) == 15
    assert bucket_limit(10, 15, CPU, num_handing=1) == 10
    assert bucket_limit(100, 500, torch.device("cuda"), num_handing=1) == 100


def test_memory_that_cannot_be_shared_is_an_error_with_a_remedy(monkeypatch):
    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (bucket,) = weight_buckets(WEIGHTS.items(), 1000, partial(shared_buffer, device=CPU))
    monkeypatch.setattr(shared_memory.reductions, "reduce_tensor", refuse)
    with pytest.raises(EngineError, match=r'got: CUDA out of memory; set sync.transport = "broadcast"'):
        handles(bucket, 1)
    monkeypatch.setattr(shared_memory.torch.UntypedStorage, "_new_shared", refuse)
    with pytest.raises(EngineError, match=r'got: CUDA out of memory; set sync.transport = "broadcast"'):
        shared_buffer(60, CPU)


@pytest.mark.parametrize(
    "layout, neighbours, message",
    [
        ({"tp_size": 2, "pp_size": 2}, (), "got 2 stages or replicas"),
        (
            {"tp_size": 2},
            (0,),
            r"of tp_size 1 on the GPUs of the trainer's ranks \(0,\), got tp_size 2",
        ),
    ],
)
def test_layouts_that_cannot_open_handles_are_refused(layout, neighbours, message):
    with FakeSGLang() as fake:
        fake.layout = layout
        server = served(fake, neighbours=neighbours)
        server.num_replicas = layout.get("pp_size", 1)
        with pytest.raises(ServerMismatchError, match=message):
            IpcTransport(bucket_bytes=8, device=CPU).check(server)


def test_a_server_on_another_machine_is_refused(monkeypatch):
    transport = IpcTransport(bucket_bytes=8, device=CPU)
    monkeypatch.setattr(ipc_module, "own_address", lambda urls: "10.0.0.1")
    server = PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url="http://10.0.0.2:1")
    with pytest.raises(ServerMismatchError, match="expected a server on this machine"):
        transport.check(server)
    transport.check(PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url="http://10.0.0.1:1"))
