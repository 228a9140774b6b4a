"""The regime of a pair by numbers: how far apart it is, whether its disagreement is compatible, which rules differ.

Nothing here is a rule of thumb. What to try follows from the numbers alone; which rule gains most is a question for
trainings, and the text says which studies have asked it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tip.diagnostics.scores import Scores
from megatron_tip.diagnostics.statistics.bootstrap import Interval, PromptResamples
from megatron_tip.diagnostics.statistics.seeds import MIN_SEEDS
from megatron_tip.diagnostics.statistics.tokens import bank_tokens
from megatron_tip.selection import compare_rules
from megatron_tip.selection.budget import batch_budget

SAME_TOKENS = 0.9
"""The Jaccard overlap from which two rules count as one: nine tokens of ten are common, so trying both tells little."""

HIGH_D = (0.05, 0.1)
"""The shares of tokens with the highest D among which C is averaged, TA-OPD's and TIP's main budgets."""


@dataclass(frozen=True)
class StudiedPair:
    """A pair whose trainings were compared. `high_d`: C among the 5 % and 10 % of tokens with the highest D."""

    name: str
    page: str
    start_kl: float
    high_d: tuple[float, float]
    trainings: int
    found: str


STUDIED = (
    StudiedPair(
        name="SmolLM2-135M-Instruct and its copy without six layers",
        page="docs/fixed_context_study.md",
        start_kl=4.175,
        high_d=(0.027, 0.029),
        trainings=3,
        found="at 5 % of the tokens entropy gained 1.24 nats, random tokens 1.02, D 0.93, teachability 0.83",
    ),
    StudiedPair(
        name="SmolLM2-135M-Instruct and its copy without layer 14, on arithmetic",
        page="docs/near_pair_study.md",
        start_kl=0.174,
        high_d=(0.833, 0.829),
        trainings=8,
        found=(
            "at 5 % of the tokens D^I gained 0.0120 nats, entropy 0.0087, D 0.0076, teachability 0.0066, random tokens "
            "0.0057, and teachability could not be told from any of them"
        ),
    ),
    StudiedPair(
        name="the same two on English prompts",
        page="docs/near_pair_study.md",
        start_kl=0.195,
        high_d=(0.670, 0.680),
        trainings=8,
        found=(
            "at 5 % of the tokens teachability gained 0.0090 nats, D 0.0078, random tokens 0.0051, entropy 0.0041, D^I "
            "0.0036, and teachability gained more than all of them but D"
        ),
    ),
    StudiedPair(
        name="the same teacher and its copy without six layers after 60 steps of plain distillation, on arithmetic",
        page="docs/near_pair_study.md",
        start_kl=1.206,
        high_d=(0.217, 0.297),
        trainings=8,
        found=(
            "at 5 % of the tokens D gained 0.0231 nats, D^I 0.0223, teachability 0.0165, random tokens 0.0079, entropy "
            "0.0010, and teachability gained more than entropy but could not be told from the others"
        ),
    ),
    StudiedPair(
        name="those two on English prompts",
        page="docs/near_pair_study.md",
        start_kl=1.313,
        high_d=(0.159, 0.227),
        trainings=8,
        found=(
            "at 5 % of the tokens D^I gained 0.0100 nats, D 0.0095, teachability 0.0023, random tokens -0.0037, "
            "entropy -0.0061, and teachability could not be told from any of them"
        ),
    ),
)
"""The evidence of this project; `tests/unit/test_docs.py` compares it with the pages' tables."""


@dataclass(frozen=True)
class BudgetFacts:
    """What the rules keep of the whole bank at one budget.

    `groups`: rules that keep nearly the same tokens, each group by its first rule. `tied`: by rule, the share of kept
    tokens that only the tie order chose, if there are any.
    """

    ratio: float
    num_kept: int
    groups: tuple[tuple[str, ...], ...]
    tied: dict[str, float]


@dataclass(frozen=True)
class PairFacts:
    """The numbers that describe a pair on a bank; intervals over prompts.

    `start_kl`: KL(teacher || student), nats per token. `compatibility`: C over all tokens; `high_d`: among those with
    the highest D, for each of `HIGH_D`. `learnable_share`: the share of D^L in D under Norm_B. `q3_share`: low entropy
    and high reverse KL, cut at the medians.
    """

    num_prompts: int
    num_tokens: int
    support_size: int
    start_kl: Interval
    reverse_kl: Interval
    compatibility: Interval
    high_d: tuple[Interval, ...]
    learnable_share: float
    q3_share: Interval
    budgets: tuple[BudgetFacts, ...]


