"""The command as its user meets it: refusals, failures, Ctrl-C, and worlds that torchrun and srun started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tip import __version__
from megatron_tip.config.io import load_config
from megatron_tip.training.checkpoints.files import CheckpointFiles, write_state
from megatron_tip.training.checkpoints.same_run import defining_settings
from tests.helpers.processes import is_alive, wait_until
from tests.helpers.training import make_models
from tests.unit.config.test_io import MINIMAL

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "megatron_tip.cli"]
STAND_IN = """
import os, sys, time, types
from pathlib import Path

def train(config, fresh=False, make_gauge=None):
    folder = Path({folder!r})
    name = "rank_" + os.environ["RANK"]
    (folder / (name + ".partial")).write_text(str(os.getpid()))
    (folder / (name + ".partial")).rename(folder / name)
{body}

module = types.ModuleType("megatron_tip.training.loop")
module.train = train
sys.modules[module.__name__] = module
"""
NOT_SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config_path(tmp_path, models):
    path = tmp_path / "run.toml"
    text = MINIMAL.replace("runs/a", str(tmp_path / "run")).replace("models/", f"{models}/")
    path.write_text(text.replace("prompts.jsonl", str(tmp_path / "prompts.jsonl")))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n')
    return path


@pytest.fixture
def environ():
    return {name: value for name, value in os.environ.items() if name not in NOT_SET} | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def stand_in(tmp_path, environ):
    """Puts `body` in the place of the training loop in every Python that `environ` starts; each rank leaves its pid."""

    def stand_in(body):
        folder = tmp_path / "stand_in"
        folder.mkdir()
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        (folder / "sitecustomize.py").write_text(STAND_IN.format(folder=str(tmp_path), body=lines))
        environ["PYTHONPATH"] = f"{folder}:{ROOT}"

    return stand_in


def run(*arguments, environ):
    return subprocess.run([*COMMAND, *map(str, arguments)], env=environ, capture_output=True, text=True, check=False)


def after_start(stderr):
    """What the command says after its first line, by which it says at once what it does."""
    first, _, rest = stderr.partition("\n")
    assert first.startswith(("starting ", "checking "))
    assert " learns from teacher, into " in first
    return rest


def pids_of(folder, num_workers):
    files = [folder / f"rank_{rank}" for rank in range(num_workers)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    "arguments,expected_text",
    [
        (["training.step=3"], "training.step (on the command line): unknown key; did you mean training.steps?"),
        (["lr=1e-4"], "expected section.key=value, got 'lr=1e-4'; did you mean optimizer.lr=1e-4?"),
        (["--optimizer.lr=1e-4"], "got '--optimizer.lr=1e-4'; did you mean optimizer.lr=1e-4? Write it without dashes"),
        (["--lr", "1e-4"], "got '--lr'; did you mean optimizer.lr=VALUE?"),
        (["model.path=Qwen/Qwen3-0.6B"], "`hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`"),
        (["selection.rule=no_such_module:score"], "the module lies beside the run's TOML"),
        (["training.steps=few"], 'training.steps (on the command line): expected integer >= 1, got "few" (text)'),
        (["--nproc=3", "model.tensor_parallel_size=2"], "student: expected a world size that is a multiple of tp 2"),
        (["model.pipeline_parallel_size=4"], "model.pipeline_parallel_size: expected a divisor of its 6 layers, got 4"),
    ],
    ids=["key", "no_section", "dashes", "dashes_and_blank", "hub_name", "no_module", "type", "world", "layers"],
)
def test_wrong_input_is_refused_before_anything_starts(config_path, environ, stand_in, arguments, expected_text):
    stand_in("raise AssertionError('started')")
    ended = run("train", config_path, *arguments, environ=environ)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") or after_start(ended.stderr).startswith("error: ")
    assert expected_text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (config_path.parent / "run").exists()


def test_finished_run_is_not_started_again(config_path, environ):
    folder = config_path.parent / "run"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    ended = run("train", config_path, environ=environ)
    assert ended.returncode == 2
    assert "holds a finished run" in ended.stderr


def test_a_job_that_is_requeued_behind_its_end_has_nothing_left_to_do(config_path, environ, stand_in):
    stand_in("raise AssertionError('started')")
    folder = config_path.parent / "run"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_RESTART_COUNT": "1"}
    ended = run("train", config_path, environ=environ | place)
    assert ended.returncode == 0
    assert "holds this job's finished run" in ended.stderr


def test_unfinished_run_is_not_made_another_one(config_path, environ, stand_in, tmp_path):
    stand_in('(folder / f"{name}_fresh").write_text(str(fresh))')
    files = CheckpointFiles(tmp_path / "run" / "checkpoints")
    partial = files.begin(2)
    write_state(partial, {"settings": defining_settings(load_config(config_path))})
    files.commit(2, partial, {})
    ended = run("train", config_path, "optimizer.lr=0.5", environ=environ)
    assert ended.returncode == 2
    assert ended.stderr.endswith("--fresh, which removes it\n  optimizer.lr: 1e-06, now 0.5\n")
    assert run("train", config_path, "optimizer.lr=0.5", "--fresh", environ=environ).returncode == 0
    assert (tmp_path / "rank_0_fresh").read_text() == "True"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    run("train", config_path, "--fresh", environ=environ | place | {"SLURM_RESTART_COUNT": "1"})
    assert (tmp_path / "rank_0_fresh").read_text() == "False"


def test_help_is_the_reference(environ):
    ended = run("train", "--help", environ=environ)
    assert ended.returncode == 0
    assert "--nproc" in ended.stdout
    assert "  retention_ratio: number > 0 and <= 1, default 0.05\n" in ended.stdout


def test_version(environ):
    assert run("--version", environ=environ).stdout == f"megatron-tip {__version__}\n"


def test_dry_run_prints_what_would_run(config_path, environ, stand_in, tmp_path):
    stand_in("raise AssertionError('started')")
    refused = run("train", config_path, "--dry-run", environ=environ)
    assert refused.returncode == 2
    assert "expected at least 16 held-out prompts and one for training, got 1 different ones" in refused.stderr
    overrides = ["training.steps=7", "heldout.num_prompts=0"]
    ended = run("train", config_path, *overrides, "--dry-run", environ=environ)
    assert ended.returncode == 0
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(ended.stdout)
    told = after_start(ended.stderr).splitlines()
    assert told[0] == "student: student, 6 layers, 0 M parameters, float32, tp 1 x pp 1 x dp 1"
    assert told[1].startswith("teacher: teacher, 6 layers, ")
    assert "prompts: 1 to train on, fewer than rollout.prompts_per_step = 8" in ended.stderr
    assert told[-1] == "ok: this configuration can run here, on 1 workers"
    assert load_config(resolved) == load_config(config_path, overrides)
    assert not (tmp_path / "run").exists()


def test_a_rule_beside_the_file_is_found_from_another_folder(config_path, environ, stand_in, tmp_path):
    (config_path.parent / "rules_of_mine.py").write_text("def surprise(student_entropy):\n    return student_entropy\n")
    stand_in("from megatron_tip.selection.rules import load_rule; load_rule(config.selection.rule)")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    command = [*COMMAND, "train", str(config_path), "selection.rule=rules_of_mine:surprise"]
    ended = subprocess.run(command, cwd=elsewhere, env=environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, after_start(ended.stderr)) == (0, "")


def test_workers_get_the_overrides_and_fill_both_layouts(config_path, environ, stand_in, tmp_path):
    stand_in('(folder / f"{name}_steps").write_text(f"{os.environ[\'WORLD_SIZE\']} {config.training.steps}")')
    overrides = ["training.steps=7", "model.tensor_parallel_size=2", "teacher.pipeline_parallel_size=1"]
    ended = run("train", config_path, *overrides, environ=environ)
    assert (ended.returncode, ended.stdout, after_start(ended.stderr)) == (0, "", "")
    assert [(tmp_path / f"rank_{rank}_steps").read_text() for rank in range(2)] == ["2 7", "2 7"]
    assert (tmp_path / "run").is_dir()


def test_error_of_a_worker_is_one_clear_line(config_path, environ, stand_in):
    stand_in(
        """
