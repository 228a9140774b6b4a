"""The statistics of a token and their only declaration.

It does not import torch, because the report reads the declarations and must not wait for it.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """The properties of one scalar field of TokenStatistics. Every list of statistics in the package derives from them.

    `symbol`, `meaning`: as the report shows them. `equation`: with its source. `unit`: "nats", "share" or "ids".
    `over`: its domain: the whole "vocabulary", both models' "support" (it then depends on K) or the "label". `needs`:
    what the teacher must provide: "nothing"; its "top_k", which comes with its logprob of the label; its logprobs of
    the "student_top_k"; its whole "distribution"; "top_k_alone": a substitute if there is no distribution. `in_views`,
    `in_scores`: whether views' token tables and the scores of a context bank have a column for it. `logged`: its mean
    over the valid tokens is the metric `train/NAME`. `described`: its means over the kept and over the dropped tokens
    are metrics of the selection.
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
    def metadata(self) -> "dict[str, Statistic]":
        """The metadata of the field of TokenStatistics."""
        return {"statistic": self}


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Per-row scalars of student p and teacher q, `[n]` float32, no gradient, equal on all tp ranks.

    S_S and S_T are the top-K sets of student and teacher (ties: lower id first). Every scoring pass computes the fields
    without a default, and the others on request. `None` means "not requested" or "unknowable", as for statistics that
    need the whole distribution of a teacher that provides only top-K log-probabilities. Equations: TA-OPD
    (arXiv:2605.26844) unless TIP is named.
    """

    # fmt: off
    student_entropy: "Tensor" = field(metadata=Statistic(
        "H(p)", "student's entropy", "-Σ p ln p", "vocabulary", "nothing", logged=True, described=True).metadata)
    teacher_entropy: "Tensor | None" = field(metadata=Statistic(
        "H(q)", "teacher's entropy", "-Σ q ln q", "vocabulary", "distribution", logged=True).metadata)
    reverse_kl: "Tensor | None" = field(metadata=Statistic(
        "KL(p‖q)", "reverse KL", "Σ p ln(p / q), TIP Eq. 3", "vocabulary", "distribution",
        logged=True, described=True).metadata)
    topk_reverse_kl: "Tensor | None" = field(default=None, metadata=Statistic(
        "KL(p‖q)≥", "reverse KL over known ids", "all ids whose q is not known as one: at most KL(p‖q)",
        "vocabulary", "top_k_alone", in_scores=False, logged=True).metadata)
    forward_kl: "Tensor | None" = field(metadata=Statistic(
        "KL(q‖p)", "forward KL", "Σ q ln(q / p)", "vocabulary", "distribution", logged=True).metadata)
    support_divergence: "Tensor" = field(metadata=Statistic(
        "D", "divergence on both supports", "KL(q‖p), both renormalised on the union, Eq. 9", "support", "top_k",
        logged=True, described=True).metadata)
    compatibility: "Tensor | None" = field(metadata=Statistic(
        "C", "teacher's mass on the student's top-K", "Σ q over S_S, Eq. 10", "support", "student_top_k", "share",
        logged=True, described=True).metadata)
    compatibility_lower_bound: "Tensor" = field(metadata=Statistic(
        "Ĉ", "teacher's mass on both top-K", "Σ q over the intersection, Eq. 17", "support", "top_k", "share").metadata)
    support_overlap: "Tensor" = field(metadata=Statistic(
        "O", "ids in both top-K", "", "support", "top_k", "ids", in_views=False).metadata)
    support_jaccard: "Tensor" = field(metadata=Statistic(
        "J", "overlap of both top-K", "O / size of the union", "support", "top_k", "share",
        in_views=False).metadata)
    shared_teacher_mass: "Tensor" = field(metadata=Statistic(
        "Ĉ / q(S_T)", "shared part of the teacher's top-K mass", "Ĉ over Σ q over S_T", "support", "top_k", "share",
        in_views=False).metadata)
    student_mass_on_teacher_support: "Tensor" = field(metadata=Statistic(
        "p(S_T)", "student's mass on the teacher's top-K", "Σ p over S_T", "support", "top_k", "share",
        in_views=False).metadata)
    student_logprobs: "Tensor | None" = field(default=None, metadata=Statistic(
        "ln p", "student's logprob of the sampled token", "ln p(y)", "label", "nothing").metadata)
    teacher_logprobs: "Tensor | None" = field(default=None, metadata=Statistic(
        "ln q", "teacher's logprob of the sampled token", "ln q(y)", "label", "top_k").metadata)
    choice_rank: "Tensor | None" = field(default=None, metadata=Statistic(
        "R", "place of the student's first choice in the teacher's top-K", "0-based; K if it is not in", "support",
        "top_k", "ids", in_views=False, in_scores=False).metadata)
    jsd: "Tensor | None" = field(default=None, metadata=Statistic(
        "JSD", "Jensen-Shannon divergence", "β = 1/2", "vocabulary", "distribution",
        in_views=False, in_scores=False).metadata)
    # fmt: on
    student_support_ids: "Tensor | None" = None  # [n, K] int64, descending logprob
    student_support_logprobs: "Tensor | None" = None  # [n, K] student's own
    teacher_support_ids: "Tensor | None" = None
    teacher_support_logprobs: "Tensor | None" = None

    def __len__(self) -> int:
        return self.student_entropy.shape[0]

    @staticmethod
    def unknown(num_rows: int, device: "torch.device") -> "TokenStatistics":
        """Returns NaN statistics, without supports, for `num_rows` rows whose logits are unusable."""
        import torch

        nothing = torch.full((num_rows,), float("nan"), device=device)
        return TokenStatistics(**{name: nothing for name, one in STATISTICS.items() if one.needs != "top_k_alone"})

    @staticmethod
    def concatenate(parts: "list[TokenStatistics]") -> "TokenStatistics":
        """Returns the concatenated rows of `parts`; a field that any part lacks is `None`."""

        import torch

        def joined(name: str) -> "Tensor | None":
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        return TokenStatistics(**{one.name: joined(one.name) for one in fields(TokenStatistics)})  # type: ignore[arg-type]


STATISTICS: dict[str, Statistic] = {
    one.name: one.metadata["statistic"] for one in fields(TokenStatistics) if "statistic" in one.metadata
}
"""All statistics by name, in the order of columns and metrics."""
