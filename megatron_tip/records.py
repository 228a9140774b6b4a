"""The records shared between packages: prompts, rollouts, micro-batches, teacher rows and selections.

Shape letters: `s` tokens of a micro-batch, `n` valid tokens ("rows") of one data-parallel replica, `K` support size. A
row is one position of `loss_mask`. Rows are ordered by micro-batch, then sequence, then position.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

N = TypeVar("N", int, float)


class Numbers(Sequence[N]):
    """A tuple of ids or of logprobs, held as one array, and equal to the tuple of the same numbers.

    A step's rollouts have millions of numbers, and every rank holds them: Python's own take four times the memory, and
    their making takes longer than their transport.
    `array`: `[n]` int64 or float64, read-only.
    """

    __slots__ = ("array",)

    def __init__(self, values: Iterable[N] | np.ndarray, kind: type[N]) -> None:
        """Takes over an array of the right dtype without a copy. `kind`: int for int64, float for float64.

        Raises:
            ValueError: a value would not be kept as it is: a fraction or a text as an id, an id outside int64, None.
        """
        dtype = np.int64 if kind is int else np.float64
        array = values if isinstance(values, np.ndarray) else _converted(values, dtype)
        self.array = array.view()
        self.array.flags.writeable = False
        assert array.dtype == dtype, f"expected {np.dtype(dtype)}, got {array.dtype}"

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[N]:
        return iter(self.array.tolist())

    @overload
    def __getitem__(self, place: int) -> N: ...
    @overload
    def __getitem__(self, place: slice) -> "Numbers[N]": ...
    def __getitem__(self, place: int | slice) -> "N | Numbers[N]":
        return self._of(self.array[place]) if isinstance(place, slice) else self.array[place].item()

    def __add__(self, other: "Numbers[N]") -> "Numbers[N]":
        return self._of(np.concatenate([self.array, other.array]))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbers):
            return np.array_equal(self.array, other.array)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Numbers, (self.array, int if self.array.dtype == np.int64 else float)

    def _of(self, array: np.ndarray) -> "Numbers[N]":
        return Numbers(array, int if array.dtype == np.int64 else float)  # type: ignore[arg-type]


def _converted(values: Iterable[int] | Iterable[float], dtype: type[np.generic]) -> np.ndarray:
    # numpy given the dtype would make 1 of 1.9 and NaN of None; left to choose, it shows what it found.
    array = np.array(values if isinstance(values, (list, tuple)) else tuple(values))
    if array.size and (array.ndim != 1 or array.dtype.kind not in ("i" if dtype is np.int64 else "if")):
        expected = "ids in the range of int64" if dtype is np.int64 else "floats"
        raise ValueError(f"expected {expected}, got {array.tolist()!r:.80}")
    return array.astype(dtype, copy=False)


def token_ids(values: Iterable[int]) -> Numbers[int]:
    """Returns `values` as an array of ids; the same object if they are one already."""
    return values if isinstance(values, Numbers) else Numbers(values, int)


def logprobs(values: Iterable[float]) -> Numbers[float]:
    """Returns `values` as an array of log-probabilities; the same object if they are one already."""
    return values if isinstance(values, Numbers) else Numbers(values, float)


@dataclass(frozen=True)
class Prompt:
    """One prompt, already rendered through the chat template and tokenised.

    `index`: its fixed place in the prompt source. `text`: what the model sees. `teacher`: the name of the teacher that
    scores its rollouts; "" if the run has only one. `teacher_prompt_ids`: what the teacher reads in place of
    `prompt_ids`; empty: the same.
    """

    index: int
    text: str
    prompt_ids: tuple[int, ...]
    teacher: str = ""
    teacher_prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled response, as token ids. Takes any sequences for its ids and logprobs.

    `rollout_logprobs`: one per response token, the natural log of its probability under the distribution that it was
    sampled from; 0 for tokens of the environment. `finish_reason`: "stop" (the last response id is a sampled stop id),
    "length" (cut off, not a complete answer) or "turns" (the environment wanted more turns than allowed).
    `weight_version`: the training step whose weights generated it; the oldest, if there were several.

    `environment_spans`: half-open ranges of `response_ids` that the student did not generate: the text of an
    environment or a tool between its turns, with the chat template's delimiters. They are in order, do not touch each
    other, and are never at the start or the end; a single-turn response has none. `teacher`, `teacher_prompt_ids`: its
    prompt's.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: Numbers[int]
    response_ids: Numbers[int]
    rollout_logprobs: Numbers[float]
    finish_reason: str
    weight_version: int
    environment_spans: tuple[tuple[int, int], ...] = ()
    teacher: str = ""
    teacher_prompt_ids: Numbers[int] = field(default_factory=lambda: token_ids(()))

    def __post_init__(self) -> None:
        """Turns ids and logprobs into arrays."""
        object.__setattr__(self, "prompt_ids", token_ids(self.prompt_ids))
        object.__setattr__(self, "response_ids", token_ids(self.response_ids))
        object.__setattr__(self, "teacher_prompt_ids", token_ids(self.teacher_prompt_ids))
        object.__setattr__(self, "rollout_logprobs", logprobs(self.rollout_logprobs))

    def as_the_teacher_reads_it(self) -> "Rollout":
        """Returns the rollout with the teacher's prompt in place of the student's; itself if they are the same."""
        if not len(self.teacher_prompt_ids):
            return self
        return replace(self, prompt_ids=self.teacher_prompt_ids, teacher_prompt_ids=())

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_generated(self) -> int:
        """The number of response tokens that the student generated."""
        return self.num_generated_before(len(self.response_ids))

    def num_generated_before(self, position: int) -> int:
        """Returns how many of the first `position` response tokens the student generated."""
        return position - sum(max(0, min(end, position) - start) for start, end in self.environment_spans)


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences that go through the model as one, packed end to end; equal on all tp and pp ranks of a replica.

    `lengths`: the tokens of each sequence, in order. A token attends to its own sequence only. Padding, if the layout
    asks for it, is at the end of a sequence or one more sequence at the end. All tensors are `[s]`, so that a part of
    the tokens is a part of each: under context parallelism a rank has `[s / cp]`, and the `lengths` of the whole.

    `position_ids`: the token's place in its sequence. `labels`: the sequence's next token, for which the position is
    scored, wherever `response_mask` is True. `response_mask`: the label was generated. `loss_mask` (a subset): the
    label may be supervised. `rollout_indices`: the sequence's place in the step's rollout list; -1 for padding.
    `response_positions`: the label's 0-based place in the response; below 0 if it belongs to the prompt.
    """

    lengths: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    rollout_indices: Tensor
    response_positions: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Returns the micro-batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lengths"}
        return MicroBatch(self.lengths, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def num_valid(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class TokenIndex:
    """The place of each row in the whole rollout batch. It breaks ties and does not depend on the layout.

    `rollout_index`: `[n]` int64, place in the step's rollout list (prompt-major). `position`: `[n]` int64, 0-based
    place within the response, including the environment's tokens.
    """

    rollout_index: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.rollout_index.shape[0]

    def keys(self, num_positions: int) -> Tensor:
        """Returns `[n]` int64 keys ordered by rollout, then position; distinct for positions below `num_positions`."""
        return self.rollout_index * num_positions + self.position


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's output for n rows: tensors `[n, ...]`, or None if not provided. Each kind of teacher adds its own."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: Tensor) -> Self:
        """Returns the given rows, in the given order."""
        return self.map(lambda values: values[rows])

    def split(self, num_rows: list[int]) -> list[Self]:
        """Returns consecutive parts with the given numbers of rows."""
        ends = list(accumulate(num_rows))
        return [self.map(lambda values, a=end - n, b=end: values[a:b]) for end, n in zip(ends, num_rows, strict=True)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns the rows with `function` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class TeacherTopK(TeacherRows):
    """The natural-log probabilities of a teacher behind servers for n rows, at temperature 1; equal on all tp ranks.

    `label_logprobs`: `[n]` float32. `support_ids`, `support_logprobs`: `[n, K]` int64 and float32, its top-K by
    descending logprob. `student_support_ids`, `student_support_logprobs`: `[n, K]`, the student's top-K and the
    teacher's logprobs of it; None if it was not asked.
    """

    label_logprobs: Tensor
    support_ids: Tensor
    support_logprobs: Tensor
    student_support_ids: Tensor | None = None
    student_support_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenSelection:
    """The supervised rows of this replica, and their weights.

    `selection_mask`: `[n]` bool. `row_weights`: `[n]` float32, zero for rows that are not selected. They include the
    division by the global count, so the loss of the whole batch is the sum over all rows of weight x divergence.
    `num_valid`, `num_selected`: over the whole batch, equal on every rank. `metrics`: global scalars of the selection.
    `scores`: `[n]` float32, the rule's scores; None for rules without scores, such as "full" and "random".
    `term_weights`: the weights, as `row_weights`, of each further divergence that the rule adds to the loss, by name.
    """

    selection_mask: Tensor
    row_weights: Tensor
    num_valid: int
    num_selected: int
    metrics: dict[str, float]
    scores: Tensor | None = None
    term_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def retention_ratio(self) -> float:
        return self.num_selected / self.num_valid
