"""Token selection: the supervised response tokens of a rollout batch, exact on any layout. Depends only on torch."""

from megatron_tip.selection.budget import rollout_budget
from megatron_tip.selection.comparison import RuleComparison, compare_rules
from megatron_tip.selection.normalise import NORMALISERS, Normaliser
from megatron_tip.selection.rules import RULES, Input, Rule
from megatron_tip.selection.selector import Selector

__all__ = [
    "NORMALISERS",
    "RULES",
    "Input",
    "Normaliser",
    "Rule",
    "RuleComparison",
    "Selector",
    "compare_rules",
    "rollout_budget",
]
