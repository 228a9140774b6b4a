"""The shell library that the scripts share, and what a script does outside of SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "slurm"
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("TIP_", "MEGATRON_TIP_"))}


def shell(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` in bash with the library and the site's values loaded."""
    prologue = f"set -euo pipefail; TIP_ROOT={ROOT}; source {SLURM}/lib.sh; source {SLURM}/site.sh; "
    return subprocess.run(
        ["bash", "-c", prologue + script], env=ENVIRON | environ, capture_output=True, text=True, check=False
    )


def test_a_container_gets_image_mounts_and_the_repository():
    bare = shell("tip_srun_arguments 2 8", SLURM_CPUS_ON_NODE="96").stdout.split("\n")
    assert bare[:-1] == [
        "--kill-on-bad-exit=1",
        "--nodes=2",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--label",
        "--cpus-per-task=12",
    ]
    boxed = shell(
        "tip_srun_arguments 1 1 n7",
        TIP_CONTAINER_IMAGE="/images/tip.sqsh",
        TIP_CONTAINER_MOUNTS="/data:/data",
    ).stdout.split("\n")
    assert "--nodelist=n7" in boxed
    assert "--container-image=/images/tip.sqsh" in boxed
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in boxed


def test_network_settings_of_the_site_reach_the_tasks_and_the_caller_wins():
    site = {"TIP_NCCL_IB_HCA": "=mlx5_0,mlx5_1", "TIP_SOCKET_IFNAME": "bond0"}
    script = 'tip_network; echo "$NCCL_IB_HCA $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME ${NCCL_IB_GID_INDEX:-unset}"'
    assert shell(script, **site).stdout.split() == ["=mlx5_0,mlx5_1", "bond0", "bond0", "unset"]
    assert shell(script, NCCL_IB_HCA="mlx5_9", **site).stdout.split()[0] == "mlx5_9"


@pytest.mark.parametrize(
    "code,warned,restarts,expected",
    [
        (0, "", "0", "finished"),
        (75, "", "0", "submit the same command again"),
        (75, "1", "0", "requeue 7"),
        (138, "1", "0", "requeue 7"),  # 128 + SIGUSR1: the warning came while the workers started
        (138, "", "0", "failed with exit code 138"),
        (143, "1", "0", "requeue 7"),  # 128 + SIGTERM: srun ended a task that left behind the first one
        (137, "1", "0", "requeue 7"),
        (137, "", "0", "failed with exit code 137"),
        (1, "1", "0", "failed with exit code 1"),
        (75, "1", "5", "not requeued: restarted 5 times already"),
    ],
)
def test_a_job_goes_back_to_the_queue_only_after_a_warning_and_a_checkpoint(code, warned, restarts, expected, tmp_path):
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    script = f'scontrol() {{ echo "$@" >&2; }}; TIP_FOLDER={tmp_path}; TIP_WARNED={warned}; tip_finish {code}'
    ended = shell(script, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts, TIP_MAX_RESTARTS="5")
    assert ended.returncode == (75 if warned and code > 128 else code)
    assert expected in ended.stderr
    assert ("requeue 7" in ended.stderr) == (expected == "requeue 7")


FINISH = 'scontrol() { echo "$@" >&2; }; TIP_CHECKPOINT_BEFORE=$(tip_newest_checkpoint); '


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ([], [], "not requeued: this start finished no step (newest checkpoint: none)"),
        ([2, 999999], [], "not requeued: this start finished no step (newest checkpoint: step_999999)"),
        ([], [2], "from its last checkpoint, step_000002\nrequeue 7\n"),
        ([2, 999999], [1000000], "from its last checkpoint, step_1000000\nrequeue 7\n"),
    ],
)
@pytest.mark.parametrize("code", [75, 138])
def test_a_start_without_a_step_is_the_last_one(before, after, expected, code, tmp_path):
    """Otherwise a time limit that is too short would requeue the job again and again."""
    folder = tmp_path / "my run" / "checkpoints"
    for step in before:
        (folder / f"step_{step:06d}").mkdir(parents=True)
    steps = " ".join(f"step_{step:06d}" for step in after)
    made = f'for step in {steps}; do mkdir -p "$TIP_FOLDER/checkpoints/$step"; done; '
    ended = shell(
        f"TIP_FOLDER='{folder.parent}'; {FINISH}{made}TIP_WARNED=1; code={code}; tip_finish $code", SLURM_JOB_ID="7"
    )
    assert expected in ended.stderr
    assert ended.returncode == 75
    assert ("requeue 7" in ended.stderr) == bool(after)


