"""Forward and backward passes of micro-batches through a model's pipeline, on Megatron's schedules."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip.batching.context_parts import context_part
from megatron_tip.batching.micro_batches import build_micro_batch
from megatron_tip.models.packing import boundaries
from megatron_tip.parallel.collectives import agree_on_maxima
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import MicroBatch

LastStage = Callable[[int, Tensor], Tensor | None]


def run_forward(
    model: torch.nn.Module,
    groups: ModelGroups,
    micro_batches: Sequence[MicroBatch],
    on_hidden_states: LastStage,
    *,
    held: list[Tensor] | None = None,
) -> None:
    """Runs every micro-batch forward, without gradient unless `held` takes the outputs.

    On the last stage, `on_hidden_states(index, hidden_states)` receives each micro-batch's final-norm output,
    `[s, 1, h]` (`[s/tp, 1, h]` under sequence parallelism), without gradient; its result is ignored. Under context
    parallelism each rank passes its own part of the micro-batches, of `s / cp` tokens. Collective over the replica's
    tp x cp x pp; over the world if replicas share experts (`in_step`).

    Args:
        held: receives the output of each micro-batch with its graph, for `run_forward_backward`; pp 1 only.
    """
    assert held is None or groups.grid.pp_size == 1, "a stage cannot hold what flows between stages"

    @torch.no_grad()
    def take(index: int, hidden_states: Tensor) -> None:
        if held is not None:
            held.append(hidden_states)
        if index < len(micro_batches):
            on_hidden_states(index, hidden_states.detach())

    filled = in_step(model, groups, micro_batches)
    with torch.set_grad_enabled(held is not None):
        _run_schedule(model, groups, filled, _outputs(model, groups, filled), take, forward_only=True)


def run_forward_backward(
    model: torch.nn.Module,
    groups: ModelGroups,
    micro_batches: Sequence[MicroBatch],
    loss_of: LastStage,
    *,
    held: list[Tensor] | None = None,
) -> None:
    """Runs every micro-batch forward and backward and reduces the gradients over the dp x cp ranks.

    On the last stage, `loss_of(index, hidden_states)` returns the micro-batch's part of the loss, a scalar that is
    summed over micro-batches, their parts and replicas without division: its weights are already in it. For a
    micro-batch without a selected token it must return a zero connected to `hidden_states`, so that every rank runs its
    backward.

    Args:
        held: the outputs that `run_forward` held for the same micro-batches. They take the place of the forward passes
            and are removed one by one, so that each backward pass frees its graph.
    """

    def loss_or_zero(index: int, hidden_states: Tensor) -> Tensor | None:
        return loss_of(index, hidden_states) if index < len(micro_batches) else hidden_states.sum() * 0.0

    filled = in_step(model, groups, micro_batches)
    outputs = _outputs(model, groups, filled) if held is None else _removed_from(held)
    _run_schedule(model, groups, filled, outputs, loss_or_zero, forward_only=False)


# These are generators, because `enumerate` keeps its last item, and with it the item's graph, until the next.
def _outputs(
    model: torch.nn.Module, groups: ModelGroups, micro_batches: Sequence[MicroBatch]
) -> Iterator[tuple[int, Tensor]]:
    """Yields each micro-batch's index and the stage's output, running the model when it is asked for the next."""
    for index, micro_batch in enumerate(micro_batches):
        ids, positions = micro_batch.input_ids[None], micro_batch.position_ids[None]
        packed = boundaries(model, micro_batch.lengths, cp_size=groups.grid.cp_size, cp_rank=groups.cp_rank)
        padding = micro_batch.rollout_indices[None] < 0
        yield index, model(ids, positions, None, packed_seq_params=packed, padding_mask=padding)


def _removed_from(held: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yields each micro-batch's index and its held output, which is no longer in `held`."""
    for index in range(len(held)):
        yield index, held.pop(0)


def _run_schedule(
    model: torch.nn.Module,
    groups: ModelGroups,
    micro_batches: Sequence[MicroBatch],
    outputs: Iterator[tuple[int, Tensor]],
    on_last_stage: LastStage,
    *,
    forward_only: bool,
) -> None:
    if not micro_batches:  # only a teacher replica without work: no other rank waits for its pipeline
        assert forward_only, "a student replica always has a micro-batch"
        return
    arguments: dict[str, Any] = {
        "forward_step_func": partial(_forward_step, on_last_stage=on_last_stage),
        "data_iterator": outputs,
        "model": model,
        "num_microbatches": len(micro_batches),
        # Ignored: with several stages, config.variable_seq_lengths sends each tensor's shape first.
        "seq_length": sum(micro_batches[0].lengths),
        "micro_batch_size": 1,
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
        "pg_collection": groups.collection,
    }
    if groups.grid.pp_size == 1:
        forward_backward_no_pipelining(**arguments)
    else:
        communicator = P2PCommunicator(groups.pp_group, get_model_config(model))
        forward_backward_pipelining_without_interleaving(p2p_communicator=communicator, **arguments)


def token_multiple(model: torch.nn.Module) -> int:
    """Returns the divisor of a micro-batch's tokens: sequence parallelism splits each part evenly over the tp ranks."""
    config = get_model_config(model)
    return config.tensor_model_parallel_size * config.context_parallel_size if config.sequence_parallel else 1


def in_step(model: torch.nn.Module, groups: ModelGroups, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """Returns the micro-batches, filled up with padding so that all replicas that share experts have equally many.

    A replica's tokens go to experts on the ranks of others, which must be in the same layer of a micro-batch of their
    own. Collective: one all-reduce of an integer over the world, between CPUs; none if no replicas share experts.
    """
    if not groups.grid.replicas_share_experts:
        return micro_batches
    (most,) = agree_on_maxima([len(micro_batches)])
    filler = _padding_alone(model, groups).to(next(model.parameters()).device)
    return [*micro_batches, *[filler] * (most - len(micro_batches))]


def _padding_alone(model: torch.nn.Module, groups: ModelGroups) -> MicroBatch:
    """Returns this rank's part of the shortest micro-batch that the model takes."""
    multiple = math.lcm(token_multiple(model), groups.grid.sequence_multiple)
    whole = build_micro_batch([], [], 0, token_multiple=multiple)
    return context_part(whole, cp_size=groups.grid.cp_size, cp_rank=groups.cp_rank)


def _forward_step(
    outputs: Iterator[tuple[int, Tensor]], _model: torch.nn.Module, *, on_last_stage: LastStage
) -> tuple[Tensor, Callable[..., Any]]:
    index, hidden_states = next(outputs)
    return hidden_states, partial(_finish, on_last_stage, index)


def _finish(on_last_stage: LastStage, index: int, hidden_states: Tensor, non_loss_data: bool = False) -> Any:
    result = on_last_stage(index, hidden_states)
    if non_loss_data:
        return None
    # With three values Megatron does not divide (config.calculate_per_token_loss); the count is not used.
    return result, torch.zeros((), dtype=torch.int, device=hidden_states.device), None