from megatron_tip.errors import TrainingError
if name == "rank_1":
    raise TrainingError("step 3: expected a finite loss, got nan")
time.sleep(1000)
"""
    )
    ended = run("train", config_path, "--nproc", 2, environ=environ)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert after_start(ended.stderr) == "error: step 3: expected a finite loss, got nan\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_leaves_no_process(config_path, environ, stand_in, tmp_path, number):
    stand_in("time.sleep(1000)")
    command = subprocess.Popen(
        [*COMMAND, "train", config_path, "--nproc", "2"], env=environ, stderr=subprocess.PIPE, text=True
    )
    pids = pids_of(tmp_path, 2)
    command.send_signal(number)
    _, stderr = command.communicate()
    assert command.returncode == 128 + number
    left = "there is no checkpoint, the same command starts from the beginning"
    assert after_start(stderr) == (
        f"{number.name}: the workers end and may save for 120 s; a second signal ends them at once\n"
        f"error: ended by {number.name}; all workers are ended; {left}\n"
    )
    assert not any(is_alive(pid) for pid in pids)


STOPS = """
from megatron_tip.parallel.stop import StopRequested, StopSignals
with StopSignals() as stop:
    (Path({folder!r}) / (name + "_hears")).write_text("")
    while not stop.received:
        time.sleep(0.01)
    raise StopRequested(stop.received)
