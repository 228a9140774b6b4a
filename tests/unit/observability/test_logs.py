"""Who logs what, and as whom."""

import logging
import subprocess
import sys

import pytest

PROGRAM = """
import logging, warnings
from megatron_tip.observability.logs import configure_logging
configure_logging({rank})
logging.getLogger("megatron_tip.training").info("an info")
logging.getLogger("megatron_tip.training").warning("a warning")
logging.getLogger("megatron.core.models.gpt.gpt_model").warning("GPTModel IS DEPRECATED.")
logging.getLogger("megatron.core.models.gpt.gpt_model").warning("another model's warning")
logging.getLogger("transformers").info("another package's info")
warnings.warn("Transformer Engine and Apex are not installed. Falling back")
warnings.warn("Apex is not installed. Falling back to Torch Norm")
warnings.warn("absl.logging is not installed. Using logging.getLogger(__name__) instead.")
for module in ("torch.distributed.checkpoint", "megatron.core.models", "megatron_tip.training"):
    warnings.warn_explicit("a change to " + module, FutureWarning, "file.py", 1, module=module)
    warnings.warn_explicit("scope of " + module + " is deprecated.", UserWarning, "file.py", 2, module=module)
    experimental = module + " is experimental and still under active development."
    warnings.warn_explicit(experimental, UserWarning, "file.py", 3, module=module)
warnings.warn("another warning")
"""


@pytest.mark.parametrize("rank", [0, 3])
def test_info_comes_from_rank_0_and_warnings_from_all(rank):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(rank=rank)], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert ("an info" in run.stderr) == (rank == 0)
    assert f"rank {rank} WARNING megatron_tip.training: a warning" in run.stderr
    assert "another package's info" not in run.stderr
    assert "Transformer Engine" not in run.stderr
    assert "Apex" not in run.stderr
    assert "absl" not in run.stderr
    assert "a change to torch" not in run.stderr
    assert "a change to megatron.core" not in run.stderr
    assert "a change to megatron_tip" in run.stderr
    assert "scope of megatron.core" not in run.stderr
    assert "scope of megatron_tip.training is deprecated" in run.stderr
    assert "megatron.core.models is experimental" not in run.stderr
    assert "megatron_tip.training is experimental" in run.stderr
    assert "IS DEPRECATED" not in run.stderr
    assert "another model's warning" in run.stderr
    assert "another warning" in run.stderr


def test_log_follows_stderr_to_where_a_live_display_puts_it(monkeypatch, capsys):
    import io

    from megatron_tip.observability.logs import configure_logging

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging(0)
        elsewhere = io.StringIO()
        monkeypatch.setattr(sys, "stderr", elsewhere)
        logging.getLogger("megatron_tip").info("hello")
        assert "hello" in elsewhere.getvalue()
    finally:
        root.handlers[:], root.level = handlers, level
