"""What a run will be is checked from files alone, and refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError, MegatronTipError
from megatron_tip.machine import Machine
from megatron_tip.planning.inputs import default_num_workers
from megatron_tip.planning.plan import outline_run, plan_run
from megatron_tip.planning.settings import check_settings
from tests.helpers.tiny import make_experts, make_llama, make_tokenizer
from tests.helpers.training import Layout, make_config, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "sections,world_size,expected_text",
    [
        (
            {"teacher": {"tensor_parallel_size": 5}},
            5,
            "teacher.tensor_parallel_size: expected a divisor of its 12 attention",
        ),
        (
            {"model": {"pipeline_parallel_size": 4}},
            4,
            "model.pipeline_parallel_size: expected a divisor of its 6 layers",
        ),
        ({"model": {"tensor_parallel_size": 2}}, 3, "student: expected a world size that is a multiple of tp 2 x pp 1"),
        (
            {"teacher": {"context_parallel_size": 2}},
            3,
            "teacher: expected a world size that is a multiple of tp 1 x cp 2 x pp 1 = 2, got 3; start a different",
        ),
        ({"model": {"drop_layers": (6,)}}, 1, "model.drop_layers: expected different layers among 0..5"),
        ({"model": {"path": Path("nowhere")}}, 1, "nowhere/config.json: no such file"),
        (
            {"model": {"sequence_parallel": True}},
            1,
            "model.sequence_parallel: expected model.tensor_parallel_size above 1",
        ),
        ({"selection": {"rule": "tip_sof_or"}}, 1, "the nearest name is 'tip_soft_or'"),
        (
            {"selection": {"rule": "tip_soft_or", "retention_ratio": 0.01, "minimum_per_rollout": 0}},
            1,
            "selection.retention_ratio: expected at least one token of the longest response, got floor(0.01 x 64) = 0",
        ),
        (
            {"selection": {"passes": "one"}, "model": {"pipeline_parallel_size": 2}},
            2,
            'selection.passes = "one": expected model.pipeline_parallel_size = 1, got 2; set it to "auto"',
        ),
        ({"rollout": {"max_response_tokens": 4090}}, 1, "expected at most the student's max_position_embeddings 4096"),
        (
            {"optimizer": {"warmup_steps": 4}},
            1,
            "optimizer.warmup_steps: expected fewer than training.steps = 4, got 4",
        ),
        ({"loss": {"divergence": "sampled_token", "temperature": 2.0}}, 1, "expected rollout.temperature = loss.temp"),
        (
            {"rollout": {"engine": "replay", "replay_folder": Path("no")}},
            1,
            "rollout.replay_folder: expected an existing",
        ),
        (
            {"rollout": {"importance_cap": 2.0, "top_p": 0.9}},
            1,
            "rollout.importance_cap: expected rollout.top_p = 1, got 0.9",
        ),
        ({"optimizer": {"min_lr": 1.0}}, 1, "optimizer.min_lr: expected at most optimizer.lr = 0.001, got 1.0"),
    ],
)
def test_what_cannot_run_is_refused(models: Path, sections, world_size: int, expected_text: str):
    with pytest.raises(MegatronTipError) as caught:
        plan_run(make_config(models, Layout(1), **sections), world_size)
    assert expected_text in str(caught.value)
    if "path" not in sections.get("model", {}) and "replay_folder" not in sections.get("rollout", {}):
        with pytest.raises(MegatronTipError) as elsewhere:
            outline_run(make_config(models, Layout(1), **sections), world_size, Machine(is_elsewhere=True))
        assert str(elsewhere.value) == str(caught.value)


def test_a_replay_with_other_held_out_prompts_is_refused_unless_nothing_is_replayed(models: Path, tmp_path: Path):
    recorded = tmp_path / "rollouts"
    recorded.mkdir()
    (recorded / "step_000001.jsonl").touch()
    replay = {"engine": "replay", "replay_folder": recorded}
    config = make_config(models, Layout(1), rollout=replay, heldout={"num_prompts": 3})
    with pytest.raises(ConfigError, match=r"heldout\.num_prompts: expected 0, .* got 3"):
        plan_run(config, 1)
    plan_run(config, 1, generates=False)


def test_the_rule_full_needs_no_budget(models: Path):
    full = {"rule": "full", "retention_ratio": 0.01, "scope": "rollout", "minimum_per_rollout": 0}
    outline = outline_run(make_config(models, Layout(1), selection=full), 1, Machine())
    assert outline.selector.keeps_all
    assert outline.selector.asked_share == 1.0


@pytest.mark.parametrize("owner", ["model", "teacher"])
def test_transformer_engine_in_float32_is_refused(models: Path, owner: str):
    layers = {"transformer_impl": "transformer_engine", "dtype": "float32"}
    with pytest.raises(ConfigError, match=rf'{owner}\.transformer_impl: expected "auto" or "local" with'):
        check_settings(make_config(models, Layout(1), **{owner: layers}), {})
    check_settings(make_config(models, Layout(1), **{owner: layers | {"dtype": "bfloat16"}}), {})


def test_another_tokenizer_is_refused_with_an_example(models: Path, tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    make_tokenizer(folder / "teacher", vocab_size=280)
    with pytest.raises(MegatronTipError, match=r"expected the student's tokenizer .* entries differ, for example '"):
        plan_run(make_config(folder, Layout(1)), 1)


def test_a_tokenizer_with_other_special_tokens_names_the_setting(models: Path, tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    tokenizer = json.loads((folder / "teacher" / "tokenizer.json").read_text())
    added = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|pad|>")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<|fill|>"] = vocabulary.pop("<|pad|>")
    added["content"] = "<|fill|>"
    (folder / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = json.loads((folder / "teacher" / "tokenizer_config.json").read_text()) | {"pad_token": "<|fill|>"}
    (folder / "teacher" / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(ConfigError, match=r'only special tokens differ: teacher\.special_tokens = "may_differ"'):
        plan_run(make_config(folder, Layout(1)), 1)
    plan_run(make_config(folder, Layout(1), teacher={"special_tokens": "may_differ"}), 1)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(models: Path, tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    for name in ("student", "teacher"):
        tokenizer = json.loads((folder / name / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["a token beyond the embeddings"] = 400
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        MegatronTipError,
        match=r"expected embeddings of 401 rows or more .* largest id is 400, got 307",
    ):
        plan_run(make_config(folder, Layout(1)), 1)


def test_models_of_one_tokenizer_and_other_paddings_share_the_smaller_vocabulary(models: Path, tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    make_llama(folder / "teacher", seed=3, vocab_size=320)
    plan = plan_run(make_config(folder, Layout(4, student=(4, 1), teacher=(1, 1))), 4)
    assert plan.vocab_size == 307
    assert plan.padded_vocab_size == 320
    assert plan.student_grid.dp_size == 1
    assert plan.teacher_grid.dp_size == 4
    assert plan.stop_token_ids == (2,)


@pytest.mark.parametrize(
    "sections,world_size,expected_text",
    [
        ({"tensor_parallel_size": 2}, 2, "model.sequence_parallel: expected true for a model with experts and tensor_"),
        ({"expert_model_parallel_size": 3}, 3, "model.expert_model_parallel_size: expected a divisor of its 8 experts"),
        ({"expert_model_parallel_size": 8}, 4, "student: expected a number of ranks per pipeline stage that is a mult"),
    ],
)
def test_experts_that_cannot_run_are_refused(tmp_path: Path, sections, world_size: int, expected_text: str):
    make_experts(tmp_path / "student", seed=1)
    config = make_config(tmp_path, Layout(1), model=sections, teacher={"path": tmp_path / "student"})
    with pytest.raises(ConfigError) as caught:
        plan_run(config, world_size)
    assert expected_text in str(caught.value)


def test_a_stage_without_experts_is_refused(tmp_path: Path):
    make_experts(tmp_path / "student", seed=1, mlp_only_layers=[0, 1])
    config = make_config(tmp_path, Layout(2, student=(1, 2)), teacher={"path": tmp_path / "student"})
    with pytest.raises(ConfigError, match=r"experts in every pipeline stage, got none in stage 0 \(layers 0 to 1\)"):
        plan_run(config, 2)
    sections = {"model": {"pipeline_layers": (3, 1)}, "teacher": {"path": tmp_path / "student"}}
    plan_run(make_config(tmp_path, Layout(2, student=(1, 2)), **sections), 2)


def test_an_auxiliary_loss_without_experts_is_refused(models: Path):
    with pytest.raises(ConfigError, match=r"model.moe_aux_loss_coeff: expected 0 for a model without experts, got 0.1"):
        plan_run(make_config(models, Layout(1), model={"moe_aux_loss_coeff": 0.1}), 1)


def test_on_a_cpu_as_many_workers_as_the_experts_need(models: Path):
    sizes = {"tensor_parallel_size": 3, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}
    assert default_num_workers(make_config(models, Layout(1), model=sizes, teacher={"pipeline_parallel_size": 2})) == 6
