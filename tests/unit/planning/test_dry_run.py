"""A configuration is checked for another machine without weights, and refused for the reasons it would be there."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.placement.hosts import hosts_elsewhere
from megatron_tip.planning import dry_run as dry_run_module
from megatron_tip.planning.dry_run import DryRun, dry_run
from megatron_tip.rollout.sglang import setup as sglang_setup
from tests.helpers.training import Layout, make_config, make_models

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL = (
    *("quickstart_cpu", "pruned_pair", "quickstart_sglang", "multi_turn_calculator"),
    *("fixed_context_study", "near_pair_study", "self_distillation"),
)
RECIPES = sorted(
    path for path in EXAMPLES.glob("*/*.toml") if path.parent.name not in SMALL and path.name != "sweep.toml"
)


SERVED_TEACHER = ["teacher.kind=sglang", 'teacher.urls=["http://n7:1"]', "teacher.keys_file=elsewhere.json"]


def checked(config: Config, world_size: int = 64, gpu_memory_gib: float = 80.0) -> DryRun:
    result = dry_run(config, hosts_elsewhere(world_size, 8), gpu_memory_gib=gpu_memory_gib)
    result.require_memory()
    return result


def recipe(*overrides: str) -> Config:
    return load_config(EXAMPLES / "qwen3_4b_to_1p7b" / "qwen3_4b_to_1p7b.toml", overrides)


def test_every_pair_of_the_papers_and_one_with_experts_has_a_recipe():
    assert len(RECIPES) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_on_eight_nodes_of_eight(path: Path):
    result = checked(load_config(path))
    assert result.outline.student_grid.world_size == result.outline.teacher_grid.world_size == 64
    assert 5 * 2**30 < result.memory.total_bytes < 80 * 2**30
    report = "\n".join(result.lines())
    assert "64 workers: student tp" in report
    assert "\n0-7    trainer, ranks 0-63 " in report


def test_the_experts_of_a_recipe_are_described():
    lines = checked(load_config(EXAMPLES / "qwen3_30b_a3b_to_4b" / "qwen3_30b_a3b_to_4b.toml")).lines()
    assert any(line.endswith("teacher tp 2 x pp 1 x dp 32 (experts tp 1 x ep 8 x dp 8)") for line in lines)
    assert any("teacher: " in line and "30.5 B parameters, 3.4 B of them active" in line for line in lines)


def test_quickstart_runs_on_three_workers():
    assert checked(load_config(EXAMPLES / "quickstart_cpu" / "quickstart.toml"), 3).outline.student_grid.tp_size == 3


@pytest.mark.parametrize(
    "overrides,expected_text",
    [
        (["model.tensor_parallel_size=16"], "model.tensor_parallel_size: expected a divisor of its 8 key/value heads"),
        (["teacher.pipeline_parallel_size=5"], "teacher.pipeline_parallel_size: expected a divisor of its 36 layers"),
        (["rollout.max_response_tokens=40000"], "expected at most the student's max_position_embeddings 40960"),
        (["teacher.path=models/Llama-3.1-8B-Instruct"], "expected the student's tokenizer (qwen3), got that of llama3"),
        (["teacher.path=models/Qwen2.5-14B"], 'got that of qwen2.5; set teacher.special_tokens = "may_differ"'),
        (["teacher.path=models/Qwen3-5B"], "teacher.path: expected a folder with a config.json, which is enough"),
        (["selection.rule=tip_sof_or"], "the nearest name is 'tip_soft_or'"),
        (["rollout.temperature=0.5"], "expected rollout.temperature = loss.temperature"),
        (["loss.divergence=jsd", "rollout.top_p=0.9"], 'rollout.top_p: expected 1 with rollout.engine = "sglang"'),
        (["rollout.engine=sglang", "sglang.gpus=[7]", "rollout.servers=16"], "sglang.gpus: expected 2 for"),
        (["rollout.engine=sglang", "rollout.servers=2"], "rollout.servers: expected a multiple of 8, at most 64"),
        (
            ["sglang.share_gpus=false", 'rollout.server_urls=["n7:1"]'],
            'rollout.server_urls: expected "http://host:port"',
        ),
        (["sglang.memory_fraction=0.88"], "give servers less memory (sglang."),
        ([*SERVED_TEACHER, "loss.divergence=jsd"], "loss.divergence: expected one of"),
        (
            ["sglang.release_memory=always", "rollout.ahead=1"],
            'release_memory: expected "auto" or "never" with',
        ),
        (
            ["sglang.release_memory=always", "sglang.router_url=http://n7:1"],
            'release_memory: expected "auto" or "never" with sglang.router_url',
        ),
        ([*SERVED_TEACHER, "training.offload=teacher"], 'offload: expected "none", "optimizer" or "all" with teacher.'),
        (["model.drop_layers=[28]"], "model.drop_layers: expected different layers among 0..27"),
        (
            ["training.max_tokens_per_micro_batch=4000000"],
            "a layer's activations, 122.1: lower training.max_tokens_per_micro_batch",
        ),
    ],
)
def test_what_cannot_run_there_is_refused_here(overrides: list[str], expected_text: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  ConfigError or WeightsError, both of the user's input
        checked(recipe(*overrides))
    assert expected_text in str(caught.value)


@pytest.mark.parametrize(
    "purpose,expected",
    [
        ("student: activations of a step, held", "selection.passes"),
        ("student: a layer's activations", "max_tokens_per_micro_batch"),
        ("embedded engine, first GPU: weights", "rollout.engine"),
        ("teacher: head on the student's ranks", "model.tensor_parallel_size"),
        ("teacher: weights", "teacher.tensor_parallel_size"),
        ("sync: buckets", "sync.bucket_bytes"),
    ],
)
def test_each_purpose_has_its_own_remedy(purpose: str, expected: str):
    assert expected in dry_run_module._remedy(purpose)


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="student: expected a world size that is a multiple of tp 2"):
        checked(recipe(), 63)


def test_what_could_not_be_seen_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_setup, "require_sglang", lambda: None)
    result = checked(recipe())
    absent = ["models/Qwen3-1.7B", "models/Qwen3-4B", "data/dapo-math-17k.parquet"]
    assert [note.split(" is not on this machine")[0] for note in result.notes] == absent
    assert [str(path) for path in result.absent] == absent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def test_what_is_here_is_checked_whole(models: Path):
    result = checked(make_config(models, Layout(4, student=(2, 1))), 4)
    assert (result.notes, result.outline.student_grid.dp_size) == ((), 2)


def test_a_folder_with_a_config_alone_tells_its_shape(models: Path, tmp_path: Path):
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((models / name / "config.json").read_bytes())
    notes = checked(make_config(tmp_path, Layout(1)), 1).notes
    assert notes[-1] == "whether both models share one tokenizer"


def parts(config: Config, world_size: int = 64) -> dict[str, float]:
    return checked(config, world_size, 10_000).memory.parts


def test_memory_follows_the_layout():
    base, wide = parts(recipe()), parts(recipe("model.tensor_parallel_size=4"))
    for name in ("student: weights", "student: gradients, float32", "loss: logits of a chunk"):
        assert wide[name] == pytest.approx(base[name] / 2, rel=1e-3), name
    whole = parts(recipe("optimizer.distributed=false"))
    assert whole["student: optimizer"] == pytest.approx(base["student: optimizer"] * 32)  # 64 GPUs / tp 2
    name = "student: activations of a micro-batch"
    kept = parts(recipe("selection.passes=two", "model.recompute_activations=false"))
    assert kept[name] > 5 * parts(recipe("selection.passes=two"))[name]


def test_servers_of_our_own_take_their_share_of_the_gpus_that_they_share():
    name, gib = "SGLang on the trainer's GPUs (sglang.memory_fraction)", 2.0**30
    served = ["sglang.share_gpus=true", "sglang.memory_fraction=0.4"]
    assert parts(recipe(*served))[name] == pytest.approx(0.4 * 10_000 * gib)
    assert parts(recipe(*served, "rollout.servers=16", "sglang.gpus=[6,7]"))[name] == pytest.approx(0.4 * 10_000 * gib)
    assert parts(recipe("sglang.memory_fraction=0"))[name] == pytest.approx(0.3 * 10_000 * gib)
    assert name not in parts(recipe("sglang.share_gpus=false", "sglang.gpus=[6]"), 4)  # workers on 0 to 3
    assert name not in parts(recipe("rollout.engine=embedded", "sglang.memory_fraction=0.3"))
    assert name not in parts(recipe("sglang.share_gpus=false", 'rollout.server_urls=["http://n7:1"]'))


def test_a_teacher_behind_servers_takes_nothing():
    alone = parts(recipe(*SERVED_TEACHER))
    assert not any(name.startswith("teacher") for name in alone)
    assert alone["student: weights"] == parts(recipe())["student: weights"]


def test_the_embedded_engine_holds_weights_of_the_students_type():
    bfloat16, float32 = (parts(recipe("rollout.engine=embedded", f"model.dtype={it}")) for it in ("auto", "float32"))
    for name in ("embedded engine, first GPU: weights", "embedded engine, first GPU: cache"):
        assert float32[name] == pytest.approx(2 * bfloat16[name]), name


def test_dropped_layers_are_dropped_from_a_known_shape():
    dropped = parts(recipe("model.drop_layers=[0,1,2,3,4,5,6,7,8,9,10,11,12,13]"))  # of 28
    matrix = 151936 * 2048  # bfloat16, over tp 2
    whole = parts(recipe())["student: weights"]
    assert dropped["student: weights"] - matrix == pytest.approx((whole - matrix) / 2, rel=1e-3)


def test_weights_are_those_of_the_published_parameters():
    alone = parts(recipe("model.tensor_parallel_size=1", "model.sequence_parallel=false"))
    assert alone["student: weights"] == pytest.approx(2 * 1_720_574_976, rel=1e-3)  # bfloat16; the vocabulary is padded
    assert alone["student: gradients, float32"] == pytest.approx(4 * 1_720_574_976, rel=1e-3)


def test_pipelines_share_the_layers(models: Path):
    sections: dict[str, Any] = {"optimizer": {"lr": 1e-3}}
    one = parts(make_config(models, Layout(1), **sections), 1)
    two = parts(make_config(models, Layout(2, student=(1, 2)), **sections), 2)
    assert two["student: weights"] < 0.75 * one["student: weights"]
