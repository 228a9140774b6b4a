"""A trial of Triton's kernels, each against its eager namesake.

Nobody has compiled them for every GPU: some may not compile, or compute nonsense.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from megatron_tip.vocab_parallel import kernels

_ROWS = 2  # the second shows wrong row offsets
_DTYPES = (torch.float32, torch.bfloat16)

Run = Callable[..., tuple[Tensor, ...]]
"""A call of a kernel by its name, with its tensors; returns its results."""


def wrong_kernels(module: ModuleType, device: torch.device) -> list[str]:
    """Returns which kernels of `module` give other numbers than the eager ones, with the dtype; raises what they raise.

    On made-up logits of more than two tiles, with the maxima in the second, so that frames move and a tile is not full.
    """

    def eager(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return getattr(kernels, name)(*tensors, [None] * kernels.NUM_SCRATCH)

    def triton(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return getattr(module, name)(*tensors)

    wrong = []
    for dtype in _DTYPES:
        models = _logits(module.TILE, device).to(dtype)
        expected = _results(eager, models.float())
        for (name, actual), (_, right) in zip(_results(triton, models), expected, strict=True):
            # A gradient is rounded to the logits' dtype, by at most 2^-8. NaN is close to nothing.
            relative = 1e-2 if actual.dtype == torch.bfloat16 else 1e-4
            if not torch.allclose(actual.float(), right, rtol=relative, atol=1e-4 * float(right.abs().max())):
                wrong.append(f"{name} of {str(dtype).removeprefix('torch.')}")
    return list(dict.fromkeys(wrong))


def _logits(tile: int, device: torch.device) -> Tensor:
    """Returns `[2, rows, v]` float32 logits of two models."""
    width = 2 * tile + 70
    angles = torch.arange(2 * _ROWS * width, dtype=torch.float32, device=device).view(2, _ROWS, width)
    logits = 3 * torch.sin(0.7 * angles)
    logits[0, :, tile + 5] = 8.0
    logits[1, :, tile + tile // 2] = 7.0
    return logits


def _results(run: Run, models: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the results of every kernel with its name; a gradient is what it writes over the student's logits."""
    maxima_and_lse = [torch.stack([z.amax(-1), (z - z.amax(-1, True)).logsumexp(-1)], 1) for z in models.float()]
    offsets = torch.stack(maxima_and_lse, 2).flatten(1)
    rows, mix, weights = (offsets.new_tensor([row]).repeat(_ROWS, 1) for row in ([0.5, 2.0], [0.7, 0.3], [2.0]))
    calls = [  # the number of models, and kernels that follow each other on the same logits
        (2, [("statistics_sums",)]),
        (1, [("partition_sums",)]),
        (2, [("partition_sums",)]),
        (1, [("entropy_and_topk_sums",)]),
        (2, [("reverse_kl_sums",), ("reverse_kl_gradient", offsets, rows)]),
        (2, [("forward_kl_sums",), ("forward_kl_gradient", offsets, weights)]),
        (2, [("jsd_sums", offsets, mix), ("jsd_gradient", offsets, mix, rows)]),
        (1, [("scaled_probabilities", torch.cat([maxima_and_lse[0], weights], 1))]),
    ]
    for num_models, names_and_arguments in calls:
        copies = models[:num_models].clone().unbind(0)
        for name, *arguments in names_and_arguments:
            for result in run(name, *copies, *arguments) or (copies[0],):
                yield name, result
