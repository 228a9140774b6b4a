"""Which arms there are, on which contexts, and how an interrupted intervention goes on."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_tip.config import Config
from megatron_tip.diagnostics.arms import Arm, ArmResult, ArmsFile, planned_arms
from megatron_tip.diagnostics.bank import write_bank
from megatron_tip.diagnostics.intervene import split_contexts
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.selection import PAPERS_RULES
from tests.helpers.diagnostics import MANIFEST, make_contexts

RESULT = ArmResult(
    Arm("random", 0.05, 16, 1), [0], [1, 2], [4, 4], [2.0, 2.0], [1.0, 2.0], 8, 1, {"train/loss": 1.0}, 0.5
)


def config(**diagnostics) -> Config:
    values = {
        "run": {"folder": "x"},
        "model": {"path": "x"},
        "teacher": {"path": "x"},
        "prompts": {"source": "reasoning_gym", "tasks": ["basic_arithmetic"]},
        "training": {"steps": 2},
        "diagnostics": diagnostics,
    }
    return Config.model_validate(values)


def test_every_rule_budget_and_seed_is_tried_and_other_k_where_they_matter():
    arms = planned_arms(config(retention_ratios=(0.01, 0.05), seeds=2, support_sizes=(8, 16)))
    assert len(set(arms)) == len(arms)
    assert arms[:2] == [Arm("full", 1.0, 16, 1), Arm("full", 1.0, 16, 2)]
    for name in PAPERS_RULES:
        if name != "full":
            of_rule = {(arm.retention_ratio, arm.seed) for arm in arms if arm.rule == name and arm.support_size == 16}
            assert of_rule == {(0.01, 1), (0.01, 2), (0.05, 1), (0.05, 2)}, name
    at_eight = {arm.rule for arm in arms if arm.support_size == 8}
    assert {"ta_opd_teachability", "ta_opd_divergence", "ta_opd_compatibility"} <= at_eight
    assert not {"random", "tip_soft_or", "ta_opd_entropy", "full"} & at_eight


def test_the_main_budget_comes_first():
    arms = planned_arms(config(rules=("random",), retention_ratios=(0.01, 0.1, 0.05), seeds=1, support_sizes=(16,)))
    assert [arm.retention_ratio for arm in arms] == [1.0, 0.05, 0.1, 0.01]


def test_the_main_budget_is_tried_where_it_is_not_named():
    """The other K are tried at it: without it nothing could be compared with them."""
    arms = planned_arms(config(rules=("random",), retention_ratios=(0.01,), seeds=1, support_sizes=(16,)))
    assert [arm.retention_ratio for arm in arms] == [1.0, 0.05, 0.01]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="nearest name"):
        planned_arms(config(rules=("ta_opd_teachable",)))


def test_no_prompt_is_both_trained_on_and_measured_on(tmp_path):
    bank = write_bank(tmp_path / "bank", make_contexts(60, num_prompts=20), MANIFEST)
    splits = [split_contexts(bank, num_steps=2, per_step=7, num_heldout=12, seed=seed) for seed in (1, 2)]
    for split in splits:
        assert [len(step) for step in split.steps] == [7, 7]
        assert len(split.heldout) == 12
        assert len({*split.trained, *split.heldout}) == 26
        assert not set(bank.prompts[split.trained]) & set(bank.prompts[split.heldout])
    assert splits[0] != splits[1]
    assert splits[0] == split_contexts(bank, num_steps=2, per_step=7, num_heldout=12, seed=1)
    with pytest.raises(InputError, match="got 60 contexts of 20 prompts"):
        split_contexts(bank, num_steps=4, per_step=10, num_heldout=40, seed=1)


def test_contexts_of_many_prompts_are_taken_before_a_second_one_of_any(tmp_path):
    bank = write_bank(tmp_path / "bank", make_contexts(320, num_prompts=20), MANIFEST)
    split = split_contexts(bank, num_steps=2, per_step=8, num_heldout=10, seed=1)
    trained, heldout = (set(bank.prompts[places]) for places in (split.trained, split.heldout))
    assert not trained & heldout
    assert (len(trained), len(heldout)) == (12, 8)  # 20 prompts, shared as 16 contexts to 10
    alone = write_bank(tmp_path / "alone", make_contexts(320), MANIFEST)
    split = split_contexts(alone, num_steps=2, per_step=8, num_heldout=10, seed=1)
    order = np.random.default_rng(1).permutation(320)
    places = {int(prompt): place for place, prompt in enumerate(alone.prompts)}
    assert [place for step in split.steps for place in step] == [places[int(prompt)] for prompt in order[:16]]
    assert split.heldout == [places[int(prompt)] for prompt in order[16:26]]


def test_a_broken_last_line_is_cut_off_and_the_rest_kept(tmp_path):
    file = ArmsFile(tmp_path)
    file.begin({"lr": 1e-4})
    file.append(RESULT)
    path = tmp_path / "arms.jsonl"
    path.write_text(path.read_text() + path.read_text()[:40])
    assert file.read() == [RESULT]
    file.begin({"lr": 1e-4})
    file.append(RESULT)
    assert file.read() == [RESULT, RESULT]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


@pytest.mark.parametrize("line", ['{"arm": {"ru', '{"arm": {"rule": "random"}}', "[]", ""])
def test_a_broken_line_elsewhere_is_named_and_nothing_is_lost(tmp_path, line):
    file = ArmsFile(tmp_path)
    file.begin({"lr": 1e-4})
    file.append(RESULT)
    path = tmp_path / "arms.jsonl"
    content = path.read_text() + line + "\n" + path.read_text()
    path.write_text(content)
    for attempt in (file.read, lambda: file.check({"lr": 1e-4}), lambda: file.begin({"lr": 1e-4})):
        with pytest.raises(InputError, match=r"arms\.jsonl, line 2: expected an arm"):
            attempt()
    assert path.read_text() == content


def test_arms_are_not_measured_on_nothing(tmp_path):
    bank = write_bank(tmp_path / "bank", make_contexts(20), MANIFEST)
    with pytest.raises(InputError, match=r"heldout\.num_prompts: expected at least 1 context"):
        split_contexts(bank, num_steps=1, per_step=2, num_heldout=0, seed=1)


def test_arms_of_other_settings_are_not_mixed(tmp_path):
    file = ArmsFile(tmp_path)
    file.begin({"lr": 1e-4, "steps": 2})
    with pytest.raises(ConfigError, match=r"lr: 0\.0001, now 0\.001"):
        file.begin({"lr": 1e-3, "steps": 2})
    with pytest.raises(InputError, match="diagnose intervene"):
        ArmsFile(tmp_path / "none").read()


def test_gain_is_a_mean_over_tokens_not_over_contexts():
    uneven = ArmResult(RESULT.arm, [0], [1, 2], [1, 9], [1.0, 9.0], [0.0, 9.0], 8, 1, {}, 0.5)
    assert uneven.gain == pytest.approx(0.1)
    assert np.isfinite(RESULT.gain)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"every_steps": 5}, "diagnostics.bank"),
        ({"support_sizes": (8, 8)}, "support_sizes"),
        ({"retention_ratios": (0.0,)}, "retention_ratios"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        config(**section)


def test_arms_of_close_budgets_have_names_of_their_own():
    names = {str(Arm("random", ratio, 16, 1)) for ratio in (0.02, 0.025, 0.001, 0.002, 1.0)}
    assert len(names) == 5
    assert str(Arm("random", 0.05, 16, 1)) == "random 5% K=16 seed 1"


def test_arms_without_their_settings_are_left_alone(tmp_path):
    file = ArmsFile(tmp_path)
    file.begin({"lr": 1})
    file.append(RESULT)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="expected the settings of the arms"):
        file.begin({"lr": 1})
    assert len(file.read()) == 1
