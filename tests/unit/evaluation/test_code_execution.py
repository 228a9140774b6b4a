"""Programs end within their limits, whatever they do."""

import os
import socket

import pytest

from megatron_tip.evaluation.code_execution import Limits, execute, program_of

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
