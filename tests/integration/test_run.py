"""A whole run through the command: what it leaves, and the same rollouts again under another layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tip.observability.metric_reference import metric_of
from megatron_tip.selection import PAPERS_RULES
from tests.helpers.training import RUN_TOML, make_models

ROOT = Path(__file__).parents[2]


def train(folder: Path, models: Path, *overrides: str) -> None:
    """Runs the command to its end."""
    folder.mkdir(exist_ok=True)
    config = folder / "config_in.toml"
    config.write_text(RUN_TOML.format(folder=folder / "run", models=models, threads=2))
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_tip.cli", "train", str(config), *overrides],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def first_run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    train(folder, models, "selection.passes=two")
    return folder


def test_what_a_run_leaves(first_run: Path, models: Path):
    folder = first_run / "run"
    summary = json.loads((folder / "summary.json").read_text())
    metrics = metrics_of(first_run)

    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert [name for line in metrics for name in line if name != "step" and metric_of(name) is None] == []
    assert summary["steps"] == 3
    assert summary["world"] == {"tp": 1, "pp": 1, "cp": 1, "dp": 1}
    assert summary["heldout_reverse_kl"]["before"] == metrics[0]["heldout/reverse_kl"]
    assert 0 < summary["heldout_reverse_kl"]["after"] < summary["heldout_reverse_kl"]["before"]
    accuracy = {when: metrics[place]["heldout/task_accuracy"] for when, place in (("before", 0), ("after", 3))}
    assert summary["heldout_task_accuracy"] == accuracy
    assert "heldout/task_accuracy" not in metrics[1], "measured with the divergence"
    assert summary["tokens"]["valid"] == sum(line["selection/num_valid"] for line in metrics[1:])
    trained, uncut = (sum(line[f"train/num_model_tokens{end}"] for line in metrics[1:]) for end in ("", "_uncut"))
    assert (summary["tokens"]["trained"], summary["tokens"]["trained_uncut"]) == (trained, uncut)
    assert trained < uncut
    assert summary["saved_train_seconds"] == pytest.approx(
        sum(line["perf/saved_train_seconds"] for line in metrics[1:])
    )
    assert summary["retention_ratio"]["got"] == summary["tokens"]["selected"] / summary["tokens"]["valid"]
    assert {"total", "rollout", "teacher", "score", "train", "sync"} <= summary["seconds"].keys()
    assert summary["peak_rss_bytes"] > 100e6
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 2
    assert Image.open(folder / "report.png").size[0] > 800
    assert not list(folder.rglob("*.partial"))


def test_the_exported_student_is_the_trained_one(first_run: Path, models: Path):
    folder = first_run / "run" / "hf"
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert student.config.num_hidden_layers == 4
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(models / "student").get_vocab()
    )
    before = load_file(models / "student" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    change = (after["model.layers.1.mlp.up_proj.weight"] - before["model.layers.2.mlp.up_proj.weight"]).abs().max()
    assert 1e-5 < change < 0.1  # layer 2 of the teacher is layer 1 of the student, three steps later


def test_rules_side_by_side_on_the_rollouts_of_a_run(first_run: Path, tmp_path: Path):
    """The tool scores step 1's rollouts with the student that wrote them, and so finds the logged overlaps."""
    picture = tmp_path / "selectors.png"
    ended = subprocess.run(
        [
            *(sys.executable, "tools/compare_selectors.py", str(first_run / "run"), "--picture", str(picture)),
            *("--set", "loss.chunk_rows=7"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert Image.open(picture).size[0] > 800
    logged = metrics_of(first_run)[1]
    names = [name for name in PAPERS_RULES if name != "full"]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ended.stdout.splitlines() if "│" in line]
    table = {row[1]: row for row in cells if len(row) == 7 + len(names)}
    assert list(table) == names
    own = table["ta_opd_teachability"]
    assert int(own[2]) == logged["selection/num_selected"]
    for name, overlap in zip(names, own[7:], strict=True):
        if name not in ("ta_opd_teachability", "random", "tip_entropy_sampling"):  # those draw anew at every step
            assert float(overlap) == pytest.approx(100 * logged[f"selection/jaccard_{name}"], abs=0.51), name
    assert ended.stdout.count("kept tokens, with their positions") == 3


@pytest.mark.parametrize(
    "layout",
    [
        ("model.tensor_parallel_size=3", "teacher.pipeline_parallel_size=3"),
        ("model.pipeline_parallel_size=2", "teacher.tensor_parallel_size=2"),
        ("--nproc=2",),
        ("--nproc=2", "selection.passes=one"),
        ("model.context_parallel_size=2", "teacher.tensor_parallel_size=2", "optimizer.overlap_grad_reduce=true"),
    ],
    ids=["tp3", "pp2", "dp2", "dp2-one-pass", "cp2"],
)
def test_replaying_a_run_under_another_layout_gives_its_first_loss(
    first_run: Path, models: Path, tmp_path: Path, layout: tuple[str, ...]
):
    replay = [f"rollout.replay_folder={first_run / 'run' / 'rollouts'}", "rollout.engine=replay"]
    train(tmp_path, models, *replay, *layout)

    steps = list(zip(metrics_of(first_run)[1:], metrics_of(tmp_path)[1:], strict=True))
    for name in ("train/loss", "train/grad_norm", "selection/num_selected", "selection/threshold"):
        assert steps[0][1][name] == pytest.approx(steps[0][0][name], rel=1e-5), name
    for expected, replayed in steps[1:]:  # optimizer, tied copies and weights stay together as well
        assert replayed["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-2)
