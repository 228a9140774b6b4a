"""The way of rollouts from the first process, where the engine lives, to all others: tensors, no pickle."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tip.errors import EngineError, PeerError, ServersLostError
from megatron_tip.parallel.stop import StopRequested
from megatron_tip.records import Rollout
from megatron_tip.rollout.engine import FINISH_REASONS


def broadcast_rollouts(
    generate: Callable[[], Sequence[Rollout] | None],
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str = "cpu",
) -> list[Rollout] | None:
    """The rollouts that `generate` returns on the first rank of `group`, on all its ranks; None when it returns None.

    `generate` is called on that rank alone. Collectives: 4 broadcasts (2 when it fails, 1 for None) of a header, of
    seven numbers a rollout, of the ids with the environment's spans and of the logprobs. `group=None`: the whole world.

    Args:
        device: where the travelling tensors lie; what the group's backend carries.

    Raises:
        StopRequested, ServersLostError: on all ranks alike, when `generate` raised it: they may end the run together.
        PeerError: on all other ranks, when `generate` raised anything else, its `cause` "EngineError" for one of
            those; the first rank raises what `generate` did.
    """
    source = dist.get_global_rank(group, 0) if group is not None else 0

    def sent(tensor: Tensor) -> Tensor:
        on_device = tensor.to(device)
        dist.broadcast(on_device, src=source, group=group)
        return on_device.cpu()

    if dist.get_rank() != source:
        return _receive(sent)
    try:
        generated = generate()
        rollouts = list(generated or ())
        parts = _to_tensors(rollouts)
    except BaseException as error:  # also Ctrl-C: the other ranks wait in the first broadcast
        kind = EngineError if isinstance(error, EngineError) else type(error)
        kind = ServersLostError if isinstance(error, ServersLostError) else kind
        message = torch.frombuffer(bytearray(f"{kind.__name__}: {error}", "utf-8"), dtype=torch.uint8)
        sent(torch.tensor([_FAILED, len(message), 0]))
        sent(message)
        raise
    if generated is None:
        sent(torch.tensor([_NOTHING, 0, 0]))
        return None
    table, ids, logprobs = parts
    for tensor in (torch.tensor([len(table), len(ids), len(logprobs)]), table, ids, logprobs):
        sent(tensor)
    return rollouts


_FAILED, _NOTHING = -1, -2
"""In the place of the number of rollouts: the first rank failed; has none yet."""


def _receive(sent: Callable[[Tensor], Tensor]) -> list[Rollout] | None:
    num_rollouts, num_ids, num_logprobs = sent(torch.zeros(3, dtype=torch.int64)).tolist()
    if num_rollouts == _NOTHING:
        return None
    if num_rollouts < 0:
        message = bytes(sent(torch.zeros(num_ids, dtype=torch.uint8)).tolist()).decode()
        cause, _, text = message.partition(": ")
        if cause == StopRequested.__name__:
            raise StopRequested(signal.Signals[text])
        if cause == ServersLostError.__name__:
            raise ServersLostError(text)
        raise PeerError(f"rollouts: the first process failed with {message}", cause=cause)
    table = sent(torch.zeros((num_rollouts, 7), dtype=torch.int64))
    ids = sent(torch.zeros(num_ids, dtype=torch.int64))
    logprobs = sent(torch.zeros(num_logprobs, dtype=torch.float64))
    return _from_tensors(table, ids, logprobs)


def _to_tensors(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [
        (
            rollout.prompt_index,
            rollout.sample_index,
            len(rollout.prompt_ids),
            len(rollout.response_ids),
            FINISH_REASONS.index(rollout.finish_reason),
            rollout.weight_version,
            len(rollout.environment_spans),
        )
        for rollout in rollouts
    ]
    ids = [
        number
        for rollout in rollouts
        for number in (*rollout.prompt_ids, *rollout.response_ids, *chain.from_iterable(rollout.environment_spans))
    ]
    logprobs = [logprob for rollout in rollouts for logprob in rollout.rollout_logprobs]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)
    assert len(logprobs) == int(table[:, 3].sum()), "a rollout without one logprob a response token"
    return table, torch.tensor(ids, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float64)


def _from_tensors(table: Tensor, ids: Tensor, logprobs: Tensor) -> list[Rollout]:
    all_ids, all_logprobs = ids.tolist(), logprobs.tolist()
    rollouts = []
    first_id = first_logprob = 0
    for prompt_index, sample_index, prompt_length, length, reason, weight_version, num_spans in table.tolist():
        response_start, spans_start = first_id + prompt_length, first_id + prompt_length + length
        end = spans_start + 2 * num_spans
        rollouts.append(
            Rollout(
                prompt_index=prompt_index,
                sample_index=sample_index,
                prompt_ids=tuple(all_ids[first_id:response_start]),
                response_ids=tuple(all_ids[response_start:spans_start]),
                rollout_logprobs=tuple(all_logprobs[first_logprob : first_logprob + length]),
                finish_reason=FINISH_REASONS[reason],
                weight_version=weight_version,
                environment_spans=tuple(
                    zip(all_ids[spans_start:end:2], all_ids[spans_start + 1 : end : 2], strict=True)
                ),
            )
        )
        first_id, first_logprob = end, first_logprob + length
    return rollouts