def pair_facts(
    scores: Scores, *, support_size: int, ratios: Sequence[float], resamples: int = 1000, seed: int = 1
) -> PairFacts:
    """Returns the facts of the student whose `scores` are given; a pure function.

    Raises:
        InputError: the scores have no statistics at `support_size`.
    """
    table = bank_tokens(scores, np.zeros(len(scores)), support_size)
    draws = PromptResamples.draw(scores.prompt, resamples=resamples, seed=seed)
    compatibility, divergence = table.column("compatibility"), table.column("divergence")
    order = np.argsort(-divergence, kind="stable")
    highest = [np.isin(np.arange(len(order)), order[: batch_budget(ratio, len(order))]) for ratio in HIGH_D]
    total = float(table.column("d").sum())
    return PairFacts(
        num_prompts=draws.num_prompts(),
        num_tokens=len(scores),
        support_size=support_size,
        start_kl=draws.mean(table.column("forward_kl")),
        reverse_kl=draws.mean(table.column("reverse_kl")),
        compatibility=draws.mean(compatibility),
        high_d=tuple(draws.mean(compatibility, kept) for kept in highest),
        learnable_share=float(table.column("d_l").sum()) / total if total else float("nan"),
        q3_share=draws.mean(table.quadrant("q3").astype(np.float64)),
        budgets=tuple(_budget_facts(scores, support_size, ratio, seed) for ratio in ratios),
    )


def _budget_facts(scores: Scores, support_size: int, ratio: float, seed: int) -> BudgetFacts:
    found = compare_rules(scores.statistics(support_size), scores.token_index(), retention_ratio=ratio, seed=seed)
    groups: list[list[int]] = []
    for place in range(len(found.names)):
        own = next((group for group in groups if found.jaccard[group[0], place] >= SAME_TOKENS), None)
        if own is None:
            groups.append([place])
        else:
            own.append(place)
    tied = {name: share for name, share in zip(found.names, found.tied_shares, strict=True) if share > 0}
    return BudgetFacts(
        ratio=ratio,
        num_kept=int(found.num_selected[0]),
        groups=tuple(tuple(found.names[place] for place in group) for group in groups),
        tied=tied,
    )


def advice(facts: PairFacts) -> Iterator[str]:
    """Yields the facts and what follows from them, one sentence or two per line."""
    yield (
        f"{facts.num_tokens} tokens of {facts.num_prompts} prompts, K = {facts.support_size}; in brackets the 95 % "
        "interval over prompts."
    )
    yield from _regime(facts)
    for budget in facts.budgets:
        yield from _at_budget(budget)
    yield from _evidence(facts)


def _regime(facts: PairFacts) -> Iterator[str]:
    yield (
        f"Distance: the student is {_shown(facts.start_kl)} nats per token from its teacher, KL(teacher || student); "
        f"reverse {_shown(facts.reverse_kl)}."
    )
    high = ", ".join(
        f"{_shown(found)} among the {100 * ratio:g} % with the highest D"
        for ratio, found in zip(HIGH_D, facts.high_d, strict=True)
    )
    yield (
        f"Compatibility: the teacher gives the student's top {facts.support_size} a probability C of "
        f"{_shown(facts.compatibility)} on average, {high}."
    )
    share = facts.learnable_share
    word = "mostly learnable" if share > 0.5 else "mostly incompatible"
    yield (
        f"Disagreement: {share:.0%} of D is D^L under Norm_B, so it is {word}."
        if np.isfinite(share)
        else "Disagreement: none, D is 0 everywhere."
    )
    yield (
        f"Q3 (entropy at most its median, reverse KL above its own): {_shown(facts.q3_share)} of the tokens; 0.25 if "
        "the two were independent."
    )


def _at_budget(budget: BudgetFacts) -> Iterator[str]:
    num_rules = sum(map(len, budget.groups))
    yield (
        f"At {100 * budget.ratio:g} % ({budget.num_kept} tokens) {num_rules} rules keep {len(budget.groups)} different "
        f"sets (overlap below {SAME_TOKENS:g}); one rule of each is worth trying: "
        + ", ".join(group[0] for group in budget.groups)
        + "."
    )
    for group in budget.groups:
        if len(group) > 1:
            yield f"  nearly the same tokens: {', '.join(group)}"
    if budget.tied:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(budget.tied.items(), key=lambda it: -it[1]))
        yield f"  chosen by the tie order alone, as their scores are equal: {shares}"


def _evidence(facts: PairFacts) -> Iterator[str]:
    for pair in STUDIED:
        enough = pair.trainings >= MIN_SEEDS
        verdict = "" if enough else f", without a verdict: {pair.trainings} trainings of {MIN_SEEDS}"
        yield (
            f"Evidence: {pair.name} ({pair.page}) start {pair.start_kl:.2f} nats apart, with a C of "
            f"{pair.high_d[0]:.2f} and {pair.high_d[1]:.2f} among the tokens with the highest D (here "
            f"{facts.start_kl.estimate:.2f}, {facts.high_d[0].estimate:.2f} and {facts.high_d[1].estimate:.2f}). "
            f"There {pair.found}{verdict}."
        )
    yield (
        "No study of this project says which rule or budget gains most on a pair like this one, and these numbers "
        f"do not either. Try `full` and `random` beside one rule of each set, with {MIN_SEEDS} seeds or more: "
        "`megatron-tip diagnose intervene`."
    )


def _shown(found: Interval) -> str:
    return f"{found.estimate:.3g} [{found.low:.3g}, {found.high:.3g}]"
