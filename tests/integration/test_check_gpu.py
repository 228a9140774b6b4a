"""tools/check_gpu.py as a whole, on a CPU: every check ends well, or says why it means nothing there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_checks.checks import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_check_ends_well_on_a_cpu(tmp_path: Path):
    out = tmp_path / "checks.jsonl"
    options = ["--device", "cpu", "--seconds", "800", "--out", str(out)]
    command = [sys.executable, str(ROOT / "tools/check_gpu.py"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["check"] for line in lines] == [check.name for check in CHECKS]
    needs_gpu = {check.name for check in CHECKS if check.needs_gpu}
    for line in lines:
        assert line["status"] == ("skipped" if line["check"] in needs_gpu else "passed"), json.dumps(line, indent=2)
    assert ended.returncode == 0, ended.stderr
    assert "Checks of a GPU" in ended.stdout
