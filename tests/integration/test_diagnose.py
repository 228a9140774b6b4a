"""The diagnostic through its commands: a bank, a run measured on it, its checkpoint scored under another layout."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_tip.config.io import load_config
from megatron_tip.diagnostics.arms import ArmsFile
from megatron_tip.diagnostics.bank import read_bank
from megatron_tip.diagnostics.scores import read_scores
from megatron_tip.diagnostics.session import examine
from tests.helpers.tiny import make_llama
from tests.helpers.training import make_models

ROOT = Path(__file__).parents[2]
TOML = """
[run]
folder = "{folder}/run"
[model]
path = "{models}/student"
[teacher]
path = "{models}/teacher"
[prompts]
source = "reasoning_gym"
tasks = ["basic_arithmetic"]
max_prompt_tokens = 200
[heldout]
num_prompts = 4
[rollout]
prompts_per_step = 3
max_response_tokens = 8
[optimizer]
lr = 2e-3
[training]
steps = 2
max_tokens_per_micro_batch = 600
[output]
export_hf = false
[diagnostics]
bank = "{folder}/bank"
num_contexts = 12
support_sizes = [4, 8]
rules = ["random", "ta_opd_teachability"]
retention_ratios = [0.1]
seeds = 2
[selection]
support_size = 8
retention_ratio = 0.1
"""


def command(*arguments: str, world_size: int = 1) -> None:
    """Runs `megatron-tip` as the workers of a world that is there, forked with everything imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "megatron_tip.training.loop"])
    workers = [
        context.Process(target=_work, args=(arguments, rank, world_size, port), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * world_size, arguments


def _work(arguments: tuple[str, ...], rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    sys.argv = ["megatron-tip", *arguments]
    from megatron_tip.cli import main

    main()


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, with workers of its own where it needs them."""
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_tip.cli", *arguments],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank; a run measured on it after every step; scores of its start and its end; arms."""
    folder = tmp_path_factory.mktemp("diagnose")
    config = folder / "study.toml"
    config.write_text(TOML.format(folder=folder, models=make_models(folder / "models")))
    command("diagnose", "bank", str(config))
    command("train", str(config), "diagnostics.every_steps=1")
    command("diagnose", "score", str(config))
    command("diagnose", "intervene", str(config), f"run.folder={folder}/arms")
    return folder


def test_the_bank_holds_what_was_asked_for(study: Path):
    bank = read_bank(study / "bank")
    assert len(bank.contexts) == 12
    assert bank.prompts.tolist() == list(range(12))
    assert max(context.num_generated for context in bank.contexts) <= 8


def test_a_checkpoint_of_another_layout_has_the_gain_that_the_run_logged(study: Path):
    """The run held its student whole; here two ranks share its layers and its vocabulary."""
    scored = alone(
        *("diagnose", "score", str(study / "study.toml"), "--checkpoint", str(study / "run"), "--name", "run"),
        *("model.tensor_parallel_size=2", "teacher.pipeline_parallel_size=2"),
    )
    assert scored.returncode == 0, scored.stderr
    metrics = [json.loads(line) for line in (study / "run" / "metrics.jsonl").read_text().splitlines()]
    said = alone("diagnose", "gain", str(study / "bank"), "start", "run")
    assert said.returncode == 0, said.stderr
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert metrics[0]["diagnostics/gain"] == 0
    assert metrics[2]["diagnostics/gain"] > 0
    assert float(said.stdout.split("gain ")[1].split()[0]) == pytest.approx(metrics[2]["diagnostics/gain"], abs=1e-4)
    bank = read_bank(study / "bank")
    start = read_scores(bank.scores_path("start"), bank)
    assert start.columns["forward_kl"].mean() == pytest.approx(metrics[0]["diagnostics/forward_kl"], rel=1e-5)
    assert start.about["student"] == bank.writer


def test_a_student_is_known_again_when_it_is_given_as_a_checkpoint(study: Path):
    config = load_config(study / "study.toml")
    begun, given = (examine(config, 1, checkpoint=path) for path in (None, study / "models" / "student"))
    assert begun.student == given.student == begun.bank.writer
    assert examine(config, 1, checkpoint=study / "run").student != begun.student


def test_the_step_of_a_run_can_be_scored(study: Path):
    command(
        *("diagnose", "score", str(study / "study.toml"), "--name", "step"),
        *("--checkpoint", str(study / "run" / "checkpoint"), "diagnostics.support_sizes=[4]"),
    )
    bank = read_bank(study / "bank")
    assert read_scores(bank.scores_path("step"), bank).support_sizes == [4]
    bank.scores_path("step").unlink()


def test_an_intervention_goes_on_where_it_was_interrupted(study: Path, tmp_path: Path):
    done = ArmsFile(study / "arms").read()
    assert len(done) == 2 * (1 + 2 + 1)
    shutil.copytree(study / "arms", tmp_path / "arms")
    lines = (tmp_path / "arms" / "arms.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "arms" / "arms.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    ended = alone("diagnose", "intervene", str(study / "study.toml"), f"run.folder={tmp_path}/arms")
    assert ended.returncode == 0, ended.stderr
    assert 0 < ended.stderr.index("memory of the fullest rank, roughly:") < ended.stderr.index(" of CPU, ")
    again = ArmsFile(tmp_path / "arms").read()
    assert [(result.arm, result.after) for result in again] == [(result.arm, result.after) for result in done]


def test_the_report_has_tables_and_figures(study: Path, tmp_path: Path):
    ended = alone(
        "diagnose", "report", str(study / "bank"), "--out", str(tmp_path / "out"), "--arms", str(study / "arms")
    )
    assert ended.returncode == 0, ended.stderr
    assert Image.open(tmp_path / "out" / "plane.png").size[0] > 800
    assert "ta_opd_teachability" in (tmp_path / "out" / "table_interventions.csv").read_text()


def test_rollouts_of_a_run_make_a_bank(study: Path, tmp_path: Path):
    command(
        *("diagnose", "bank", str(study / "study.toml"), f"diagnostics.bank={tmp_path}/bank"),
        *(f"diagnostics.rollouts={study}/run/rollouts", "diagnostics.num_contexts=5", "rollout.temperature=0.5"),
        world_size=2,
    )
    bank = read_bank(tmp_path / "bank")
    assert len(bank.contexts) == 5
    assert bank.manifest["weight_versions"] == [0, 1]
    assert bank.manifest["sampling"]["temperature"] == 1.0  # the run's, not that of this command
    assert bank.manifest["student"] == {"path": f"{study}/models/student", "drop_layers": [], "fingerprint": None}
    assert bank.writer is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("diagnose", "bank"), "expected a new folder"),
        (("diagnose", "score", "--name", "x", "--checkpoint", "nowhere"), "nowhere: expected a Hugging Face directory"),
        (("diagnose", "intervene", "heldout.num_prompts=0"), "heldout.num_prompts: expected at least 1"),
        (("diagnose", "intervene", "run.folder={study}/arms", "optimizer.lr=1e-3"), "holds arms of other settings"),
        (("diagnose", "intervene", "optimizer.lr=1e-3"), "full_seed1.parquet: expected no scores of an intervention"),
        (
            ("train", "diagnostics.every_steps=1", "diagnostics.bank=nowhere"),
            "diagnostics.bank: expected an existing path, got nowhere",
        ),
    ],
)
def test_a_worker_of_a_foreign_launcher_checks_before_it_meets_the_others(
    study: Path, tmp_path: Path, arguments, message
):
    """The first of two alone, as torchrun and srun start it: the second is not there, and must not be needed."""
    options = [argument.format(study=study) for argument in arguments]
    names = 1 if options[0] == "train" else 2
    folder = f"run.folder={tmp_path}/new"
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_tip.cli",
            *options[:names],
            str(study / "study.toml"),
            folder,
            *options[names:],
        ],
        env=os.environ | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.returncode == (1 if "new folder" in message else 2), "an output that exists is no refused input"
    assert message in ended.stderr


def test_a_bank_of_other_models_is_refused_before_anything_starts(study: Path, tmp_path: Path):
    make_llama(tmp_path / "other", seed=1, vocab_size=400)
    models = (f"model.path={tmp_path}/other", f"teacher.path={tmp_path}/other")
    ended = alone("diagnose", "score", str(study / "study.toml"), *models)
    assert ended.returncode == 2
    assert "was made for 307 vocabulary entries" in ended.stderr
