"""One check, in this process: python -m tools.gpu_checks.child NAME DEVICE FOLDER."""

import importlib
import sys
from pathlib import Path

from megatron_tip.cpu.lean_imports import lean_imports
from tools.gpu_checks.checks import CHECKS
from tools.gpu_checks.task import Task


def main(name: str, device: str, folder: Path) -> None:
    (check,) = [check for check in CHECKS if check.name == name]
    module, function = check.place.split(":")
    task = Task(device, folder)
    with lean_imports():
        imported = importlib.import_module(f"tools.gpu_checks.{module}")
    getattr(imported, function)(task)
    task.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
