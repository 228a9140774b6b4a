"""Everything that only a GPU can answer, in eight minutes and without a network.

    python tools/check_gpu.py --collect-wheels FOLDER                  # before, where there is a package index
    python tools/check_gpu.py --wheels FOLDER --out checks.jsonl       # on the machine with the GPU
    python tools/check_gpu.py --device cpu                             # the same at small sizes, over gloo

Each check runs in a process of its own with its own time limit, the most telling first; one JSON line each, as it ends,
to standard output and --out. A table follows at the end. docs/gpu_check.md lists the checks.

Exit code 0: every check that shows something to be right has passed. 1: one has not, or was not run for lack of time.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.gpu_checks import wheels
from tools.gpu_checks.checks import CHECKS
from tools.gpu_checks.run import Outcome, run_checks
from tools.gpu_checks.summary import table_of


def main() -> None:
    start, arguments = time.monotonic(), parsed()
    checks = [check for check in CHECKS if any(part in check.name for part in arguments.only or [""])]
    if arguments.collect_wheels is not None:
        print("\n".join(wheels.collect(arguments.collect_wheels)))
        return
    if arguments.list:
        print("\n".join(f"{check.name:<14} {check.seconds:>4.0f} s  {check.what}" for check in checks))
        return
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as name:
        if arguments.wheels is not None:
            wheels.install(arguments.wheels, Path(name))
        wheels.describe_package(Path(name))
        left = arguments.seconds - (time.monotonic() - start)
        outcomes = [told(one, arguments.out) for one in run_checks(checks, arguments.device, left, Path(name))]
    Console(width=150).print(table_of(outcomes))
    sys.exit(any(outcome.is_bad for outcome in outcomes))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, over gloo")
    parser.add_argument("--seconds", type=float, default=480.0, help="limit of all checks together (480)")
    parser.add_argument("--out", type=Path, help="write the JSON lines to this file too")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these wheels into a temporary folder")
    parser.add_argument("--collect-wheels", type=Path, metavar="FOLDER", help="fetch the wheels, and do nothing else")
    parser.add_argument("--only", action="append", help="only checks with this in their name; repeatable")
    parser.add_argument("--list", action="store_true", help="name the checks and their limits, and do nothing else")
    return parser.parse_args()


def told(outcome: Outcome, out: Path | None) -> Outcome:
    """Returns `outcome`, once its JSON line is printed and written."""
    line = json.dumps(outcome.record())
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")
    return outcome


if __name__ == "__main__":
    main()
