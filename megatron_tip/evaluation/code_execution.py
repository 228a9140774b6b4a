"""Programs that a model wrote, each in a process of its own with limits.

The limits keep a bad program from harming the evaluation: time, memory, files, processes, network where the kernel lets
it. They are no sandbox against a hostile one, which can still read what the user can: use a container for that.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("limited_process.py")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """Of one program: CPU and wall-clock seconds, address space, the largest file that it may write."""

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True)
class Execution:
    """What became of a program. `outcome`: "passed", "failed" (an exception, another exit code) or "timeout"."""

    outcome: str
    network_cut_off: bool
    output: str


def execute(program: str, limits: Limits | None = None) -> Execution:
    """Runs `program` in an empty folder with an empty environment under `limits`; never raises for what it does.

    It has passed if it came to its end: what leaves early with exit code 0 has not.
    """
    limits = limits or Limits()
    end = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="megatron_tip_code_") as folder:
        path = Path(folder, "answer.py")
        path.write_text(f"{program}\nprint({end!r})\n", encoding="utf-8", errors="replace")
        work = Path(folder, "work")
        work.mkdir()
        if os.geteuid() == 0:  # the program then runs as nobody
            work.chmod(0o777)
            Path(folder).chmod(0o711)
        numbers = [str(value) for value in (limits.cpu_seconds, limits.memory_bytes, limits.file_bytes)]
        with Path(folder, "output").open("w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_LAUNCHER), str(path), *numbers],
                cwd=work,
                env={"PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limits.wall_seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end_all(process)
            output.seek(0)
            text = output.read(1 << 16).decode(errors="replace")
    first, _, rest = text.partition("\n")
    timed_out = code is None or code == -signal.SIGXCPU
    passed = code == 0 and rest.endswith(f"{end}\n")
    outcome = "timeout" if timed_out else "passed" if passed else "failed"
    return Execution(outcome, first == "network: cut off", rest[-2000:].removesuffix(f"{end}\n"))


def program_of(answer: str, question: dict[str, str]) -> str:
    """Returns the program that decides on a HumanEval answer: the function, then the question's tests.

    The function is the last code block of the answer, or all of it without one. Where it is only the body, it stands
    behind the question's prompt; where it is the whole function, the prompt's imports and helpers stand before it.
    """
    blocks = _BLOCK.findall(answer)
    code = blocks[-1] if blocks else answer
    whole = re.search(rf"^\s*def {re.escape(question['entry_point'])}\b", code, re.MULTILINE) is not None
    prompt = question["prompt"]
    # The prompt ends with a function that has a docstring alone, so that it is a whole program by itself.
    start = f"{prompt}\n    pass\n\n{code}" if whole else f"{prompt}{code}"
    return f"{start}\n\n{question['test']}\n\ncheck({question['entry_point']})\n"


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
