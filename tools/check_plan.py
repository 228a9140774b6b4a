"""Compares simulated ranks with real ones: live bytes by phase, bytes of messages, floating-point operations, time.

    python -m tools.check_plan                    every layout; about a minute on an idle machine
    python -m tools.check_plan 2x1x2              one of them
    python -m tools.check_plan --time cpu.toml    seconds of a step, on an idle machine only

Trains tiny random models for one step in real gloo workers on this machine and simulates the same ranks. Exit code 1 if
a phase's live bytes differ by more than 10 %, or any message's bytes or the operations differ at all. `--time` takes
what `megatron-tip plan --calibrate cpu.toml` has written with OMP_NUM_THREADS=1, times the layouts of at most two ranks
instead, and ends with exit code 1 if a step differs by more than 25 %.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from megatron_tip.simulation.device import Device, find_device
from megatron_tip.simulation.plan import make_plan, planned_hosts
from tests.helpers.distributed import run_workers
from tests.helpers.measured_rank import peaks_of, traffic_of
from tests.helpers.simulation import LAYOUTS, configured, measured, simulated, timed
from tests.helpers.training import make_models

TOLERANCE = 0.1
TIME_TOLERANCE = 0.25


def main() -> None:
    """Prints one line per layout, rank and phase, or one per layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--time", metavar="CPU.toml")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = arguments.layouts or list(LAYOUTS)
    if arguments.time:
        device, few = find_device(arguments.time), [name for name in names if LAYOUTS[name].world_size <= 2]
        print(f"{'layout':<8}{'real, s':>12}{'planned, s':>12}{'difference':>12}")
        are_good = [_check_time(name, device) for name in few]
    else:
        print(f"{'layout':<8}{'rank':>5}  {'phase':<9}{'real bytes':>12}{'simulated':>12}{'difference':>12}")
        are_good = [_check(name) for name in names]
    sys.exit(0 if all(are_good) else 1)


def _check_time(name: str, device: Device) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        models, world_size = make_models(Path(folder)), LAYOUTS[name].world_size
        config = configured(name, models)
        real = max(run_workers(timed, world_size, models, config, timeout_seconds=600))
        plan = make_plan(config, planned_hosts(config, 1, world_size, device), device, batches=("typical",))
    planned = sum(plan.phase_seconds("typical").values())
    difference = planned / real - 1
    print(f"{name:<8}{real:>12.3f}{planned:>12.3f}{difference:>11.1%}")
    return abs(difference) <= TIME_TOLERANCE


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
