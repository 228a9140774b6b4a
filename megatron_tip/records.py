"""What crosses folders: prompts, rollouts, micro-batches, statistics, selections.

Shape letters: `b` sequences of a micro-batch, `s` positions, `n` valid tokens ("rows") of one data-parallel replica,
`K` support size. Rows run over micro-batches, then sequences, then positions; a row is one position of `loss_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import torch
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
class TokenStatistics:
    """Per-row scalars of student p and teacher q, `[n]` float32, no gradient, equal on all tp ranks.

    Entropies and divergences in nats over the full vocabulary, except `support_divergence`. S_S and S_T are the top-K
    sets of student and teacher (ties: lower id first). `None` means "not asked for", or "cannot be known": what needs
    the whole distribution of a teacher that gives top-K log-probabilities alone. Equations: TA-OPD (arXiv:2605.26844)
    unless TIP is named.
    """

    student_entropy: Tensor
    teacher_entropy: Tensor | None
    reverse_kl: Tensor | None  # KL(p || q), TIP Eq. 3
    forward_kl: Tensor | None  # KL(q || p)
    support_divergence: Tensor  # D: KL(q || p), both renormalised on the union of S_S and S_T, Eq. 9
    compatibility: Tensor | None  # C: teacher mass on S_S, Eq. 10
    compatibility_lower_bound: Tensor  # teacher mass on the intersection of S_S and S_T, Eq. 17
    support_overlap: Tensor  # number of ids in both sets
    support_jaccard: Tensor  # overlap / size of the union
    shared_teacher_mass: Tensor  # compatibility_lower_bound / teacher mass on S_T
    student_mass_on_teacher_support: Tensor  # sum of p over S_T
    student_logprobs: Tensor | None = None  # of the label
    teacher_logprobs: Tensor | None = None
    jsd: Tensor | None = None  # beta = 1/2
    student_support_ids: Tensor | None = None  # [n, K] int64, descending logprob
    student_support_logprobs: Tensor | None = None  # [n, K] student's own
    teacher_support_ids: Tensor | None = None
    teacher_support_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return self.student_entropy.shape[0]

    @staticmethod
    def unknown(num_rows: int, device: torch.device) -> TokenStatistics:
        """NaN for `num_rows` rows of which no statistic can be told; no supports."""
        names = [field.name for field in fields(TokenStatistics) if "support_ids" not in field.name]
        scalars = [name for name in names if not name.endswith("support_logprobs")]
        return TokenStatistics(**{name: torch.full((num_rows,), float("nan"), device=device) for name in scalars})

    @staticmethod
    def concatenate(parts: list[TokenStatistics]) -> TokenStatistics:
        """The rows of `parts` one after another; a field that any part lacks is `None`."""

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        return TokenStatistics(**{field.name: joined(field.name) for field in fields(TokenStatistics)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TopKTokenStatistics(TokenStatistics):
    """The statistics of a teacher that gives top-K log-probabilities alone.

    `topk_reverse_kl`: `[n]`, KL(p || q) after all ids whose q is not known were put into one: a lower bound of the
    reverse KL.
    """

    topk_reverse_kl: Tensor | None = None


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
