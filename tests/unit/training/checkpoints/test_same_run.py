"""An unfinished run is continued as what it was, or not at all."""

from pathlib import Path

import pytest

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.training.checkpoints.files import CheckpointFiles, write_state
from megatron_tip.training.checkpoints.same_run import check_same_run, defining_settings
from tests.helpers.training import Layout, make_config


def saved_under(config: Config, **others: str) -> Config:
    files = CheckpointFiles(RunFolder(config.run.folder).checkpoints)
    partial = files.begin(2)
    write_state(partial, {"settings": defining_settings(config) | others})
    files.commit(2, partial, {})
    return config


def test_layout_speed_and_outputs_may_change(tmp_path: Path):
    saved_under(make_config(tmp_path, Layout(1)))
    check_same_run(
        make_config(
            tmp_path,
            Layout(4, student=(2, 2), teacher=(4, 1)),
            rollout={"batch_size": 3},
            training={"max_tokens_per_micro_batch": 7},
            checkpoint={"every_steps": 1},
            output={"save_rollouts": True},
            loss={"chunk_rows": 5},
            selection={"passes": "auto"},
        )
    )


@pytest.mark.parametrize(
    "sections,expected",
    [
        ({"optimizer": {"lr": 2.0}}, "optimizer.lr: 0.001, now 2.0"),
        ({"optimizer": {"min_lr": 1e-3}}, "optimizer.min_lr: 0.0, now 0.001"),
        ({"run": {"seed": 7}}, "run.seed: 1, now 7"),
        ({"selection": {"rule": "random"}}, "selection.rule: 'ta_opd_teachability', now 'random'"),
        ({"selection": {"adaptive_ratio": True}}, "selection.adaptive_ratio: False, now True"),
        ({"selection": {"parameters": {"tokens": 3}}}, "selection.parameters: {}, now {'tokens': 3.0}"),
        ({"rollout": {"importance_cap": 2.0}}, "rollout.importance_cap: 0.0, now 2.0"),
        ({"rollout": {"environment": "calculator"}}, "rollout.environment: '', now 'calculator'"),
        ({"optimizer": {"distributed": True}}, "optimizer.distributed: False, now True"),
    ],
)
def test_other_numbers_are_refused_by_name(tmp_path: Path, sections, expected: str):
    saved_under(make_config(tmp_path, Layout(1)))
    with pytest.raises(ConfigError, match="holds an unfinished run with other settings") as caught:
        check_same_run(make_config(tmp_path, Layout(1), **sections))
    assert str(caught.value).splitlines()[1:] == [f"  {expected}"]


@pytest.mark.parametrize("key,value", [("selection.scope", "micro_batch"), ("selection.thresholds", "last_step")])
def test_a_selection_of_earlier_versions_names_what_replaced_it(tmp_path: Path, key: str, value: str):
    config = make_config(tmp_path, Layout(1))
    saved_under(config, **{key: value})
    with pytest.raises(ConfigError, match=f"{key} = '{value}', which only earlier.*selection.passes"):
        check_same_run(config)


def test_defaults_of_earlier_versions_are_continued(tmp_path: Path):
    check_same_run(saved_under(make_config(tmp_path, Layout(1)), **{"selection.thresholds": "this_step"}))


CONSTANT = {"min_lr": 1e-3}
NAMED = {"num_prompts": 9}


@pytest.mark.parametrize(
    "optimizer,prompts,steps,why",
    [
        (CONSTANT, NAMED, 5, ""),
        (CONSTANT, NAMED, 3, "training.steps: 4, now 3"),
        ({}, NAMED, 5, "training.steps: 4, now 5 (the learning rate falls to optimizer.min_lr over all steps;"),
        (CONSTANT, {}, 5, "training.steps: 4, now 5 (as many prompts are generated as the run has steps for;"),
    ],
    ids=["longer", "shorter", "cosine", "generated"],
)
def test_a_run_is_extended_where_no_earlier_step_would_change(tmp_path: Path, optimizer, prompts, steps: int, why: str):
    saved_under(make_config(tmp_path, Layout(1), optimizer=optimizer, prompts=prompts))
    extended = make_config(tmp_path, Layout(1), optimizer=optimizer, prompts=prompts, training={"steps": steps})
    if not why:
        check_same_run(extended)
        return
    with pytest.raises(ConfigError) as caught:
        check_same_run(extended)
    told = str(caught.value).splitlines()[1].strip()
    assert told.startswith(why)
    assert ("model.path=.../hf" in told) == ("(" in why)


def test_a_run_whose_weights_follow_the_training_is_not_extended(tmp_path: Path):
    sections = {"optimizer": CONSTANT, "prompts": NAMED}
    saved_under(make_config(tmp_path, Layout(1), selection={"rule": "prefix"}, **sections))
    extended = make_config(tmp_path, Layout(1), selection={"rule": "prefix"}, training={"steps": 5}, **sections)
    with pytest.raises(ConfigError, match=r"now 5 \(the weights of rule 'prefix' depend on how much of the training"):
        check_same_run(extended)


def test_a_folder_without_checkpoints_says_nothing(tmp_path: Path):
    check_same_run(make_config(tmp_path, Layout(1), training={"steps": 9}))


def test_a_damaged_state_leaves_the_word_to_the_one_before(tmp_path: Path):
    config = saved_under(make_config(tmp_path, Layout(1)))
    newer = RunFolder(config.run.folder).checkpoints / "step_000004"
    newer.mkdir()
    (newer / "state.json").write_text("{")
    check_same_run(config)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        check_same_run(make_config(tmp_path, Layout(1), optimizer={"lr": 2.0}))
