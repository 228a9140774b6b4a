"""The results of operations on tensors without values: shapes, found once for each kind of arguments."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

aten = torch.ops.aten
_SEQUENCES = (list, tuple)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor among the results. `source`: which input it shares its storage with; -1: it has one of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int


@dataclass(frozen=True, slots=True)
class _Same:
    """A result that is an input itself: of an operation in place."""

    source: int


@dataclass(frozen=True, slots=True)
class _Results:
    """The results of an operation: `parts`, as `kind` holds them; a single one without a kind."""

    parts: tuple[_Made | _Same | None, ...]
    kind: Callable[[list[Any]], Any] | None


class Shapes:
    """The maker of results that have a shape and no memory: torch's fake tensors, behind a cache of its own.

    torch's cache asks some twenty things of every argument at each call, and holds neither lists of views nor calls
    with a tensor of values among the arguments: a simulated step takes twice as long with it.
    """

    _known: ClassVar[dict[tuple[Any, ...], _Results | None]] = {}

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.cache_enabled = False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the results of an operation, as fake tensors."""
        inputs: list[Tensor] = []
        key = _key_of(func, args, kwargs, inputs)
        if key is None:
            return self._mode.dispatch(func, (), args, kwargs)
        known = self._known.get(key)
        if known is not None:
            return self._made(known, inputs)
        result = self._mode.dispatch(func, (), args, kwargs)
        if key not in self._known:
            self._known[key] = _described(result, inputs)
        return result

    def _made(self, results: _Results, inputs: Sequence[Tensor]) -> Any:
        made = [self._part(part, inputs) for part in results.parts]
        return made[0] if results.kind is None else results.kind(made)

    def _part(self, part: _Made | _Same | None, inputs: Sequence[Tensor]) -> Tensor | None:
        if part is None:
            return None
        if isinstance(part, _Same):
            return inputs[part.source]
        with in_kernel_invocation_manager(self._mode):
            tensor = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
            if part.source >= 0:
                tensor.set_(inputs[part.source].untyped_storage(), part.offset, part.shape, part.stride)
        return FakeTensor(self._mode, tensor, part.device)


def _key_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> tuple[Any, ...] | None:
    """Returns what the results depend on, and appends the tensors among the arguments; None: on more than shapes."""
    if not _depends_on_shapes(func):
        return None
    parts: list[Any] = [func, torch.get_default_dtype(), *kwargs]
    _add((*args, *kwargs.values()) if kwargs else args, parts, inputs)
    return tuple(parts)


def _add(values: Iterable[Any], parts: list[Any], inputs: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            parts.append(next((place for place, one in enumerate(inputs) if one is value), -1))
            inputs.append(value)
            parts += (isinstance(value, FakeTensor), value.dtype, value.shape, value.stride(), value.storage_offset())
        elif isinstance(value, _SEQUENCES):
            parts += (type(value), len(value))
            _add(value, parts, inputs)
        else:
            parts += (type(value), value)  # 1 and 1.0 are equal, but not their results


@cache
def _depends_on_shapes(func: Any) -> bool:
    """Returns whether the shapes of an operation's results follow from those of its arguments."""
    tags = func.tags
    if torch.Tag.inplace_view in tags or func.overloadpacket in (aten.set_, aten.resize_, aten.lift, aten.lift_fresh):
        return False
    if func is aten.index.Tensor:
        return True  # by places: masks have been replaced
    return torch.Tag.data_dependent_output not in tags and torch.Tag.dynamic_output_shape not in tags


def _described(result: Any, inputs: Sequence[Tensor]) -> _Results | None:
    """Returns what is needed to make the same results again; None if that is not certain."""
    is_one = not isinstance(result, _SEQUENCES)
    storages = [tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else 0 for tensor in inputs]
    parts: list[_Made | _Same | None] = []
    own: set[int] = set()
    for tensor in (result,) if is_one else result:
        if tensor is None:
            parts.append(None)
            continue
        if (place := next((i for i, one in enumerate(inputs) if one is tensor), None)) is not None:
            parts.append(_Same(place))
            continue
        if not isinstance(tensor, FakeTensor) or tensor.requires_grad:
            return None
        storage = tensor.untyped_storage()
        source = storages.index(storage._cdata) if storage._cdata in storages else -1
        if source < 0 and (
            tensor.storage_offset() or storage._cdata in own or storage.nbytes() != _least_bytes(tensor)
        ):
            return None  # a part of a larger storage
        own.add(storage._cdata)
        shape, stride = tuple(tensor.shape), tensor.stride()
        parts.append(_Made(shape, stride, int(tensor.storage_offset()), tensor.dtype, tensor.fake_device, source))
    return _Results(tuple(parts), None if is_one else type(result))


def _least_bytes(tensor: Tensor) -> int:
    """Returns the bytes of the smallest storage that holds the tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
