"""What crosses folders: prompts, rollouts, micro-batches, statistics, selections.

Shape letters: `b` sequences of a micro-batch, `s` positions, `n` valid tokens ("rows") of one data-parallel replica,
`K` support size. Rows run over micro-batches, then sequences, then positions; a row is one position of `loss_mask`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt, already rendered through the chat template and tokenised.

    `index` is its place in the prompt source and never changes; `text` is what the model sees. `teacher`: the name of
    the teacher that scores its rollouts, "" where there is one.
    """

    index: int
    text: str
    prompt_ids: tuple[int, ...]
    teacher: str = ""


@dataclass(frozen=True)
class Rollout:
    """One sampled response, as token ids.

    `rollout_logprobs`: natural log of each sampled token's probability under the distribution it was sampled from,
    one a response token; 0 where the environment wrote. `finish_reason`: "stop" (a stop id was sampled; it is the last
    response id), "length" (cut off, not a complete answer) or "turns" (the environment wanted more turns than there
    are). `weight_version`: the training step whose weights generated it, of several the oldest.

    `environment_spans`: half-open ranges of `response_ids` that the student did not generate: what an environment or
    a tool wrote between its turns, with the chat template's delimiters. In order, none at the beginning or the end,
    none next to another. A response of one turn has none. `teacher`: as of its prompt.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int
    environment_spans: tuple[tuple[int, int], ...] = ()
    teacher: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_generated(self) -> int:
        """Response tokens that the student generated."""
        return self.num_generated_before(len(self.response_ids))

    def num_generated_before(self, position: int) -> int:
        """Tokens that the student generated among the first `position` of the response."""
        return position - sum(max(0, min(end, position) - start) for start, end in self.environment_spans)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, padded on the right; equal on all tp and pp ranks of a replica.

    All tensors are `[b, s]`. `labels[:, t] == input_ids[:, t + 1]` wherever `response_mask` holds, so position t is
    scored for the token that follows it. `response_mask`: the label was generated. `loss_mask` (a subset): the label
    may be supervised. `rollout_indices`: `[b]`, each sequence's place in the step's rollout list.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    rollout_indices: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def num_valid(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class TokenIndex:
    """Where each row stands in the whole rollout batch: the order that breaks ties, equal on every layout.

    `rollout_index`: `[n]` int64, place in the step's rollout list (prompt-major). `position`: `[n]` int64, 0-based
    place within the response, the environment's tokens counted.
    """

    rollout_index: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.rollout_index.shape[0]

    def keys(self, num_positions: int) -> Tensor:
        """`[n]` int64: by rollout, then by position; distinct if every position is below `num_positions`."""
        return self.rollout_index * num_positions + self.position


@dataclass(frozen=True)
class TeacherRows:
    """What a teacher says of n rows: tensors `[n, ...]`, None for what it does not say. A kind of teacher adds them."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: Tensor) -> Self:
        """Returns those rows, in their order."""
        return self.map(lambda values: values[rows])

    def split(self, num_rows: list[int]) -> list[Self]:
        """Returns consecutive parts of so many rows each."""
        ends = list(accumulate(num_rows))
        return [self.map(lambda values, a=end - n, b=end: values[a:b]) for end, n in zip(ends, num_rows, strict=True)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns `function` of each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class TeacherTopK(TeacherRows):
    """What a teacher behind a server says of n rows: natural log of its probabilities at temperature 1.

    `label_logprobs`: `[n]` float32. `support_ids`, `support_logprobs`: `[n, K]` int64 and float32, its top-K by
    descending logprob. `student_support_ids`, `student_support_logprobs`: `[n, K]`, what it was asked about the
    student's top-K; None where it was not. Equal on all tp ranks.
    """

    label_logprobs: Tensor
    support_ids: Tensor
    support_logprobs: Tensor
    student_support_ids: Tensor | None = None
    student_support_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenSelection:
    """Which rows of this replica are supervised, and with what weight.

    `selection_mask`: `[n]` bool. `row_weights`: `[n]` float32, zero where not selected; they already carry the one
    division by the global count, so the loss of the whole batch is the sum over all rows of weight x divergence.
    `num_valid`, `num_selected`: over the whole batch, equal on every rank. `metrics`: global scalars of the selection.
    `scores`: `[n]` float32, what the rule says of each row; None where it scores none, as "full" and "random".
    """

    selection_mask: Tensor
    row_weights: Tensor
    num_valid: int
    num_selected: int
    metrics: dict[str, float]
    scores: Tensor | None = None

    @property
    def retention_ratio(self) -> float:
        return self.num_selected / self.num_valid
