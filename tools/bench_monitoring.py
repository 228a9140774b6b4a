"""The cost of monitoring: a sample by the thread, and the two all-reduces of a step.

    python tools/bench_monitoring.py [--workers 3] [--step-seconds 10.8] [--every-seconds 5]

Prints the seconds per sample and per step, and both as a share of a run whose steps take --step-seconds (by default the
pruned pair's).
"""

import time
from typing import Annotated

import typer
from workers import run_in_workers


def main(
    workers: Annotated[int, typer.Option(min=1, help="Workers on this machine.")] = 3,
    step_seconds: Annotated[float, typer.Option(help="Length of the step that the cost is compared with.")] = 10.8,
    every_seconds: Annotated[float, typer.Option(help="monitoring.every_seconds.")] = 5.0,
) -> None:
    """Measure the cost of monitoring."""
    run_in_workers(lambda: None, lambda: measure(step_seconds, every_seconds), workers)


def measure(step_seconds: float, every_seconds: float, calls: int = 200) -> None:
    """Measures on one worker. Collective over the world; rank 0 prints."""
    import torch
    import torch.distributed as dist

    from megatron_tip.observability.monitor import Monitor
    from megatron_tip.parallel.distributed import destroy_distributed, init_distributed

    worker = init_distributed()
    monitor = Monitor(worker.device, every_seconds=3600.0)
    seconds = {}
    for name, call in (("sample", monitor.sample), ("step", monitor.step_metrics)):
        call()
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        seconds[name] = (time.perf_counter() - start) / calls
        seconds[f"{name}, CPU"] = (time.process_time() - cpu_start) / calls
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64, device=worker.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    sample, sample_cpu, step, step_cpu = slowest.tolist()
    share = sample / every_seconds + step / step_seconds
    if worker.rank == 0:
        print(f"a sample {sample * 1e3:.2f} ms ({sample_cpu * 1e3:.2f} ms of CPU), every {every_seconds:g} s")
        print(f"a step {step * 1e3:.2f} ms ({step_cpu * 1e3:.2f} ms of CPU), every {step_seconds:g} s")
        print(f"share of the run: {share:.3%}")
    destroy_distributed()


if __name__ == "__main__":
    typer.run(main)
