"""Token selection: the supervised response tokens of a rollout batch, exact on any layout. Depends only on torch."""

from megatron_tip.selection.adaptive_ratio import AdaptiveRatio
from megatron_tip.selection.budget import rollout_budget
from megatron_tip.selection.comparison import RuleComparison, compare_rules
from megatron_tip.selection.normalise import NORMALISERS, Normaliser
from megatron_tip.selection.rule import Input, Rule, Term, Weight
from megatron_tip.selection.rules import PAPERS_RULES, RULES
from megatron_tip.selection.selector import Selector

__all__ = [
    "NORMALISERS",
    "PAPERS_RULES",
    "RULES",
    "AdaptiveRatio",
    "Input",
    "Normaliser",
    "Rule",
    "RuleComparison",
    "Selector",
    "Term",
    "Weight",
    "compare_rules",
    "rollout_budget",
]