"""


@pytest.mark.parametrize("has_checkpoint", [False, True], ids=["before_the_first_step", "behind_step_2"])
def test_a_run_is_called_saved_when_it_has_a_checkpoint(config_path, environ, stand_in, tmp_path, has_checkpoint):
    stand_in(STOPS.format(folder=str(tmp_path)))
    command = subprocess.Popen(
        [*COMMAND, "train", config_path, "--nproc", "1"], env=environ, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: (tmp_path / "rank_0_hears").exists())
    if has_checkpoint:
        CheckpointFiles(tmp_path / "run" / "checkpoints").step_folder(2).mkdir(parents=True)
    command.send_signal(signal.SIGINT)
    _, stderr = command.communicate()
    told = "the run is saved, the same command continues it"
    if not has_checkpoint:
        told = "no step is done yet, the same command starts it from the beginning"
    assert after_start(stderr).splitlines()[-1] == f"error: ended by SIGINT; all workers are ended; {told}"


ALL_REDUCE = """
import torch, torch.distributed as dist
from megatron_tip.parallel.distributed import destroy_distributed, init_distributed
worker = init_distributed(timeout_seconds=60)
total = torch.tensor([worker.rank + 1])
dist.all_reduce(total)
(folder / f"{name}_total").write_text(f"{worker.world_size} {worker.local_rank} {total.item()}")
destroy_distributed()
"""


def test_joins_the_world_that_torchrun_started(config_path, environ, stand_in, tmp_path):
    stand_in(ALL_REDUCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "megatron_tip.cli", "train", config_path], env=environ, check=True)
    assert [(tmp_path / f"rank_{rank}_total").read_text() for rank in range(2)] == ["2 0 3", "2 1 3"]


def test_joins_the_world_that_srun_started(config_path, environ, stand_in, tmp_path):
    stand_in(ALL_REDUCE)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\n")
    scontrol.chmod(0o755)
    environ["PATH"] = f"{scontrol.parent}:{environ['PATH']}"
    environ |= {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node1",
    }
    tasks = [
        subprocess.Popen(
            [*COMMAND, "train", config_path], env={**environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        )
        for rank in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    assert [(tmp_path / f"rank_{rank}_total").read_text() for rank in range(2)] == ["2 0 3", "2 1 3"]


def test_error_in_a_world_that_others_started_names_the_rank(config_path, environ, stand_in):
    stand_in('from megatron_tip.errors import InputError\nraise InputError("no prompts")')
    ended = run("train", config_path, environ=environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert ended.returncode == 2
    assert ended.stderr == "rank 0: error: no prompts\n"
