"""Programs end within their limits, whatever they do."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from megatron_tip.errors import InputError
from megatron_tip.evaluation import code_execution
from megatron_tip.evaluation.code_execution import Limits, check_user, execute, program_of

SHORT = Limits(cpu_seconds=1, wall_seconds=8.0, memory_bytes=1 << 28, file_bytes=1 << 16)
QUESTION = {
    "prompt": 'from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    """Return the largest of xs."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n",
    "entry_point": "largest",
}


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ("Here it is:\n```python\ndef largest(xs: List[int]) -> int:\n    return max(xs)\n```\nIt is short.", "passed"),
        ("```python\n    return sorted(xs)[-1]\n```", "passed"),  # the body alone
        ("    return max(xs)\n", "passed"),
        ("```\ndef largest(xs):\n    return max(xs)", "passed"),  # cut off before the closing fence
        ("```python\ndef largest(xs):\n    return min(xs)\n```", "failed"),
        ("I cannot do that.", "failed"),
        ("```Python\ndef largest(xs):\n    return max(xs)\n```", "passed"),
        ("```python3\ndef largest(xs):\n    return max(xs)\n```", "passed"),
        ("```py title=a\r\ndef largest(xs):\n    return max(xs)\n```", "passed"),
        ("- so:\n  ```python\ndef largest(xs):\n    return max(xs)\n  ```", "passed"),
        # The first that defines the function is the answer; a usage example or another try after it is not.
        ("```python\ndef largest(xs):\n    return max(xs)\n```\nSo:\n```python\nlargest([1])\n```", "passed"),
        ("```\npip install x\n```\n```python\ndef largest(xs):\n    return max(xs)\n```", "passed"),
        ("```python\ndef largest(xs):\n    return 0\n```\n```python\ndef largest(xs):\n    return 3\n```", "failed"),
        ("<think>```python\ndef largest(xs):\n    return 0\n```</think>```python\n    return 3\n```", "passed"),
        ("<think>Perhaps\n```python\ndef largest(xs):\n    return max(xs)\n```\nBut", "failed"),  # cut off
        ("```python\nimport sys\nsys.exit(0)\n```", "failed"),  # never came to the tests
        ("```python\nimport os\nos._exit(0)\n```", "failed"),
    ],
)
def test_answers_are_judged_by_the_tests_of_the_question(answer, outcome):
    assert execute(program_of(answer, QUESTION), SHORT).outcome == outcome


def test_a_loop_a_wait_and_a_child_are_ended():
    assert execute("while True: pass", SHORT).outcome == "timeout"
    quick = Limits(cpu_seconds=5, wall_seconds=1.0)
    assert execute("import time; time.sleep(60)", quick).outcome == "timeout"


def test_memory_and_files_are_limited():
    assert execute("x = bytearray(1 << 20)", SHORT).outcome == "passed"
    hungry = execute("x = bytearray(1 << 30)", SHORT)
    assert (hungry.outcome, "MemoryError" in hungry.output) == ("failed", True)
    assert execute("open('a', 'wb').write(bytes(1 << 12))", SHORT).outcome == "passed"
    assert execute("open('a', 'wb').write(bytes(1 << 20))", SHORT).outcome == "failed"


