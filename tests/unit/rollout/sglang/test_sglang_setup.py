"""The servers that a run starts are those of its placement."""

from pathlib import Path

import pytest
import torch

from megatron_tip.config import Config
from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.errors import ConfigError
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import place
from megatron_tip.rollout.engine import EngineNeeds
from megatron_tip.rollout.sglang.keys import ServerKeys
from megatron_tip.rollout.sglang.setup import _own_servers, check_allocator
from tests.helpers.training import Layout, make_config, make_models


def test_servers_get_the_gpus_and_the_memory_of_their_placement(tmp_path: Path):
    make_models(tmp_path)
    sglang = {"tensor_parallel_size": 2, "gpus": (4, 5, 6, 7)}
    config = make_config(tmp_path, Layout(1), rollout={"engine": "sglang"}, sglang=sglang)
    settings = _own_servers(needs(config, Hosts(4, 4, tuple(range(8))), torch.bfloat16), ServerKeys())
    assert [(one.device, one.gpus, one.tp_size, one.memory_fraction) for one in settings] == [
        ("cuda", (4, 5), 2, 0.0),
        ("cuda", (6, 7), 2, 0.0),
    ]
    assert [one.log_path.name for one in settings] == ["server_0.log", "server_1.log"]
    assert len({one.seed for one in settings}) == 2
    config = make_config(tmp_path, Layout(1), rollout={"engine": "sglang"})
    (on_cpu,) = _own_servers(needs(config, Hosts(2, 2), torch.float32), ServerKeys())
    assert (on_cpu.device, on_cpu.gpus, on_cpu.memory_fraction) == ("cpu", (), 0.5)
    assert on_cpu.max_total_tokens > 256
    assert not on_cpu.memory_saver, "SGLang has none on a CPU"


def test_servers_on_the_trainers_gpus_can_give_back_memory(tmp_path: Path):
    make_models(tmp_path)
    config = make_config(tmp_path, Layout(1), rollout={"engine": "sglang"}, sglang={"share_gpus": True})
    settings = _own_servers(needs(config, Hosts(2, 2, (0, 1)), torch.bfloat16, releases_memory=True), ServerKeys())
    assert [(one.gpus, one.memory_saver, one.memory_fraction) for one in settings] == [
        ((0,), True, 0.3),
        ((1,), True, 0.3),
    ]


def needs(config: Config, hosts: Hosts, dtype: torch.dtype, *, releases_memory: bool = False) -> EngineNeeds:
    return EngineNeeds(
        config=config,
        student=ModelFolder(config.model.path),
        placement=place(config, hosts),
        vocab_size=307,
        tokenizer=None,  # type: ignore[arg-type]
        stop_token_ids=(2,),
        device=torch.device("cpu"),
        num_threads=1,
        dtype=dtype,
        weights_dtype=dtype,
        releases_memory=releases_memory,
    )


def test_memory_that_cuda_ipc_cannot_share_is_refused():
    cuda, environ = torch.device("cuda"), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with pytest.raises(ConfigError, match="expected no expandable_segments:True"):
        check_allocator("ipc", cuda, environ)
    check_allocator("broadcast", cuda, environ)
    check_allocator("ipc", torch.device("cpu"), environ)
    check_allocator("ipc", cuda, {})
