"""Ranks that share one device: two NCCL ranks on one GPU, as tools/check_gpu.py starts them; over gloo on a CPU."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tip.errors import ConfigError, PeerError
from megatron_tip.parallel.collectives import gather_json
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import build_groups
from megatron_tip.parallel.together import run_on, together
from tests.helpers.first_step import Observed
from tests.helpers.training import make_models
from tools.gpu_checks.ranks import RankError, run_ranks
from tools.gpu_checks.task import Task

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
HERE = "tests.distributed.test_one_device"


def facts(device: str) -> list[object]:
    """What every rank must know in the end: values of both, one's result, one's failure, the sum of a group of both."""
    rank = dist.get_rank()
    groups = build_groups(ModelGrid.over(2, tp_size=2, pp_size=1, owner="student"))
    total = torch.full((3,), rank + 1.0, device=device)
    dist.all_reduce(total, group=groups.tp_group)
    failure = ""
    try:
        with together(device=device):
            if rank == 1:
                raise ConfigError("the second rank: no")
    except ConfigError as error:
        failure = str(error)
    return [
        gather_json({"rank": rank}, device=device),
        run_on(1, lambda: rank * 10, device=device, group=groups.tp_group),
        failure,
        total.tolist(),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_on_one_device_exchange_values_and_failures(device: str, tmp_path: Path):
    expected = [[{"rank": 0}, {"rank": 1}], 10, "the second rank: no", [3.0] * 3]
    assert run_ranks(f"{HERE}:facts", 2, Task(device, tmp_path), device, seconds=120) == [expected] * 2


def refuse() -> None:
    if dist.get_rank() == 1:
        raise PeerError("a message")
    dist.barrier()


def test_a_rank_that_fails_ends_the_others_and_is_named(tmp_path: Path):
    with pytest.raises(RankError, match=r"rank 1 of .*refuse ended with 1: (?s:.*)a message"):
        run_ranks(f"{HERE}:refuse", 2, Task("cpu", tmp_path), seconds=120)


def test_what_a_rank_sees_of_a_step_comes_back_without_pickles(tmp_path: Path):
    """The way of tools/check_gpu.py, which forks its ranks on a CPU."""
    folder = make_models(tmp_path / "models")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "what is {n} and {n} ?"}}\n' for n in range(4)))
    place = "tools.gpu_checks.train_step:observed_parts"
    ranks = run_ranks(place, 2, Task("cpu", tmp_path), str(folder), "dp 2", seconds=200)
    first, second = (Observed(**parts) for parts in ranks)
    assert first.gradients
    assert first.selected != second.selected
    assert first.metrics["train/loss"] == pytest.approx(first.loss + second.loss, rel=1e-4)
