"""Losses and statistics over a large vocabulary at Qwen3's shapes: errors, seconds, peak, host waits.

The cases are those of tools/bench_vocab_parallel.py, on the GPU.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_tip.vocab_parallel.kernel_choice import chosen_kernels, triton_problem
from tools.bench_vocab_parallel_cases import CASES, errors_of, measure, reference
from tools.bench_vocab_parallel_work import BETAS, Work, make_work
from tools.gpu_checks.task import Task
from tools.meter import host_waits, seconds_of

_FLOOR = "products"
_FLOAT32_TOLERANCE = 1e-4
_ROUNDED_VALUES = 3e-2
"""Logits in bfloat16 are off by up to 1/32 where most of the probability is, for some twenty tokens a row."""


def errors(task: Task) -> None:
    """Requires that every set of kernels gives the float64 values and gradients, as closely as its type allows.

    In bfloat16 the measure of gradients is plain torch, which rounds logits and their gradients alike.
    """
    _check_choice(task)
    for dtype, rows in (("bfloat16", task.size(4096, 96)), ("float32", task.size(2048, 96))):
        for divergence in BETAS:
            work = _work(task, rows=rows, hidden=task.size(2560, 32), dtype=dtype, divergence=divergence)
            expected = reference(work)
            plain = _errors_of("plain", work, expected)
            found = {
                f"{kernels} {kind}": _errors_of(case, _with(work, kernels=kernels), expected)
                for kernels in _kernel_sets(task)
                for kind, case in (("loss", "ours_loss"), ("scoring", "ours_scoring"))
            }
            largest = {name: max(one.values()) for name, one in {"plain": plain, **found}.items()}
            task.note(**{f"{divergence} {dtype}": largest})
            for name, one in found.items():
                for part, error in one.items():
                    allowed = _FLOAT32_TOLERANCE if dtype == "float32" else _allowed_in_bfloat16(part, plain)
                    message = f"{divergence} {dtype} {name}: {part} is off by {error:.1e}, expected {allowed:.1e}"
                    task.require(error <= allowed, message)


def speeds(task: Task) -> None:
    """Notes the figures of the loss of all rows and of scoring, at two widths, for the whole vocabulary and shards."""
    shapes = ((2560, 1), (2560, 8), (4096, 1), (2560, 2), (4096, 8), (4096, 2))
    for hidden, shards in task.size(shapes, shapes[:2]):
        work = _work(task, hidden=task.size(hidden, hidden // 128), shards=shards)
        floor = _figures(_FLOOR, _with(work, chunk_rows=task.size(2048, 64)))
        rows = {"products": floor}
        for kernels in reversed(_kernel_sets(task)):
            rows[f"loss, {kernels}"] = _figures("ours_loss", _with(work, kernels=kernels), floor)
            rows[f"scoring, {kernels}"] = _figures("ours_scoring", _with(work, kernels=kernels), floor)
        rows["scoring, loss of one in ten"] = _figures("ours_selected", _with(work, ratio=0.1), floor)
        task.note(**{f"H {hidden}, V/{shards}": rows})


def chunk_sizes(task: Task) -> None:
    """Notes the loss of all rows, and bare products, by rows per chunk."""
    work = _work(task, hidden=task.size(2560, 32))
    for rows in task.size((256, 512, 1024, 2048, 4096, 8192), (32, 64)):
        chunked = _with(work, chunk_rows=rows)
        floor = _figures(_FLOOR, chunked)
        task.note(**{f"chunks of {rows}": {"products": floor, "loss": _figures("ours_loss", chunked, floor)}})


def compiled(task: Task) -> None:
    """Notes the figures of torch.compile's kernels, and the seconds of their first call."""
    work = _with(_work(task, hidden=2560), kernels="compiled")
    for case in ("ours_loss", "ours_scoring"):
        first = seconds_of(CASES[case](work), torch.device(task.device))
        task.note(**{case: {"first_seconds": round(first, 1), **_figures(case, work)}})


def peers(task: Task) -> None:
    """Notes the figures of the JSD as others compute it, beside ours."""
    work = _work(task, hidden=task.size(2560, 32), divergence="jsd")
    rows = task.size(2048, 64)
    task.note(ours=_figures("ours_loss", work))
    task.note(plain_chunked=_figures("checkpointed", _with(work, chunk_rows=rows)))
    for is_compiled in task.size((False, True), (False,)):
        name = "liger, compiled" if is_compiled else "liger"
        try:
            case = _with(work, chunk_rows=task.size(1024, 64), compiled=is_compiled, warm_up_calls=3)
            task.note(**{name: _figures("liger", case)})
        except ImportError as error:
            task.note(**{name: f"not installed ({error})"})


def _check_choice(task: Task) -> None:
    """Requires that "auto" means Triton on a GPU."""
    device = torch.device(task.device, torch.cuda.current_device()) if task.on_gpu else torch.device("cpu")
    if task.on_gpu:
        problem = triton_problem(device)
        task.require(problem is None, f"Triton's kernels: {problem}")
    task.note(auto_means=chosen_kernels("auto", device))


def _kernel_sets(task: Task) -> Sequence[str]:
    return ("eager", "triton") if task.on_gpu else ("eager",)


def _work(
    task: Task,
    *,
    hidden: int,
    rows: int = 0,
    shards: int = 1,
    dtype: str = "bfloat16",
    divergence: str = "reverse_kl",
) -> Work:
    """Returns the inputs of one rank among `shards`, whose part of the vocabulary is all that it has."""
    vocab = task.size(151_936, 1024) // shards
    sizes = {"rows": rows or task.size(16_384, 128), "hidden": hidden, "vocab": vocab, "tp": 1}
    return make_work({**sizes, "dtype": dtype, "divergence": divergence, "options": {}, "device": task.device}, 0)


def _with(work: Work, **options: Any) -> Work:
    return replace(work, options=options)


def _figures(case: str, work: Work, floor: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns milliseconds (the median of three calls), peak megabytes, host waits, and times the floor's seconds."""
    call = CASES[case](work)
    try:
        found, _ = measure(call, work, 3)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    seconds = statistics.median(found["seconds"])
    figures = {"ms": round(seconds * 1e3, 2), "peak_mb": round(found["peak_bytes"] / 1e6, 1)}
    if floor is not None and "ms" in floor:
        figures["x_floor"] = round(figures["ms"] / floor["ms"], 2)
    if work.student_hidden.is_cuda and case != _FLOOR:
        figures["host_waits"] = host_waits(call)
    return figures


def _errors_of(case: str, work: Work, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    work.student_hidden.grad = work.student_head.grad = None
    return errors_of(work, CASES[case](work)(), expected, 0, is_mean=False)


def _allowed_in_bfloat16(part: str, plain: dict[str, float]) -> float:
    return _ROUNDED_VALUES if part == "values" else 1.5 * plain[part] + 1e-3
