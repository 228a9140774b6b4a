"""What crosses folders: prompts, rollouts, micro-batches, statistics, selections.

Shape letters: `b` sequences of a micro-batch, `s` positions, `n` valid tokens ("rows") of one data-parallel replica,
`K` support size. Rows run over micro-batches, then sequences, then positions; a row is one position of `loss_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

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
class Statistic:
    """What holds of one scalar field of TokenStatistics. Every list of statistics in the package is derived from it.

    `symbol`, `meaning`: as the report shows them. `equation`: with its source. `unit`: "nats", "share" or "ids".
    `over`: what it is taken over: the whole "vocabulary", both models' "support" (it then depends on K) or the "label".
    `needs`: what the teacher must give: "nothing"; its "top_k", which comes with its logprob of the label; its
    logprobs of the "student_top_k"; its whole "distribution"; "top_k_alone": it stands in where there is no
    distribution. `in_views`, `in_scores`: whether views' token tables and the scores of a context bank have a column of
    it. `logged`: its mean over the valid tokens is the metric `train/NAME`. `described`: its means over the kept and
    over the dropped tokens are metrics of the selection.
    """

    symbol: str
    meaning: str
    equation: str
    over: Literal["vocabulary", "support", "label"]
    needs: Literal["nothing", "top_k", "student_top_k", "distribution", "top_k_alone"]
    unit: Literal["nats", "share", "ids"] = "nats"
    in_views: bool = True
    in_scores: bool = True
    logged: bool = False
    described: bool = False

    @property
    def metadata(self) -> dict[str, Statistic]:
        """What the field of TokenStatistics carries."""
        return {"statistic": self}


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Per-row scalars of student p and teacher q, `[n]` float32, no gradient, equal on all tp ranks.

    S_S and S_T are the top-K sets of student and teacher (ties: lower id first). Every scoring pass computes the fields
    without a default, and the others where they are asked for. `None` means "not asked for", or "cannot be known":
    what needs the whole distribution of a teacher that gives top-K log-probabilities alone. Equations: TA-OPD
    (arXiv:2605.26844) unless TIP is named.
    """

    # fmt: off
    student_entropy: Tensor = field(metadata=Statistic(
        "H(p)", "student's entropy", "-Σ p ln p", "vocabulary", "nothing", logged=True, described=True).metadata)
    teacher_entropy: Tensor | None = field(metadata=Statistic(
        "H(q)", "teacher's entropy", "-Σ q ln q", "vocabulary", "distribution", logged=True).metadata)
    reverse_kl: Tensor | None = field(metadata=Statistic(
        "KL(p‖q)", "reverse KL", "Σ p ln(p / q), TIP Eq. 3", "vocabulary", "distribution",
        logged=True, described=True).metadata)
    topk_reverse_kl: Tensor | None = field(default=None, metadata=Statistic(
        "KL(p‖q)≥", "reverse KL over known ids", "all ids whose q is not known as one: at most KL(p‖q)",
        "vocabulary", "top_k_alone", in_scores=False, logged=True).metadata)
    forward_kl: Tensor | None = field(metadata=Statistic(
        "KL(q‖p)", "forward KL", "Σ q ln(q / p)", "vocabulary", "distribution", logged=True).metadata)
    support_divergence: Tensor = field(metadata=Statistic(
        "D", "divergence on both supports", "KL(q‖p), both renormalised on the union, Eq. 9", "support", "top_k",
        logged=True, described=True).metadata)
    compatibility: Tensor | None = field(metadata=Statistic(
        "C", "teacher's mass on the student's top-K", "Σ q over S_S, Eq. 10", "support", "student_top_k", "share",
        logged=True, described=True).metadata)
    compatibility_lower_bound: Tensor = field(metadata=Statistic(
        "Ĉ", "teacher's mass on both top-K", "Σ q over the intersection, Eq. 17", "support", "top_k", "share").metadata)
    support_overlap: Tensor = field(metadata=Statistic(
        "O", "ids in both top-K", "", "support", "top_k", "ids", in_views=False).metadata)
    support_jaccard: Tensor = field(metadata=Statistic(
        "J", "overlap of both top-K", "O / size of the union", "support", "top_k", "share",
        in_views=False).metadata)
    shared_teacher_mass: Tensor = field(metadata=Statistic(
        "Ĉ / q(S_T)", "shared part of the teacher's top-K mass", "Ĉ over Σ q over S_T", "support", "top_k", "share",
        in_views=False).metadata)
    student_mass_on_teacher_support: Tensor = field(metadata=Statistic(
        "p(S_T)", "student's mass on the teacher's top-K", "Σ p over S_T", "support", "top_k", "share",
        in_views=False).metadata)
    student_logprobs: Tensor | None = field(default=None, metadata=Statistic(
        "ln p", "student's logprob of the sampled token", "ln p(y)", "label", "nothing").metadata)
    teacher_logprobs: Tensor | None = field(default=None, metadata=Statistic(
        "ln q", "teacher's logprob of the sampled token", "ln q(y)", "label", "top_k").metadata)
    jsd: Tensor | None = field(default=None, metadata=Statistic(
        "JSD", "Jensen-Shannon divergence", "β = 1/2", "vocabulary", "distribution",
        in_views=False, in_scores=False).metadata)
    # fmt: on
    student_support_ids: Tensor | None = None  # [n, K] int64, descending logprob
    student_support_logprobs: Tensor | None = None  # [n, K] student's own
    teacher_support_ids: Tensor | None = None
    teacher_support_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return self.student_entropy.shape[0]

    @staticmethod
    def unknown(num_rows: int, device: torch.device) -> TokenStatistics:
        """Returns NaN for `num_rows` rows of which a teacher's distribution told nothing; no supports."""
        nothing = torch.full((num_rows,), float("nan"), device=device)
        return TokenStatistics(**{name: nothing for name, one in STATISTICS.items() if one.needs != "top_k_alone"})

    @staticmethod
    def concatenate(parts: list[TokenStatistics]) -> TokenStatistics:
        """Returns the rows of `parts` one after another; a field that any part lacks is `None`."""

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        return TokenStatistics(**{one.name: joined(one.name) for one in fields(TokenStatistics)})  # type: ignore[arg-type]


