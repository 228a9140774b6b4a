"""Execution of programs that a model wrote, each in its own process with limits (`limited_process`).

The limits keep a bad program from harming the evaluation: time, memory, files, processes, and network if the kernel
allows it. They are not a sandbox against a hostile program. It can read what the user can and, because it shares a
process with the tests, could find and forge the sign that it has passed. Use a container for models that you do not
trust.
"""

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_tip.errors import InputError
from megatron_tip.evaluation.child_process import end_session
from megatron_tip.evaluation.limited_process import TIMED_OUT, can_give_up_root

logger = logging.getLogger(__name__)

_LAUNCHER = Path(__file__).with_name("limited_process.py")
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_THOUGHT, _THOUGHT_ENDS = "<think>", "</think>"
_GRACE_SECONDS = 5.0
_OUTPUT_BYTES = 2000


@dataclass(frozen=True)
class Limits:
    """The limits of one program.

    CPU and wall-clock seconds, address space, the largest file that it may write (its output included), what all its
    files may take, and the number of its user's processes and threads above which it can start no more. That last one
    does not bind root, whose programs are ended once they have more than 16 descendants.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20
    processes: int = 0


@dataclass(frozen=True)
class Execution:
    """The result of a program. `outcome`: "passed", "failed" (exception, exit code) or "timeout". `output`: its end."""

    outcome: str
    network_cut_off: bool
    output: str


def execute(program: str, limits: Limits | None = None) -> Execution:
    """Runs `program` in an empty folder with an empty environment under `limits`; never raises because of the program.

    It has passed if it reached its end with exit code 0; a program that exits early has not.
    """
    limits = limits or Limits()
    end = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="megatron_tip_code_") as folder,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as status,
        tempfile.TemporaryFile() as output,
    ):
        asked.write(json.dumps({"program": program, "end": end}).encode())
        asked.seek(0)
        if os.geteuid() == 0:  # the program then runs as nobody
            Path(folder).chmod(0o777)
        numbers = (
            *(limits.cpu_seconds, limits.wall_seconds, limits.memory_bytes, limits.file_bytes, limits.processes),
            limits.folder_bytes,
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_LAUNCHER), str(status.fileno()), *map(str, numbers)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin"},
            stdin=asked,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[status.fileno()],
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limits.wall_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:
            end_session(process)  # the watcher, which ends the program
        status.seek(0)
        first, _, rest = status.read(1 << 10).decode(errors="replace").partition("\n")
        output.seek(max(0, output.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
        text = output.read().decode(errors="replace")
    outcome = "timeout" if code == TIMED_OUT else "passed" if code == 0 and rest == end else "failed"
    return Execution(outcome, first == "network: cut off", text)


def check_user(*, allow_root: bool) -> None:
    """Refuses to run programs as root, and says loudly what running them means.

    Raises:
        InputError: they would run as root: this process is root's, and the user nobody cannot read the interpreter.
    """
    if os.geteuid() == 0 and not can_give_up_root():
        if not allow_root:
            raise InputError(
                "--allow-code-execution: expected a user other than root, or a Python interpreter that the user nobody "
                f"can read, got root and {sys.executable}; what a model wrote would run as root: use another user, a "
                "container, or say --allow-code-execution-as-root"
            )
        logger.warning("programs that the model wrote run as ROOT on this machine, without a sandbox")
    logger.warning(
        "programs that the model wrote run on this machine under limits that are no sandbox: they can read what this "
        "user can, and a hostile one can forge that it passed"
    )


def program_of(answer: str, question: dict[str, str]) -> str:
    """Returns the program that checks a HumanEval answer: the function, then the question's tests.

    The function is the first code block of the answer that defines it, after the model's thoughts if it marks their
    end; else the first code block; else the whole text. If that is only the body, it is placed after the question's
    prompt; if it is the whole function, after the prompt's imports and helpers.
    """
    text = answer.rpartition(_THOUGHT_ENDS)[2].partition(_THOUGHT)[0]  # drops an unfinished thought
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(question['entry_point'])}\b", re.MULTILINE)
    blocks = _BLOCK.findall(text) or [text]
    code = next(filter(defines.search, blocks), blocks[0])
    prompt = question["prompt"]
    # The prompt ends with a function that has only a docstring, so it is a complete program by itself.
    start = f"{prompt}\n    pass\n\n{code}" if defines.search(code) else f"{prompt}{code}"
    return f"{start}\n\n{question['test']}\n\ncheck({question['entry_point']})\n"
