"""The passwords of servers that a job starts."""

import json
import stat
from pathlib import Path

import pytest

from megatron_tip.commands.serving import write_keys


def test_keys_are_their_owners_alone_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    write_keys(path)
    keys = json.loads(path.read_text())
    assert set(keys) == {"api", "admin"}
    assert min(map(len, keys.values())) > 30
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_keys(path)
    assert json.loads(path.read_text()) == keys
    assert [one.name for one in path.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("left", ["", '{"api": "x', '{"api": "x"}', "[1]"])
def test_what_a_crash_left_is_written_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(left)
    write_keys(path)
    assert set(json.loads(path.read_text())) == {"api", "admin"}
