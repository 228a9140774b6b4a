"""Processes that simulate beside the command end with it, whatever ended it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import is_alive, wait_until

ROOT = Path(__file__).parents[3]
COMMAND = """
import os, time
from megatron_tip.simulation.processes import other_processes
if __name__ == "__main__":
    with other_processes(1) as processes:
        print(processes.submit(os.getpid).result(), flush=True)
        processes.submit(time.sleep, 1000).result()
"""


def test_they_end_when_the_command_is_killed(tmp_path: Path):
    program = tmp_path / "command.py"
    program.write_text(COMMAND)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environ) as command:
        assert command.stdout is not None
        other = int(command.stdout.readline())
        assert is_alive(other)
        command.kill()
    wait_until(lambda: not is_alive(other))
