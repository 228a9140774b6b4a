"""The conversion commands, as one process, as workers that they start, and under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from tests.helpers.models import write_tiny_model

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_there_and_back_in_other_layouts_without_two_layers(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", "qwen3_untied", dtype=torch.bfloat16)
    megatron, target = tmp_path / "megatron", tmp_path / "target"
    there = [sys.executable, "tools/convert_hf_to_megatron.py", str(source), str(megatron)]
    result = run([*there, "--pp", "2", "--drop-layer", "0", "--drop-layer", "2"])
    assert result.returncode == 0, result.stderr
    result = run([*TORCHRUN, "tools/convert_megatron_to_hf.py", str(megatron), str(target), "--tp", "2"])
    assert result.returncode == 0, result.stderr
    expected, written = HfCheckpoint(source, drop_layers=(0, 2)), HfCheckpoint(target)
    assert written.dtype == torch.bfloat16
    assert written.architecture == expected.architecture
    for name in hf_shapes(written.architecture):
        assert torch.equal(written.read(name), expected.read(name)), name


@pytest.mark.parametrize(
    "options,message",
    [
        ([], "{tmp_path}: expected a new folder, but it exists; give another one or move it away"),
        (
            ["--tp", "4"],
            "model.tensor_parallel_size: expected a divisor of its 2 key/value heads, got 4; choose among 1, 2; "
            "Megatron-Core 0.16.1 gives several ranks one of these heads only within its global groups",
        ),
    ],
)
def test_refused_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    source = write_tiny_model(tmp_path / "source", "qwen2_tied")
    result = run([sys.executable, "tools/convert_hf_to_megatron.py", str(source), str(tmp_path), *options])
    assert result.returncode == 1
    assert result.stderr == f"error: {message.format(tmp_path=tmp_path)}\n"
