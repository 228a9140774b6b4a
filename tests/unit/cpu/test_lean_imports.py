"""Megatron-Core comes without W&B and TorchInductor, and both are there afterwards."""

import subprocess
import sys

CODE = """
import sys
from megatron_tip.cpu.lean_imports import lean_imports
with lean_imports():
    import megatron_tip.training.loop
assert not {"wandb", "torch._inductor.compile_fx"} & sys.modules.keys(), "imported for nobody"
import torch
import megatron_tip.observability.wandb_tracker as tracker
assert tracker.wandb.__version__
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert torch.compile.__module__ == "torch"
"""


def test_a_worker_imports_neither_before_it_uses_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
