"""Four layers of Qwen3-4B in bfloat16: ours against transformers', logits and gradients."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tip.conversion.bridge import export_hf
from tools.gpu_checks.qwen3 import load_qwen3, packed_logits, write_qwen3
from tools.gpu_checks.ranks import join_alone
from tools.gpu_checks.task import Task

_FACTOR, _MORE = 2.0, 2e-3
"""How much further than transformers' own bfloat16 ours may be from float32: a factor, and this much more."""


def against_transformers(task: Task) -> None:
    """Requires logits and every gradient as close to float32's as transformers' own in bfloat16.

    The sequences are packed into one micro-batch for ours, and go one by one through transformers.
    """
    join_alone()
    folder, rounded = write_qwen3(task, layers=4)
    lengths, vocab_size = task.size((512, 131, 300), (24, 7, 16)), rounded.config.vocab_size
    generator = torch.Generator(task.device).manual_seed(1)
    sequences = [torch.randint(0, vocab_size, (n,), generator=generator, device=task.device) for n in lengths]
    exact = copy.deepcopy(rounded).float()
    wanted, theirs = _of_transformers(exact, sequences), _of_transformers(rounded, sequences)
    del exact, rounded
    ours = _ours(folder, sequences)
    task.require(ours.keys() == wanted.keys(), f"other gradients: {sorted(ours.keys() ^ wanted.keys())[:4]}")
    errors = {name: (_error(ours[name], wanted[name]), _error(theirs[name], wanted[name])) for name in wanted}
    worst = max(errors, key=lambda name: errors[name][0] / (_FACTOR * errors[name][1] + _MORE))
    task.note(logits={"ours": errors["logits"][0], "transformers": errors["logits"][1]})
    task.note(worst={"name": worst, "ours": errors[worst][0], "transformers": errors[worst][1]})
    for name, (own, other) in errors.items():
        task.require(own <= _FACTOR * other + _MORE, f"{name}: off by {own:.1e}, transformers' own by {other:.1e}")


def _of_transformers(model: Any, sequences: list[Tensor]) -> dict[str, Tensor]:
    """Returns the logits, and the gradients by name."""
    logits = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
    _loss(logits, sequences).backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().float(), **gradients}


def _ours(folder: Any, sequences: list[Tensor]) -> dict[str, Tensor]:
    model, checkpoint, groups = load_qwen3(folder)
    logits = packed_logits(model, sequences)
    _loss(logits, sequences).backward()
    for parameter in model.parameters():  # the exporter knows the names: let it take gradients
        assert parameter.grad is not None, "every parameter is used"
        parameter.data = parameter.grad
    gradients = {name: grad.float() for name, grad in export_hf(model, checkpoint.architecture, groups)}
    return {"logits": logits.detach().float(), **gradients}


def _loss(logits: Tensor, sequences: list[Tensor]) -> Tensor:
    return F.cross_entropy(logits.float(), torch.cat([sequence.roll(-1) for sequence in sequences]))


def _error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()