def test_the_environment_is_empty_and_the_folder_is_gone(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    found = execute("import os; print(os.getcwd(), sorted(os.environ), os.listdir())", SHORT)
    folder, rest = found.output.split(" ", 1)
    assert "SECRET_TOKEN" not in rest
    assert rest.strip().endswith("[]")
    assert not os.path.exists(folder)


def test_no_network_where_the_kernel_lets_it_be_cut_off():
    program = "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('127.0.0.1', {port}))\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = execute(program.format(port=server.getsockname()[1]), SHORT)
    if not found.network_cut_off:
        pytest.skip("this kernel lets a process without rights have no network namespace")
    assert found.outcome == "failed"
    assert "unreachable" in found.output


def test_what_a_program_prints_does_not_hide_that_it_ended():
    found = execute("print('x' * 200_000)\nprint('last')", Limits())
    assert (found.outcome, found.output[-6:]) == ("passed", "\nlast\n")
    assert execute("print('x' * 200_000)", SHORT).outcome == "failed"  # more than the largest file


def test_a_program_cannot_read_what_tells_that_it_has_passed():
    """Not from its arguments, its input, nor any file that these name."""
    program = """
import os, sys  # claim
os.lseek(0, 0, os.SEEK_SET)
found = [*sys.argv, os.read(0, 1 << 20), open("/proc/self/cmdline").read()]
for name in list(found):
    if os.path.isfile(name):
        found.append(open(name).read())
print("claim" in str(found[1:]), flush=True)
os._exit(0)
"""
    found = execute(program, SHORT)
    assert found.outcome == "failed"
    assert found.output == "False\n"


@pytest.mark.parametrize("ending, outcome", [("", "passed"), ("time.sleep(60)", "timeout"), ("1 / 0", "failed")])
def test_children_that_leave_the_session_end_with_the_program(ending, outcome):
    program = f"""
import subprocess, sys, time
child = "import os, time; os.setsid(); os.fork() and os._exit(0); print(os.getpid(), flush=True); time.sleep(300)"
started = subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE)
print(started.stdout.readline().decode(), flush=True)
{ending}
"""
    found = execute(program, Limits(wall_seconds=6.0 if outcome == "timeout" else 60.0, processes=500))
    assert found.outcome == outcome
    assert not psutil.pid_exists(int(found.output.split()[0]))


def test_no_process_is_started_without_root(monkeypatch):
    system = shutil.which("python3", path="/usr/bin")
    if os.geteuid() == 0 and system:  # one that nobody can read
        monkeypatch.setattr("sys.executable", system)
    found = execute("import os\nprint('root' if os.geteuid() == 0 else 'user', flush=True)\nos.fork()", SHORT)
    if found.output.startswith("root"):
        pytest.skip("nobody cannot read any interpreter, and the limit does not hold for root")
    assert found.outcome == "failed"
    assert "BlockingIOError" in found.output


def test_the_program_ends_with_the_evaluation(tmp_path):
    """Killed, it can end nothing itself any more."""
    alive = "import time\nfor _ in range(600): time.sleep(0.1)  # megatron_tip_marker"
    source = f"from megatron_tip.evaluation.code_execution import Limits, execute; execute({alive!r}, Limits(9, 60.0))"
    evaluation = subprocess.Popen([sys.executable, "-c", source])
    try:
        started = time.monotonic()
        while len(family := psutil.Process(evaluation.pid).children(recursive=True)) < 2:
            assert time.monotonic() - started < 60
            time.sleep(0.05)
    finally:
        evaluation.send_signal(signal.SIGKILL)
        evaluation.wait()
    gone, left = psutil.wait_procs(family, timeout=10)
    assert (len(gone), left) == (2, [])


def test_a_program_that_fills_the_disk_with_many_files_is_ended():
    program = """
import itertools, time
for number in itertools.count():
    with open(f"file_{number}", "wb") as file:
        file.write(bytes(1 << 18))
    time.sleep(0.01)
"""
    started = time.monotonic()
    found = execute(program, Limits(wall_seconds=60.0, folder_bytes=4 << 20))
    assert found.outcome == "failed"
    assert time.monotonic() - started < 40


def test_a_program_that_forks_without_end_is_ended():
    program = """
import os, time
while True:
    if not os.fork():
        time.sleep(100)
    time.sleep(0.005)
"""
    started = time.monotonic()
    found = execute(program, Limits(wall_seconds=60.0, processes=500))
    assert found.outcome == "failed"
    assert time.monotonic() - started < 40


@pytest.mark.parametrize(
    "is_root, can_be_nobody, is_refused", [(True, False, True), (True, True, False), (False, False, False)]
)
def test_programs_run_as_root_only_when_that_is_asked_for(monkeypatch, caplog, is_root, can_be_nobody, is_refused):
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 1000)
    monkeypatch.setattr(code_execution, "can_give_up_root", lambda: can_be_nobody)
    if is_refused:
        with pytest.raises(InputError, match=r"expected a user other than root.*--allow-code-execution-as-root"):
            check_user(allow_root=False)
    else:
        check_user(allow_root=False)
    check_user(allow_root=True)
    assert "can forge that it passed" in caplog.text
    assert ("run as ROOT" in caplog.text) == is_refused
