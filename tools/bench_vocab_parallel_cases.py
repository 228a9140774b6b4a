"""One case of tools/bench_vocab_parallel.py in its own process; needs torch and the package that it measures.

    python tools/bench_vocab_parallel_cases.py TASK.json RANK RESULT.json

A case is a function of `Work` that returns a call to measure: forward and backward of one loss, including the head.
Sharded cases run in one process per rank.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_vocab_parallel_peers import checkpointed, liger, plain, trl_chunked, trl_jsd
from bench_vocab_parallel_work import BETAS, Call, Work, make_work
from meter import read_call
from torch import Tensor


def products(work: Work) -> Call:
    """Returns the four matrix products that a loss with gradients cannot avoid, in preallocated memory."""
    hidden, head, teacher_hidden, teacher_head = (tensor.detach() for tensor in work.models)
    memory = [hidden.new_empty(work.options["chunk_rows"], head.shape[0]) for _ in range(2)]
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)

    def call() -> None:
        for rows in torch.arange(len(hidden)).split(work.options["chunk_rows"]):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            z_s, z_t = (buffer[: len(rows)] for buffer in memory)
            torch.mm(hidden[part], head.T, out=z_s)
            torch.mm(teacher_hidden[part], teacher_head.T, out=z_t)
            torch.mm(z_s, head, out=grad_hidden[part])
            grad_head.addmm_(z_s.T, hidden[part], beta=0 if part.start == 0 else 1)

    return call


def our_products(work: Work) -> Call:
    """Returns the same products as our loss computes them."""
    from megatron_tip.vocab_parallel.products import add_head_gradient, hidden_gradient, logits_into

    hidden, head, teacher_hidden, teacher_head = (tensor.detach() for tensor in work.models)
    memory = [hidden.new_empty(work.options["chunk_rows"], head.shape[0]) for _ in range(2)]
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head, dtype=torch.float32)

    def call() -> None:
        chunks = (tensor.split(work.options["chunk_rows"]) for tensor in (hidden, teacher_hidden, grad_hidden))
        for number, (student, teacher, grad) in enumerate(zip(*chunks, strict=True)):
            z_s, z_t = (buffer[: len(student)] for buffer in memory)
            logits_into(z_s, student, head, 1.0)
            logits_into(z_t, teacher, teacher_head, 1.0)
            grad.copy_(hidden_gradient(z_s, head))
            add_head_gradient(grad_head, z_s, student, first=number == 0)

    return call


def ours_loss(work: Work) -> Call:
    from megatron_tip.vocab_parallel import divergence_loss

    _set_block_bytes(work.options)
    models = work.models

    def call() -> Tensor:
        loss = divergence_loss(models[:2], models[2:], work.vocabulary, divergence=work.divergence)
        loss.backward()
        return loss.detach()

    return call


def ours_scoring(work: Work) -> Call:
    """Returns the statistics of all rows; the result of the call is the divergence that the loss uses."""
    from megatron_tip.vocab_parallel import token_statistics

    _set_block_bytes(work.options)
    models, labels = work.models, work.student_hidden.new_zeros(len(work.student_hidden), dtype=torch.int64)

    def call() -> Tensor:
        with_jsd = work.divergence == "jsd"
        statistics = token_statistics(models[:2], models[2:], work.vocabulary, labels=labels, with_jsd=with_jsd)
        return getattr(statistics, work.divergence)

    return call


def ours_selected(work: Work) -> Call:
    """Returns scoring of all rows, followed by the loss of the share of them with the largest divergence."""
    from megatron_tip.vocab_parallel import divergence_loss

    score = ours_scoring(work)
    hidden, head, teacher_hidden, teacher_head = work.models
    budget = math.ceil(work.options["ratio"] * len(hidden))

    def call() -> None:
        scores = score()
        assert scores is not None, "scoring returns scores"
        rows = scores.topk(budget).indices
        student, teacher = (hidden[rows], head), (teacher_hidden[rows], teacher_head)
        divergence_loss(student, teacher, work.vocabulary, divergence=work.divergence).backward()

    return call


def _set_block_bytes(options: dict[str, Any]) -> None:
    from megatron_tip.vocab_parallel import chunks

    if "block_kib" in options:
        chunks.CPU_BLOCK_BYTES_PER_THREAD = options["block_kib"] * 1024


CASES: dict[str, Callable[[Work], Call]] = {
    function.__name__: function
    for function in (
        products,
        our_products,
        ours_loss,
        ours_scoring,
        ours_selected,
        plain,
        checkpointed,
        trl_jsd,
        trl_chunked,
        liger,
    )
}


def reference(work: Work) -> dict[str, Tensor]:
    """Returns the divergence of each row and both gradients of their sum, in float64."""
    head, teacher_head = work.student_head.detach().double(), work.teacher_head.double()
    grad_head, values, grads = torch.zeros_like(head), [], []
    for student, teacher in zip(work.student_hidden.detach().split(128), work.teacher_hidden.split(128), strict=True):
        hidden = student.double()
        logits = (hidden @ head.T).requires_grad_()
        beta = BETAS[work.divergence]
        log_p, log_q = logits.log_softmax(-1), (teacher.double() @ teacher_head.T).log_softmax(-1)
        log_m = log_q if beta == 1 else log_p
        if 0 < beta < 1:
            log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        student_part = (log_p.exp() * (log_p - log_m)).sum(-1) * (1 if beta == 1 else 1 - beta)
        teacher_part = (log_q.exp() * (log_q - log_m)).sum(-1) * (1 if beta == 0 else beta)
        parts = (student_part if beta > 0 else 0) + (teacher_part if beta < 1 else 0)
        assert isinstance(parts, Tensor), "one of the two parts counts"
        (grad,) = torch.autograd.grad(parts.sum(), logits)
        values.append(parts.detach())
        grads.append(grad @ head)
        grad_head.addmm_(grad.T, hidden)
    return {"values": torch.cat(values), "grad_hidden": torch.cat(grads), "grad_head": grad_head}


def errors_of(
    work: Work, result: Tensor | None, expected: dict[str, Tensor], rank: int, *, is_mean: bool
) -> dict[str, float]:
    """Returns the relative errors, in the Euclidean norm, of `result`: a loss with gradients, or row divergences."""
    if result is None:
        return {}
    if result.dim():
        return {"values": _error(result, expected["values"])}
    scale = len(expected["values"]) if is_mean else 1
    grad_hidden, grad_head = work.student_hidden.grad, work.student_head.grad
    assert grad_hidden is not None, "a loss leaves its gradients"
    assert grad_head is not None, "a loss leaves its gradients"
    wanted_head = expected["grad_head"].chunk(len(expected["grad_head"]) // len(grad_head))[rank]
    return {
        "values": _error(result * scale, expected["values"].sum()),
        "grad_hidden": _error(grad_hidden * scale, expected["grad_hidden"]),
        "grad_head": _error(grad_head * scale, wanted_head),
    }


def _error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def measure(call: Call, work: Work, num_calls: int) -> tuple[dict[str, Any], Tensor | None]:
    """Returns each call's seconds after warm-up, peak bytes above those held before, bytes sent, last result."""
    for _ in range(work.options.get("warm_up_calls", 1)):  # compiles, and creates what a library caches
        call()
    sent, readings, result = _count_bytes_sent(), [], None

    def begin() -> None:
        sent.clear()
        if dist.is_initialized():
            dist.barrier()

    for _ in range(num_calls):
        result = None
        work.student_hidden.grad = work.student_head.grad = None
        reading, result = read_call(call, work.student_hidden.device, at_start=begin)
        readings.append(reading)
    figures = {name: [getattr(one, name) for one in readings] for name in ("seconds", "cpu_seconds")}
    peak = max(one.peak_bytes for one in readings)
    return {**figures, "peak_bytes": peak, "sent_bytes": sum(sent), "collectives": len(sent)}, result


def _count_bytes_sent() -> list[int]:
    """Returns a list to which every later all-reduce and all-gather adds the size of its message."""
    sent: list[int] = []
    for name, message_place in (("all_reduce", 0), ("all_gather", 1)):
        original = getattr(dist, name)

        def counted(*args: Any, original: Any = original, place: int = message_place, **kwargs: Any) -> Any:
            sent.append(args[place].numel() * args[place].element_size())
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    return sent


def main(task_path: Path, rank: int, result_path: Path) -> None:
    task = json.loads(task_path.read_text())
    torch.set_num_threads(task["threads"])
    if task["tp"] > 1:
        file = f"file://{result_path.parent / 'store'}"
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=task["tp"])
    work = make_work(task, rank)
    reference_path = Path(task["reference"])
    if task["case"] == "reference":
        torch.save(reference(work), reference_path)
        return
    measured, result = measure(CASES[task["case"]](work), work, task["calls"])
    if reference_path.exists():
        expected = torch.load(reference_path, mmap=True)
        measured["errors"] = errors_of(work, result, expected, rank, is_mean=task["case"] == "liger")
    result_path.write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
