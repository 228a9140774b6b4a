"""Token selection: which response tokens of a rollout batch are supervised, exact on any layout. Needs torch alone."""

from megatron_tip.selection.rules import RULES, Rule
from megatron_tip.selection.selector import Selector

__all__ = ["RULES", "Rule", "Selector"]
