"""Compares simulated ranks with real ones: live bytes by phase, bytes of messages, floating-point operations.

    python -m tools.check_plan                    every layout; about a minute on an idle machine
    python -m tools.check_plan 2x1x2              one of them

Trains tiny random models for one step in real gloo workers on this machine and simulates the same ranks. Exit code 1 if
a phase's live bytes differ by more than 10 %, or any message's bytes or the operations differ at all.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.helpers.distributed import run_workers
from tests.helpers.measured_rank import peaks_of, traffic_of
from tests.helpers.simulation import LAYOUTS, configured, measured, simulated
from tests.helpers.training import make_models

TOLERANCE = 0.1


def main() -> None:
    """Prints one line per layout, rank and phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = arguments.layouts or list(LAYOUTS)
    print(f"{'layout':<8}{'rank':>5}  {'phase':<9}{'real bytes':>12}{'simulated':>12}{'difference':>12}")
    are_good = [_check(name) for name in names]
    sys.exit(0 if all(are_good) else 1)


def _check(name: str) -> bool:
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        models, world_size = make_models(Path(folder)), LAYOUTS[name].world_size
        config = configured(name, models)
        real = run_workers(measured, world_size, models, config, timeout_seconds=600)
        for rank, (peaks, traffic, flops) in zip(simulated(config, world_size), real, strict=True):
            found = peaks_of(rank.ledger)
            for phase, num_bytes in peaks.items():
                difference = found[phase] / num_bytes - 1
                is_good &= abs(difference) <= TOLERANCE
                print(f"{name:<8}{rank.rank:>5}  {phase:<9}{num_bytes:>12,}{found[phase]:>12,}{difference:>11.1%}")
            same = traffic_of(rank.ledger) == traffic
            total = sum(num_bytes for _, num_bytes in traffic.values())
            same_flops = sum(work.matrix_flops for work in rank.ledger.work.values()) == flops
            print(
                f"{name:<8}{rank.rank:>5}  {total:,} bytes of messages: {'the same' if same else 'DIFFERENT'}; "
                f"{flops:,} floating-point operations: {'the same' if same_flops else 'DIFFERENT'}"
            )
            is_good &= same and same_flops
    return is_good


if __name__ == "__main__":
    main()