@pytest.mark.parametrize("steps, expected", [([], "before the first step was done"), ([3], "with a checkpoint")])
def test_a_cancelled_job_says_what_it_left(steps, expected, tmp_path):
    for step in steps:
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    ended = shell(f"TIP_FOLDER={tmp_path}; {FINISH}tip_finish 75", SLURM_JOB_ID="7")
    assert f"stopped {expected}; submit the same command again to continue" in ended.stderr


def test_the_folder_of_the_run_is_known_before_it_starts(tmp_path):
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    stand_ins = "tip_address() { echo n1; }; scontrol() { echo n1; }; srun() { :; }; TIP_TASKS_PER_NODE=1; "
    python = f'python() {{ echo "{tmp_path}"; }}; TIP_PYTHON=python; '
    ran = shell(stand_ins + python + 'tip_train 1 n1 run.toml; echo "$TIP_FOLDER $TIP_CHECKPOINT_BEFORE"')
    assert ran.stdout == f"{tmp_path} step_000004\n"


def test_in_a_container_the_batch_node_needs_no_interpreter():
    """srun runs it there, and cannot see the processes of the batch node."""
    stand_ins = "tip_address() { echo n1; }; scontrol() { echo n1; }; TIP_PYTHON=not-here; TIP_TASKS_PER_NODE=1; "
    srun = 'srun() { echo "$@" >&2; }; TIP_ROLLOUT_NODES=1 TIP_TEACHER_NODES=0; '
    served = "tip_serve run.toml; TIP_URLS=(http://n1:1) TIP_SERVER_PROCESSES=(17); tip_wait_for_servers; "
    job = {"SLURM_JOB_NODELIST": "n1", "TIP_CONTAINER_IMAGE": "tip.sqsh"}
    ran = shell(stand_ins + srun + served + "tip_setting run.folder run.toml", **job)
    assert ran.returncode == 0, ran.stderr
    calls = [line.split(" not-here ") for line in ran.stderr.splitlines() if " not-here " in line]
    assert [inside for _, inside in calls] == [
        "-m megatron_tip.commands.serving servers n1 run.toml",
        "-m megatron_tip.commands.serving wait 900  http://n1:1",
        "-c import sys; from megatron_tip.config.io import load_config",
    ]
    for options, _ in calls:
        assert options.startswith("--overlap ")
        assert "--container-image=tip.sqsh" in options
        assert "--label" not in options


