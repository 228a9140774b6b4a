"""Tensor operations of a simulated rank: large values have only a shape, small and integer ones are real."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.shapes import Shapes

aten = torch.ops.aten

_SEQUENCES = (list, tuple)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FACTORIES = (aten.empty, aten.zeros, aten.ones, aten.full, aten.empty_strided, aten.rand, aten.randn)
_ROTATIONS = (aten.cos, aten.sin)
"""Operations whose results have only a shape: each layer would compute a whole sequence's rotary embeddings."""
_DEVICE, _READ = torch.ops.prim.device.default, aten._local_scalar_dense.default
_FREE = {aten.detach, aten.lift_fresh, aten.alias, aten.empty, aten.new_empty, aten.empty_strided, aten.empty_like}
"""Operations that touch no values."""


class CountedTensors(TorchDispatchMode):
    """A mode that enters each operation into a ledger: the storages it creates, its arithmetic, its messages."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would enter and leave its compiler at every call; nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # two of five calls, which would take the long way each time
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count_message(func, args)
            return func(*args, **kwargs)
        if func is _READ:
            self.ledger.host_syncs[self.ledger.phase] += 1
        inputs = tensors_in((*args, *kwargs.values()) if kwargs else args)
        result = self.run(func, args, kwargs, inputs)
        if self.ledger.is_paused:
            return result
        outputs = tensors_in((result,))
        for tensor in outputs:
            self.ledger.hold(tensor)
        if outputs and not func.is_view:
            self._count_work(func, args, kwargs, result, (*inputs, *outputs))
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]) -> Any:
        """Returns the operation's result. `inputs`: the tensors among its arguments."""
        return func(*args, **kwargs)

    def _count_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, tensors: Sequence[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet in _FREE:
            return
        flops = _flops(packet, args, kwargs, result)
        if not flops:
            self.ledger.operate(tensors)
            return
        work = self.ledger.work[self.ledger.phase]
        work.num_operations += 1
        work.matrix_flops += flops

    def _count_message(self, func: Any, args: tuple[Any, ...]) -> None:
        """Enters a message of a real process group."""
        name = func.overloadpacket._qualified_op_name.removeprefix("c10d::")
        if name == "barrier":
            return
        assert name in _MESSAGES, f"c10d::{name} is not counted"
        operation, place, has_peer = _MESSAGES[name]
        group = next(torch.distributed.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
        peer = torch.distributed.get_global_rank(group, args[2]) if has_peer else None
        self.ledger.send(operation, group.group_name, tensors, peer=peer)


_MESSAGES = {
    "allreduce_": ("all_reduce", 0, False),
    "allreduce_coalesced_": ("all_reduce", 0, False),
    "broadcast_": ("broadcast", 0, False),
    "allgather_": ("all_gather", 0, False),
    "_allgather_base_": ("all_gather", 0, False),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, False),
    "reduce_scatter_": ("reduce_scatter", 1, False),
    "_reduce_scatter_base_": ("reduce_scatter", 1, False),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, False),
    "gather_": ("gather", 1, False),
    "alltoall_base_": ("all_to_all", 1, False),
    "send": ("send", 0, True),
    "recv_": ("recv", 0, True),
}
"""c10d's operation -> its name, the place of the counted tensors among its arguments, whether the third is a peer."""


class SimulatedTensors(CountedTensors):
    """A mode in which floating-point tensors made from a size alone have a shape and no memory.

    Integers, masks, float64 and scalars are real, so that the product's own planning and selection run on values. An
    operation with a tensor without values returns one. Where the product reads such a value back to the host, it gets:
    of a float 1, of an integer 0, of a bool True ("all values are finite").
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._shapes = Shapes()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]) -> Any:
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            if func.overloadpacket not in _ROTATIONS and (inputs or not _is_shape_alone(func, args, kwargs)):
                return func(*args, **kwargs)
        elif func is _READ:
            return _assumed_scalar(args[0].dtype)
        packet = func.overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put):
            args = (args[0], _as_places(args[1]), *args[2:])
        elif packet is aten.masked_select:
            func, args = aten.index.Tensor, (args[0], _as_places([args[1]]))
        result = self._shapes.run(func, args, kwargs)
        # An operation in place on a real tensor leaves it as it is: nothing reads its value.
        is_in_place = packet.__name__.endswith("_") and not packet.__name__.startswith("__")
        if is_in_place and args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            return args[0]
        return result


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among an operation's arguments or results, at most one level deep."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _SEQUENCES):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def _value_of(leaf: Any) -> Any:
    return _assumed_scalar(leaf.dtype) if isinstance(leaf, FakeTensor) else leaf


def _assumed_scalar(dtype: torch.dtype) -> float | int | bool:
    return 1.0 if dtype.is_floating_point else dtype == torch.bool


def _is_shape_alone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func.overloadpacket not in _FACTORIES:
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if func.overloadpacket is aten.full and not isinstance(args[1], float):
        return False  # without a dtype, it has that of the value
    return dtype in _FLOATS and len(args[0]) > 0


def _as_places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the indices with each real mask replaced by the places where it holds."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            assert not isinstance(index, FakeTensor), "a mask without values was used to choose rows"
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Returns the floating-point operations of a matrix product or of attention; 0 for anything else."""
    if packet in _OWN_FLOPS:
        return _OWN_FLOPS[packet](*args)
    if packet in flop_counter.flop_registry:
        return flop_counter.flop_registry[packet](*args, **kwargs, out_val=result)
    return 0


def _addmm(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _linear(inputs: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * inputs.numel() * weight.shape[0]


def _attention(query: Tensor, key: Tensor, _: Tensor, __: float = 0.0, is_causal: bool = False, *___: Any) -> int:
    """Counts two products of length x length, of which a causal kernel skips half."""
    b, heads, length, head_dim = query.shape
    return 4 * b * heads * length * key.shape[2] * head_dim // (2 if is_causal else 1)


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> int:
    return _attention(query, key, value, 0.0, others[3]) * 5 // 2


_OWN_FLOPS: dict[Any, Callable[..., int]] = {
    aten.addmm_: _addmm,
    torch.ops.mkldnn._linear_pointwise: _linear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operations that torch's own table lacks."""


@contextmanager
def reads_back(ledger: Ledger) -> Iterator[None]:
    """Makes `torch.tensor` of tensors take assumed values in the block: it reads each one's memory, unseen by a mode.

    A mode for torch's functions would also see every attribute of a tensor that is read, which takes far longer.
    """
    library: Any = torch
    plain = library.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, list):
            ledger.host_syncs[ledger.phase] += sum(isinstance(one, Tensor) for one in tree_leaves(data))
            data = tree_map(_value_of, data)
        return plain(data, *args, **kwargs)

    library.tensor = tensor
    try:
        yield
    finally:
        library.tensor = plain
