"""The section of the configuration and the selector's settings are one list of names and choices."""

from dataclasses import fields
from typing import get_args

import pytest

from megatron_tip.config import SelectionConfig
from megatron_tip.selection import NORMALISERS, Selector
from megatron_tip.selection.loss_scale import LossScale
from megatron_tip.selection.rule import Scope
from megatron_tip.selection.settings import SelectionSettings, TieBreak

CHOICES = {
    "scope": {"auto", *get_args(Scope)},
    "normaliser": {"auto", *NORMALISERS} - {"above_median", "by_maximum"},  # a rule's own
    "tie_break": set(get_args(TieBreak)),
    "loss_scale": set(get_args(LossScale)),
}


def test_the_section_names_the_settings_of_the_selector():
    assert {"seed", "steps", *SelectionConfig().settings()} == {field.name for field in fields(SelectionSettings)}


@pytest.mark.parametrize("name", CHOICES)
def test_the_section_offers_the_choices_of_the_selector(name: str):
    assert set(get_args(SelectionConfig.model_fields[name].annotation)) == CHOICES[name]


def test_auto_is_what_the_rules_paper_says():
    selector = Selector(seed=3, **SelectionConfig(rule="tip_soft_or", retention_ratio=0.5).settings())
    assert (selector.scope, selector.normaliser, selector.seed) == (None, None, 3)
    chosen = SelectionConfig(rule="tip_soft_or", scope="rollout", normaliser="raw", minimum_per_rollout=2).settings()
    selector = Selector(seed=3, **chosen)
    assert (selector.scope, selector.normaliser, selector.minimum_per_rollout) == ("rollout", "raw", 2)