@pytest.mark.parametrize("script", ["train", "train_disaggregated", "sweep", "convert"])
def test_a_script_that_does_not_find_the_repository_says_what_to_do(script, tmp_path):
    command = ["bash", str(SLURM / f"{script}.sbatch"), "run.toml"]
    ran = subprocess.run(
        command, env=ENVIRON | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert (
        f"expected the repository in {tmp_path}: run sbatch in its root, or with --export=ALL,TIP_ROOT=" in ran.stderr
    )


@pytest.mark.parametrize("script", ["train", "train_disaggregated", "sweep", "convert"])
def test_a_script_outside_slurm_says_how_it_is_started(script):
    ran = subprocess.run(
        ["bash", str(SLURM / f"{script}.sbatch"), "run.toml"], env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert f"{script}.sbatch is a SLURM job: start it with sbatch" in ran.stderr
    assert "unbound" not in ran.stderr


def test_signals_go_on_to_the_workers_and_their_exit_code_comes_back():
    worker = "trap 'echo got USR1; exit 75' USR1; echo ready; while :; do sleep 0.05; done"
    script = f'(sleep 0.5; kill -USR1 $$) & code=0; tip_run bash -c "{worker}" || code=$?; echo "$code $TIP_WARNED"'
    assert shell(script).stdout.split("\n")[:3] == ["ready", "got USR1", "75 1"]


def test_a_task_of_an_array_is_requeued_alone(tmp_path):
    """SLURM's own number of an array's last task is that of the array: by it all tasks would be requeued."""
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    script = f'scontrol() {{ echo "$@" >&2; }}; TIP_FOLDER={tmp_path}; TIP_WARNED=1; tip_finish 75'
    ended = shell(script, SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert "requeue 7_3\n" in ended.stderr


def test_a_warning_before_the_workers_start_is_not_lost():
    start = "tip_network() { :; }; tip_setup; kill -USR1 $$; "
    ended = shell(start + 'code=0; tip_run echo started || code=$?; echo "$code $TIP_WARNED"')
    assert ended.stdout == "75 1\n"


def test_a_warning_while_servers_start_ends_the_wait_and_the_job():
    """It had no time for a step, and would not have it after a requeue either."""
    start = "tip_network() { :; }; tip_setup; tip_address() { echo node; }; srun() { cat >/dev/null; }; "
    lines = r"printf 'server\tstudent\t0\t-\thttp://node:1\t[]\n'"
    wait = f"python() {{ case $3 in wait) exec sleep 60 ;; servers) {lines} ;; esac; }}; TIP_PYTHON=python; "
    hosts = 'scontrol() { [[ $1 == requeue ]] && echo "$@" >&2 || echo node; }; (sleep 0.5; kill -USR1 $$) & '
    served = "TIP_ROLLOUT_NODES=1 TIP_TEACHER_NODES=0; tip_serve run.toml; tip_wait_for_servers"
    ended = shell(start + wait + hosts + served, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node")
    assert ended.returncode == 75
    assert "requeue 7\n" not in ended.stderr
    assert "not requeued: this start finished no step (newest checkpoint: none)" in ended.stderr


def test_a_node_without_an_address_ends_the_job_before_anything_starts():
    """In the scripts `tip_train ... || code=$?` turns errexit off."""
    ran = shell(
        "unset MASTER_ADDR; scontrol() { echo node1; }; srun() { echo started; }; "
        "TIP_PYTHON=python; code=0; tip_train 1 node1 run.toml || code=$?; echo went on"
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "scontrol show node node1: expected a NodeAddr, got none" in ran.stderr


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "4 4"),
        ({"TIP_GPUS_PER_NODE": "8", "TIP_TASKS_PER_NODE": "6"}, "6 8"),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, "1 0"),
        ({}, "1 0"),
    ],
)
def test_a_script_has_as_many_workers_as_gpus(tmp_path: Path, environ: dict[str, str], expected: str):
    environ = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0,1,2,3"} | environ  # without nvidia-smi
    assert shell('tip_setup; echo "$TIP_TASKS_PER_NODE $TIP_GPUS_PER_NODE"', **environ).stdout == f"{expected}\n"


def test_no_interpreter_is_needed_where_the_job_starts_no_servers(tmp_path: Path):
    config = tmp_path / "run.toml"
    config.write_text('rollout.engine = "embedded"\n')
    script = f"TIP_ROLLOUT_NODES=0 TIP_TEACHER_NODES=0 TIP_PYTHON=nowhere; tip_serve {config}; tip_wait_for_servers"
    assert shell(script, SLURM_JOB_NUM_NODES="2").returncode == 0
    config.write_text('rollout.engine = "sglang"\n')
    assert shell(script, SLURM_JOB_NUM_NODES="1").returncode == 0
    assert shell(f"scontrol() {{ echo NodeAddr=n1; }}; {script}", SLURM_JOB_NUM_NODES="2").returncode == 2
