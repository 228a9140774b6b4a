"""Checkpoints of a student with experts: bit for bit under their own layout, and read under any other."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_checkpoint import (
    interrupted_and_not,
    plain_tensors,
    restore_and_save,
    save_after_steps,
)
from tests.helpers.distributed import run_workers
from tests.helpers.tiny import make_experts
from tests.helpers.training import Layout, make_config

EP2 = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's first layer has no experts; its others have a shared one too."""
    folder = tmp_path_factory.mktemp("models")
    make_experts(folder / "student", seed=1, mlp_only_layers=[0], shared_size=16)
    make_experts(folder / "teacher", seed=2)
    return folder


@pytest.mark.parametrize(
    "layout,experts,dtype,distributed",
    [
        (Layout(2), EP2, "bfloat16", True),
        (Layout(2, student=(1, 2)), {}, "float32", False),
        (Layout(2, cp=(2, 1)), EP2, "bfloat16", True),
    ],
    ids=["ep2-distributed-bf16", "pp2", "cp2-ep2-distributed-bf16"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    models: Path, tmp_path: Path, layout: Layout, experts: dict[str, int], dtype: str, distributed: bool
) -> None:
    config = make_config(
        models,
        layout,
        model={"dtype": dtype, **experts},
        teacher={"dtype": dtype},
        selection={"adaptive_ratio": True},
        optimizer={"distributed": distributed, "clip_grad": 1.0, "weight_decay": 0.1, "warmup_steps": 1},
    )
    for straight, resumed in run_workers(interrupted_and_not, 2, tmp_path, config, tmp_path, timeout_seconds=300):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_is_read_under_other_layouts_of_the_experts(
    models: Path, tmp_path: Path, distributed: bool
) -> None:
    optimizer = {"distributed": distributed}
    layout = Layout(4, student=(2, 1), sequence_parallel=True)
    experts = {**EP2, "expert_tensor_parallel_size": 1}
    config = make_config(models, layout, model=experts, optimizer=optimizer)
    saved = run_workers(save_after_steps, 4, tmp_path / "4", config, tmp_path / "saved", timeout_seconds=300)[0]
    before = run_workers(plain_tensors, 1, tmp_path / "1", tmp_path / "saved")[0]
    assert any("experts" in name and "exp_avg" in name for name in before)
    others = [
        (Layout(4, student=(1, 2)), EP2),
        (Layout(1), {}),
        (Layout(2, sequence_parallel=True, student=(2, 1)), {}),
        (Layout(4, cp=(2, 1)), EP2),
    ]
    for place, (other, sizes) in enumerate(others):
        config, target = make_config(models, other, model=sizes, optimizer=optimizer), tmp_path / f"again_{place}"
        found = run_workers(restore_and_save, other.world_size, tmp_path / "w", config, tmp_path / "saved", target)[0]
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert found[name] == pytest.approx(saved[name], rel=1e-5), (other, name)
        after = run_workers(plain_tensors, 1, tmp_path / "1", target)[0]
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            rows = min(len(tensor), len(after[name])) if "embed" in name else len(tensor)
            assert torch.equal(after[name][:rows], tensor[:rows]), (other, name)