STATISTICS: dict[str, Statistic] = {
    one.name: one.metadata["statistic"] for one in fields(TokenStatistics) if "statistic" in one.metadata
}
"""All statistics by name, in the order of columns and metrics."""


@dataclass(frozen=True, kw_only=True)
class TopKTokenStatistics(TokenStatistics):
    """The statistics of a teacher that gives top-K log-probabilities alone. `teacher`: what they were made of."""

    teacher: TeacherTopK | None = None


@dataclass(frozen=True)
class TeacherTopK:
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

    def __len__(self) -> int:
        return self.label_logprobs.shape[0]

    def __getitem__(self, rows: Tensor) -> TeacherTopK:
        """Those rows, in their order."""
        return self.map(lambda values: values[rows])

    def split(self, num_rows: list[int]) -> list[TeacherTopK]:
        """Consecutive parts of so many rows each."""
        starts = [sum(num_rows[:part]) for part in range(len(num_rows))]
        return [
            self.map(lambda values, a=start, b=start + length: values[a:b])
            for start, length in zip(starts, num_rows, strict=True)
        ]

    def map(self, function: Callable[[Tensor], Tensor]) -> TeacherTopK:
        """`function` of each tensor."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return TeacherTopK(**{name: None if value is None else function(value) for name, value in values.items()})  # type: ignore[arg-type]


TeacherRows = Tensor | TeacherTopK
"""What a teacher says of n rows: `[n, H]` hidden states, or of a teacher behind servers log-probabilities."""


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
