"""Spoiled inputs end in success or one message; and the tool that says so can tell."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.fuzz_inputs import Ending, run_forked

ROOT = Path(__file__).parents[2]


def test_some_spoiled_inputs_of_every_kind_end_well():
    """The first of those of `python tools/fuzz_inputs.py`, three of each kind."""
    command = [sys.executable, str(ROOT / "tools" / "fuzz_inputs.py"), "--cases", "27"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert ended.stdout.count("| 3 |") >= 9
    assert "\n0 faults\n" in ended.stdout


@pytest.mark.parametrize(
    "code, err, leftovers, expected",
    [
        (0, "a warning\n", [], ""),
        (2, "error: run.folder: expected ...\n  and more\n", [], ""),
        (2, "Usage: ...\nError: Missing argument\n", [], ""),
        (2, "error: one\nerror: two\n", [], "exit code 2 with 2 messages"),
        (1, "", [], "exit code 1 with 0 messages"),
        (-9, "", [], "exit code -9"),
        (None, "", [], "not ended after 1 s"),
        (70, "Traceback (most recent call last):\nKeyError: 3\n", [], "traceback: KeyError: 3"),
        (0, "", ["run/.a.partial"], "left run/.a.partial"),
    ],
)
def test_what_counts_as_a_fault(code: int | None, err: str, leftovers: list[str], expected: str):
    assert Ending(code, 1.0, "", err).fault(leftovers) == expected


def test_a_forked_command_ends_by_its_code_its_traceback_or_the_clock():
    assert run_forked(lambda: sys.exit(3), 60.0).code == 3
    broken = run_forked(lambda: {}["no such key"], 60.0)
    assert broken.fault([]) == "traceback: KeyError: 'no such key'"
    assert run_forked(lambda: time.sleep(600), 0.2).code is None
    assert "MemoryError" in run_forked(lambda: bytearray(2**40), 60.0).fault([])
