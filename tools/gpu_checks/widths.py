"""What a micro-batch of a new width costs: compiled again, attention planned anew; and of a rounded one."""

import statistics

import torch
from torch._dynamo.utils import counters

from megatron_tip.models.gpt import HiddenStatesModel
from tools.gpu_checks.qwen3 import load_qwen3, packed_logits, write_qwen3
from tools.gpu_checks.ranks import join_alone
from tools.gpu_checks.task import Task
from tools.meter import seconds_of

_COUNT = 16


def new_and_rounded(task: Task) -> None:
    """Notes forward and backward passes over sequences of 16 lengths: met first, met again, and rounded up."""
    join_alone()
    folder, _ = write_qwen3(task, layers=2)
    model, *_ = load_qwen3(folder)
    base, multiple = task.size((700, 128), (9, 8))
    lengths = [base + task.size(37, 3) * place for place in range(_COUNT)]
    rounded = [-(-length // multiple) * multiple for length in lengths]
    _milliseconds(model, [base // 2], task)  # what is made once, whatever the width
    for name, widths in (("rounded", rounded), ("new", lengths)):
        graphs = _graphs()
        first = _milliseconds(model, widths, task)
        task.note(
            **{
                name: {
                    "shapes": len(set(widths)),
                    "ms_first": round(statistics.median(first), 2),
                    "ms_worst": round(max(first), 2),
                    "ms_all": round(sum(first), 1),
                    "compiled": _graphs() - graphs,
                    "ms_again": round(statistics.median(_milliseconds(model, widths, task)), 2),
                }
            }
        )
    task.note(cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled())


def _milliseconds(model: HiddenStatesModel, lengths: list[int], task: Task) -> list[float]:
    """Returns what a step through the model takes at each length."""
    device, times = torch.device(task.device), []
    for length in lengths:
        ids = torch.zeros(length, dtype=torch.int64, device=device)

        def step(ids: torch.Tensor = ids) -> None:
            packed_logits(model, [ids]).float().sum().backward()
            model.zero_grad(set_to_none=True)

        times.append(seconds_of(step, device) * 1e3)
    return times


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]
