"""The complete state of a student and of a teacher that follows it, as Megatron's sharded state for any layout."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tip.conversion.tensor_load import load_tensors
from megatron_tip.errors import CheckpointError, WeightsError
from megatron_tip.models.student import Student
from megatron_tip.teachers.teacher import Teacher
from megatron_tip.training.checkpoints.distributed_optimizer_state import load_own_rows, mend_gathering, own_rows

_HOST_RANDOM_BYTES = 16384
"""Bytes for Python's and numpy's generators, which take at most 14,000 in decimal."""


def sharded_state(student: Student, teacher: Teacher[Any], *, is_loading: bool = False) -> dict[str, Any]:
    """Returns weights, optimizer, schedule and this rank's random states for `dist_checkpointing`, and what the teacher
    keeps.

    The distributed optimizer's shards are gathered over the data-parallel ranks ("fully_reshardable"). This takes host
    memory for the optimizer's complete float32 state of this rank's model part. Collective over the world.
    """
    metadata = {
        "dp_cp_group": student.groups.collection.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    complete_optimizer_state(student)
    for part in student.optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            mend_gathering(part)
    model: Any = student.model.sharded_state_dict(metadata=metadata)
    optimizer = student.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    if is_loading:  # objects, which Transformer Engine adds for fp8, are pickles and never read
        model = {key: value for key, value in model.items() if not isinstance(value, ShardedObject)}
        return {"model": model, "optimizer": optimizer, "teacher": teacher.sharded_state(metadata)}
    return {
        "model": model,
        "optimizer": optimizer,
        "teacher": teacher.sharded_state(metadata),
        "scheduler": student.scheduler.state_dict(),
        "random": _sharded_random_states(),
    }


def load_state(student: Student, teacher: Teacher[Any], shards: Path, *, with_random_states: bool) -> None:
    """Restores student and teacher from a `sharded_state` saved to `shards`. Collective over the world.

    Args:
        with_random_states: also restore this rank's; the world must have the size of the one that saved.

    Raises:
        CheckpointError: on every rank; something is missing or has another shape.
    """
    state = sharded_state(student, teacher, is_loading=True)
    parts = student.optimizer.chained_optimizers
    shapes = [part.pop("param_state", None) for part in _by_part(state["optimizer"], len(parts))]
    distributed = [(index, part) for index, part in enumerate(parts) if isinstance(part, DistributedOptimizer)]
    state["own_rows"] = {index: own_rows(part, shapes[index]) for index, part in distributed}
    if with_random_states:
        state["random"] = _sharded_random_states()
    try:
        loaded = load_tensors(state, shards)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    missing, unexpected = student.model.load_state_dict(loaded["model"], strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state")]
    assert not missing, f"parameters missing from Megatron's shards: {missing}"
    assert not unexpected, f"shards that are not parameters: {unexpected}"
    for part, content in zip(parts, _by_part(loaded["optimizer"], len(parts)), strict=True):
        _load_optimizer(part, content)
    for index, part in distributed:
        load_own_rows(part, shapes[index], loaded["own_rows"][index])
    complete_optimizer_state(student)
    teacher.load_sharded_state(loaded.get("teacher", {}))
    student.scheduler.load_state_dict(loaded["scheduler"])
    if with_random_states:
        _set_random_states({name: tensor[0] for name, tensor in loaded["random"].items()})


def _by_part(optimizer: dict[Any, Any], num_parts: int) -> list[dict[str, Any]]:
    """Returns the state of each part of a chained optimizer: the experts' parameters have one of their own."""
    return [optimizer] if num_parts == 1 else [optimizer[index] for index in range(num_parts)]


def _load_optimizer(part: Any, loaded: dict[str, Any]) -> None:
    """Loads the optimizer through Megatron; of the distributed one only what `own_rows` leaves out."""
    if isinstance(part.optimizer, torch.optim.Adam) and not isinstance(part, DistributedOptimizer):
        # Megatron leaves out a count of 0, and asks for it.
        loaded.get("optimizer", loaded)["state"].setdefault("common_step", torch.tensor(0.0))
    part.load_state_dict(loaded)


def complete_optimizer_state(student: Student) -> None:
    """Gives every parameter the state that torch's AdamW would create at its first step, and its own step count.

    Before the first step there is no state, and Megatron creates it without the count. After loading a distributed
    optimizer, all parameters share one count, which each step would raise once per parameter.
    """
    for part in student.optimizer.chained_optimizers:
        inner: Any = part.optimizer
        if not isinstance(inner, torch.optim.Adam):  # AdamW is one; fused ones count per parameter group
            part.init_state_fn(inner, part.config)
            for state in inner.state.values():
                state |= {name: _unviewed(value) for name, value in state.items()}
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = _unviewed(state[name]) if name in state else torch.zeros_like(parameter)


def _unviewed(value: Any) -> Any:
    """Returns a tensor of the same memory that is no view: what was read is one, whose base would keep the memory of an
    offloaded state.
    """
    return value.data if isinstance(value, torch.Tensor) else value


def _sharded_random_states() -> dict[str, ShardedTensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"random.{name}", tensor[None], (0, rank, size))
        for name, tensor in _random_states().items()
    }


def _random_states() -> dict[str, Tensor]:
    """Returns this process's generator states, uint8. Not this package, but a user's engine or rule may use them."""
    host = json.dumps([random.getstate(), _listed(np.random.get_state())], separators=(",", ":")).encode()
    assert len(host) <= _HOST_RANDOM_BYTES, "expected generator states that fit"
    states = {
        "host": torch.frombuffer(bytearray(host.ljust(_HOST_RANDOM_BYTES)), dtype=torch.uint8),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _listed(state: Any) -> list[Any]:
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in state]


def _set_random_states(states: dict[str, Tensor]) -> None:
    (kind, words, gauss), numpy_state = json.loads(bytes(states["host"].tolist()))
    random.setstate((kind, tuple(words), gauss))
    np.random.set_state(tuple(numpy_state))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())
