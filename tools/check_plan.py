"""Compares simulated ranks with real ones: live bytes by phase, bytes of messages, operations, bytes moved.

    python -m tools.check_plan                         every case; some minutes on an idle machine
    python -m tools.check_plan 2x1x2 "1x1x1 offload"   two of them

Trains tiny random models for one step in real gloo workers on this machine and simulates the same ranks. Exit code 1 if
a phase's live bytes differ by more than 10 %, if any message's bytes or the operations differ at all (where replicas
share experts: by more than 15 %), or the bytes that leave and enter the device in a phase by a thousandth.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.helpers.distributed import run_workers
from tests.helpers.simulation import CASES, configured, measured, same_traffic, simulated, simulated_cost

TOLERANCE = 0.1
MOVED_TOLERANCE = 0.001  # AdamW's step counts stay where they are


def main() -> None:
    """Prints one line per case, rank and phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = arguments.cases or list(CASES)
    print(f"{'case':<26}{'rank':>5}  {'phase':<9}{'real bytes':>12}{'simulated':>12}{'difference':>12}")
    are_good = [_check(name) for name in names]
    sys.exit(0 if all(are_good) else 1)


def _check(name: str) -> bool:
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        models, world_size, tolerance = Path(folder), CASES[name].world_size, CASES[name].tolerance
        config = configured(name, models)
        real = run_workers(measured, world_size, models, config, timeout_seconds=600)
        for rank, cost in zip(simulated(config, world_size), real, strict=True):
            found, start = simulated_cost(config, rank), f"{name:<26}{rank.rank:>5}  "
            for phase, num_bytes in cost.peaks.items():
                difference = found.peaks[phase] / num_bytes - 1
                is_good &= abs(difference) <= TOLERANCE
                print(f"{start}{phase:<9}{num_bytes:>12,}{found.peaks[phase]:>12,}{difference:>11.1%}")
            total = sum(num_bytes for _, num_bytes in cost.traffic.values())
            moved = {phase: (size, found.moved.get(phase, 0)) for phase, size in cost.moved.items()}
            same = {
                f"{total:,} bytes of messages": same_traffic(found, cost, tolerance),
                f"{cost.flops:,} floating-point operations": abs(found.flops / cost.flops - 1) <= tolerance,
                f"{sum(cost.moved.values()):,.0f} bytes moved": found.moved.keys() == cost.moved.keys()
                and all(abs(one - other) <= MOVED_TOLERANCE * one for one, other in moved.values()),
            }
            alike = f"within {tolerance:.0%}" if tolerance else "the same"
            print(start + "; ".join(f"{what}: {alike if is_so else 'DIFFERENT'}" for what, is_so in same.items()))
            is_good &= all(same.values())
    return is_good


if __name__ == "__main__":
    main()
