"""Failure of ranks together: an error of one rank is raised on all, so none is left waiting in a collective."""

import json
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_tip import errors
from megatron_tip.errors import MegatronTipError, PeerError
from megatron_tip.parallel.collectives import broadcast_bytes, gather_json, waiting_device
from megatron_tip.parallel.stop import StopRequested

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETURNED, _RAISED = b"\0", b"\1"


def run_on(
    rank: int,
    action: Callable[[], T],
    *,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    encode: Callable[[T], bytes] = lambda value: json.dumps(value).encode(),
    decode: Callable[[bytes], Any] = json.loads,
) -> T:
    """Runs `action` on one rank and returns its result on every rank of `group`, or raises its failure on every rank.

    Args:
        rank: the only global rank that runs `action`.
        device: device of the broadcast bytes; the group's backend must support it.
        group: `None` means the world.
        encode, decode: conversion of the result to bytes and back; JSON by default. `rank` itself does not convert.

    Collectives: two broadcasts (length, bytes).

    Raises:
        What `action` raises: on `rank` the original error; on the others the same class with the same message if it
        is a StopRequested or one of `errors`, otherwise a PeerError, because they do not have the traceback.
    """
    if dist.get_rank() != rank:
        content = broadcast_bytes(b"", source=rank, device=device, group=group)
        if content[:1] == _RAISED:
            raise _failure_of(rank, *json.loads(content[1:]))
        return decode(content[1:])
    try:
        value = action()
        content = _RETURNED + encode(value)
    except BaseException as error:  # even Ctrl-C: the other ranks wait in the broadcast
        broadcast_bytes(_RAISED + json.dumps(_described(error)).encode(), source=rank, device=device, group=group)
        raise
    broadcast_bytes(content, source=rank, device=device, group=group)
    return value


def raise_together(
    failure: BaseException | None, *, device: torch.device | str, group: dist.ProcessGroup | None = None
) -> None:
    """Raises one failure of the group, the same on all ranks; returns if no rank of `group` has one.

    A failure that is not one of `errors` comes first, because it is a bug; then the lowest rank's. A rank with another
    failure logs its own.

    Args:
        failure: this rank's failure, if any.
        device: device of the exchanged values.
        group: `None` means the world.

    Collectives: one all-reduce of an integer, over the world between CPUs (see `broadcast_bytes`); after a failure also
    two all-gathers.

    Raises:
        As `run_on`.
    """
    met = torch.tensor(failure is not None, dtype=torch.int32, device=waiting_device(device, group))
    dist.all_reduce(met, op=dist.ReduceOp.MAX, group=group)
    if not met:
        return
    gathered = gather_json(_described(failure) if failure is not None else None, device=device, group=group)
    place = min((i for i, one in enumerate(gathered) if one), key=lambda i: (_class_of(gathered[i][0]) is not None, i))
    rank = dist.get_global_rank(group, place) if group is not None else place
    if failure is not None:
        if dist.get_rank() == rank:
            raise failure
        if list(_described(failure)) != gathered[place]:
            logger.error("%s: %s", type(failure).__name__, failure)
    raise _failure_of(rank, *gathered[place]) from failure


@contextmanager
def together(*, device: torch.device | str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Runs a block on every rank of `group` and raises what any of them met in it on all of them.

    The block may do different things on different ranks, but its collectives must come to their end whatever fails in
    it. Collectives and errors are those of `raise_together`.
    """
    failure = None
    try:
        yield
    except BaseException as error:  # Ctrl-C too: the other ranks wait in the collective
        failure = error
    raise_together(failure, device=device, group=group)


def _described(error: BaseException) -> tuple[str, str]:
    """Returns the class name and message of `error`, from which `_failure_of` recreates it.

    The class is the nearest base class that `errors` has; if there is none, the error's own.
    """
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if _class_of(name)), names[0]), str(error)


def _class_of(name: str) -> type[BaseException] | None:
    """Returns the class called `name` if any rank can raise it, otherwise `None`."""
    if name == StopRequested.__name__:
        return StopRequested
    found = getattr(errors, name, None)
    is_ours = isinstance(found, type) and issubclass(found, MegatronTipError) and found is not MegatronTipError
    return found if is_ours else None


def _failure_of(rank: int, name: str, message: str) -> BaseException:
    """Returns the failure of rank `rank`, for another rank to raise."""
    kind = _class_of(name)
    if kind is StopRequested:
        return StopRequested(signal.Signals[message])
    if kind is None:
        return PeerError(f"rank {rank} failed with {name}: {message}; see that rank's own message for the place")
    failure = kind(message)
    assert isinstance(failure, MegatronTipError), "checked by _class_of"
    failure.met_on_rank = rank
    return failure
