"""A failed export leaves the checkpoint and says how to export it."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tip.errors import OutputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training import finish


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_failed_export_is_told_with_the_command_that_makes_it(tmp_path: Path, monkeypatch, caplog, has_checkpoint):
    def fails(*_: Any, **__: Any) -> None:
        raise OutputError("disk full")

    monkeypatch.setattr(finish, "save_hf", fails)
    monkeypatch.setattr(finish, "save_megatron_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(finish.dist, "get_rank", lambda: 0)
    run: Any = SimpleNamespace(
        timer=SimpleNamespace(phase=lambda _: nullcontext()),
        student=SimpleNamespace(model=None, groups=None),
        config=SimpleNamespace(output=SimpleNamespace(save_checkpoint=has_checkpoint, export_hf=True)),
    )
    plan: Any = SimpleNamespace(student=None)
    with pytest.raises(OutputError, match="disk full"):
        finish.write_models(run, plan, RunFolder(tmp_path))
    command = f"python tools/convert_megatron_to_hf.py {tmp_path}/checkpoint {tmp_path}/hf"
    assert (command in caplog.text) == has_checkpoint
