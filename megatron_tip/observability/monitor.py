"""GPU and host monitoring of every worker, sampled in a thread and reduced over the workers once per step."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import psutil
import torch
import torch.distributed as dist

from megatron_tip.observability.gpu import GpuReader

logger = logging.getLogger(__name__)

Over = Literal["sum", "max", "mean"]


@dataclass(frozen=True)
class Figure:
    """A reported figure.

    `source`: the name of the sampled value. `in_step`: how a step's samples are combined. `over_ranks`: how the
    workers' values are combined.
    """

    name: str
    source: str
    in_step: Over
    over_ranks: Over
    sign: float = 1.0  # -1: for a minimum


FIGURES = (
    Figure("gpu/memory_used_max_bytes", "memory_used_bytes", "max", "max"),
    Figure("gpu/utilisation_mean_percent", "utilisation_percent", "mean", "mean"),
    Figure("gpu/power_total_watts", "power_watts", "mean", "sum"),
    Figure("gpu/temperature_max_celsius", "temperature_celsius", "max", "max"),
    Figure("gpu/throttled_ranks", "throttled", "max", "sum"),
    Figure("gpu/nvlink_errors", "nvlink_errors", "max", "sum"),
    Figure("host/cpu_mean_percent", "cpu_percent", "mean", "mean"),
    Figure("host/rss_total_bytes", "rss_bytes", "max", "sum"),
    Figure("host/memory_available_min_bytes", "memory_available_bytes", "max", "max", sign=-1.0),
)


class Monitor:
    """A context manager that samples this worker's GPU and host. Without a GPU it reports only the host's figures."""

    def __init__(self, device: torch.device, every_seconds: float) -> None:
        """Takes the seconds between samples; a step that ends sooner takes its own sample."""
        self._device = device
        self._every_seconds = every_seconds
        gpu = _gpu_reader(device)
        self._readers: list[Callable[[], dict[str, float]]] = [self._host, *([gpu.read] if gpu else [])]
        self._process = psutil.Process()
        self._samples: list[dict[str, float]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def step_metrics(self) -> dict[str, float]:
        """Returns the figures since the last call, the same on every rank.

        Collectives over the world: one all-reduce of sums, one of maxima.
        """
        with self._lock:
            samples, self._samples = self._samples, []
        return reduce_figures(in_step(samples or [self.sample()]), self._device)

    def sample(self) -> dict[str, float]:
        """Returns the current values of this worker.

        `cpu_percent`: of the host's processors, since the last sample. `rss_bytes`: of this process. Never raises: what
        cannot be read is logged once and then left out.
        """
        values: dict[str, float] = {}
        for read in list(self._readers):
            try:
                values |= read()
            except Exception as error:  # a broken sensor must not end a run
                self._readers.remove(read)
                logger.warning("monitoring: left out from now on: %s: %s", type(error).__name__, error)
        return values

    def _host(self) -> dict[str, float]:
        return {
            "cpu_percent": psutil.cpu_percent(),
            "rss_bytes": float(self._process.memory_info().rss),
            "memory_available_bytes": float(psutil.virtual_memory().available),
        }

    def _run(self) -> None:
        while not self._ended.wait(self._every_seconds):
            values = self.sample()
            with self._lock:
                self._samples.append(values)

    def __enter__(self) -> Self:
        psutil.cpu_percent()  # the first call has no earlier one to compare with
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def in_step(samples: list[dict[str, float]]) -> dict[str, float]:
    """Returns the figures that one worker's samples of a step contain, one value each, by name."""
    values = {}
    for figure in FIGURES:
        found = [figure.sign * sample[figure.source] for sample in samples if figure.source in sample]
        if found:
            values[figure.name] = max(found) if figure.in_step == "max" else sum(found) / len(found)
    return values


def reduce_figures(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Returns the figures over all workers, without those that no worker has. Two all-reduces over the world."""
    has = [float(figure.name in values) for figure in FIGURES]
    sums = torch.tensor([*has, *(values.get(f.name, 0.0) for f in FIGURES)], dtype=torch.float64, device=device)
    lowest = float("-inf")
    maxima = torch.tensor([values.get(f.name, lowest) for f in FIGURES], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    counts, totals = sums.tolist()[: len(FIGURES)], sums.tolist()[len(FIGURES) :]
    reduced = {}
    for figure, count, total, largest in zip(FIGURES, counts, totals, maxima.tolist(), strict=True):
        if count:
            over: dict[Over, Callable[[], float]] = {
                "sum": lambda total=total: total,
                "mean": lambda total=total, count=count: total / count,
                "max": lambda largest=largest: largest,
            }
            reduced[figure.name] = figure.sign * over[figure.over_ranks]()
    return reduced


def _gpu_reader(device: torch.device) -> GpuReader | None:
    if device.type != "cuda":
        return None
    return GpuReader.open(str(torch.cuda.get_device_properties(device).uuid))
