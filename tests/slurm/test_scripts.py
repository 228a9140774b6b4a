"""The shipped scripts, submitted to a real two-node SLURM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from megatron_tip.observability.metrics_file import read_metrics
from megatron_tip.training.checkpoints.files import CheckpointFiles
from tests.helpers.processes import wait_until
from tests.helpers.slurm import NODES, Job, SlurmCluster
from tests.helpers.wandb_files import history_of, records_of

SLURM = Path(__file__).parents[2] / "slurm"
SITE = {"TIP_PYTHON": sys.executable, "TIP_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LONG = ("training.steps=100000", "prompts.num_prompts=40")  # hours, unless something ends it


def metrics_of(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def workers_of(job: Job) -> dict[int, psutil.Process]:
    """The job's training processes, by rank."""
    workers = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            is_worker = "megatron_tip.cli" in process.cmdline() and process.name().startswith("python")
        except psutil.Error:
            continue
        own = environ.get("SLURM_CONF") == job.cluster.environ["SLURM_CONF"]
        if is_worker and own and environ.get("SLURM_JOB_ID") == job.identity and "SLURM_PROCID" in environ:
            workers[int(environ["SLURM_PROCID"])] = process
    return workers


def test_submit_runs_on_two_nodes_to_the_end(cluster: SlurmCluster, config_path: Path):
    folder = config_path.parent / "50%j"  # a pattern of SLURM's, which here is a name
    overrides = ["training.steps=2", "monitoring.trace=true", "tracking.view_every_steps=2", f"run.folder={folder}"]
    command = [sys.executable, "-m", "megatron_tip.cli", "submit", str(config_path), *overrides]
    printed = subprocess.run(
        [*command, "--nodes=2", "--gpus-per-node=0"],
        env=cluster.environ | SITE | {"PYTHONPATH": str(SLURM.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    identity = printed.removeprefix("Submitted batch job ").split()[0]
    job = Job(cluster, identity, folder / "slurm" / f"{identity}.out")
    job.wait_for("COMPLETED")
    assert "finished" in job.log()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["world"] == {"tp": 1, "pp": 1, "cp": 1, "dp": 2}  # one worker on each node
    metrics = metrics_of(folder)[-1]
    assert metrics["host/rss_total_bytes"] > 200e6
    assert metrics["perf/train_tokens_per_second"] > 0
    assert not any(name.startswith("gpu/") for name in metrics)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["name"] == "train"} == {0, 1}
    assert (folder / "views" / "step_000002.html").exists()


def test_a_task_killed_on_one_node_ends_the_job_with_its_cause(cluster: SlurmCluster, config_path: Path):
    job = cluster.submit(SLURM / "train.sbatch", config_path, *LONG, options=["--nodes=2"], env=SITE)
    job.wait_for("RUNNING")
    wait_until(lambda: len(metrics_of(config_path.parent / "run")) > 2)
    workers = workers_of(job)
    assert workers.keys() == {0, 1}
    os.kill(workers[1].pid, signal.SIGKILL)
    job.wait_for("FAILED", timeout_seconds=60)
    assert job.fact("ExitCode") == "137:0"  # 128 + SIGKILL
    assert "task 1: Killed" in job.log()
    assert "failed with exit code 137" in job.log()
    assert job.fact("Restarts") == "0"  # a failure is for a person to look at
    _, alive = psutil.wait_procs(workers.values(), timeout=10)
    assert not alive


def test_a_run_goes_on_by_itself_after_a_requeue_and_after_a_time_limit(cluster: SlurmCluster, config_path: Path):
    """The limit is drawn in while the run goes, so that the warning is due at once; SLURM looks every half minute.

    Meanwhile the nodes take no job: the next start would be warned as well if it came before the limit is set anew.
    """
    folder = config_path.parent / "run"
    overrides = (*LONG, "checkpoint.every_steps=5", "tracking.wandb=offline")
    options = ["--nodes=2", "--time=20", "--signal=B:USR1@110"]
    job = cluster.submit(SLURM / "train.sbatch", config_path, *overrides, options=options, env=SITE)
    wait_until(lambda: len(metrics_of(folder)) > 7)
    cluster.run("scontrol", "requeue", job.name)
    job.wait_for_log("continuing after step")
    num_steps = len(metrics_of(folder))
    wait_until(lambda: len(metrics_of(folder)) > num_steps)

    nodes = f"NodeName={','.join(NODES)}"
    cluster.run("scontrol", "update", nodes, "State=DRAIN", "Reason=test")
    hours, minutes, _ = map(int, job.fact("RunTime").split(":"))
    cluster.run("scontrol", "update", f"JobId={job.name}", f"TimeLimit={60 * hours + minutes + 2}")
    try:
        job.wait_for_log("requeued: the run continues from its last checkpoint", timeout_seconds=150)
        wait_until(lambda: job.fact("Restarts") == "2")
        job.wait_for("PENDING")
        cluster.run("scontrol", "update", f"JobId={job.name}", "TimeLimit=20")
    finally:  # also for the tests that come next
        cluster.run("scontrol", "update", nodes, "State=RESUME")
    saved = CheckpointFiles(folder / "checkpoints").steps()[-1]
    assert saved - metrics_of(folder)[-1]["step"] in (0, 1), "nothing was lost"
    assert "SIGUSR1: the workers write a checkpoint and end" in job.log()
    job.wait_for_log(f"continuing after step {saved}\n")
    wait_until(lambda: metrics_of(folder)[-1]["step"] > saved)
    assert job.fact("Restarts") == "2"
    cluster.run("scancel", job.name)
    cluster.wait_until_idle()
    assert "stopped with a checkpoint; submit the same command again" in job.log()
    steps = [line["step"] for line in metrics_of(folder)]
    assert steps == list(range(len(steps)))

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3
    assert len({path.name for path in files}) == 1, "all starts are one run of W&B"
    logged = [row["_step"] for path in files for row in history_of(records_of(path))]
    assert 0 in logged  # of the last steps before a signal some may be missing: it ends W&B's own process as well


def test_a_time_limit_that_leaves_no_time_for_a_step_ends_the_job(cluster: SlurmCluster, config_path: Path):
    """The warning is due at once. SLURM looks every half minute, and meanwhile the run has not begun."""
    options = ["--nodes=1", "--time=2", "--signal=B:USR1@110"]
    env = SITE | {"TIP_PROLOGUE": "until [[ -n $TIP_WARNED ]]; do sleep 1; done"}
    job = cluster.submit(SLURM / "train.sbatch", config_path, *LONG, options=options, env=env)
    job.wait_for("FAILED")
    assert (job.fact("ExitCode"), job.fact("Restarts")) == ("75:0", "0")
    assert "not requeued: this start finished no step (newest checkpoint: none)" in job.log()


def test_a_sweep_runs_each_rule_and_budget_in_its_own_folder(cluster: SlurmCluster, config_path: Path):
    sweep = config_path.parent / "sweep.toml"
    sweep.write_text(
        f'config = "{config_path}"\nfolder = "{config_path.parent / "sweep"}"\nseeds = [1]\nbudgets = [0.5]\n'
        'rules = ["random", "ta_opd_teachability"]\noverrides = ["training.steps=1"]\n'
    )
    array = cluster.submit(SLURM / "sweep.sbatch", sweep, options=["--array=0-1"], env=SITE)
    names = ("random-0.5-seed1", "ta_opd_teachability-0.5-seed1")
    folders = [config_path.parent / "sweep" / name for name in names]
    for task, folder in enumerate(folders):
        array.of_task(task).wait_for("COMPLETED")
        assert json.loads((folder / "summary.json").read_text())["retention_ratio"]["asked"] == 0.5
    configs = [(folder / "config.toml").read_text() for folder in folders]
    assert 'rule = "random"' in configs[0]
    assert 'rule = "ta_opd_teachability"' in configs[1]


def test_conversion_to_megatron_and_back(cluster: SlurmCluster, models: Path, tmp_path: Path):
    megatron, back = tmp_path / "megatron", tmp_path / "hf"
    script = SLURM / "convert.sbatch"
    there = cluster.submit(script, "to-megatron", models / "student", megatron, env=SITE)
    refused = cluster.submit(script, "backwards", env=SITE)
    again = cluster.submit(script, "to-hf", megatron, back, options=[f"--dependency=afterok:{there.name}"], env=SITE)
    again.wait_for("COMPLETED")
    assert (back / "model.safetensors").exists()
    refused.wait_for("FAILED")
    assert "expected to-megatron or to-hf, got 'backwards'" in refused.log()
