"""The call of sbatch that a submission becomes."""

import os
import shlex
from pathlib import Path

import pytest

from megatron_tip.commands.submit import (
    Submission,
    as_served,
    hosts_of,
    require_files,
    sbatch_command,
    site_values,
    submit,
)
from megatron_tip.commands.time_limit import WARNING_SECONDS, seconds_of
from megatron_tip.errors import ConfigError
from tests.helpers.training import Layout, make_config

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "slurm"
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("TIP_", "MEGATRON_TIP_"))}


def test_site_values_and_run_become_options_and_the_command_line_wins(tmp_path: Path):
    config = make_config(tmp_path, Layout(1))
    environ = ENVIRON | {"TIP_PARTITION": "h800", "TIP_TIME": "12:00:00"}
    submission = Submission(
        Path("my run.toml"), ["run.seed=2"], nodes=8, options=["--qos=high", "--time=1:00:00"], environ=environ
    )
    command = sbatch_command(submission, config)
    assert command == [
        "sbatch",
        "--job-name=run",
        "--nodes=8",
        "--partition=h800",
        "--time=12:00:00",
        f"--output={tmp_path}/run/slurm/%j.out",
        f"--export=ALL,TIP_ROOT={ROOT},TIP_GPUS_PER_NODE=8",
        "--gpus-per-node=8",
        "--qos=high",
        "--time=1:00:00",
        f"{SLURM}/train.sbatch",
        f"{Path.cwd()}/my run.toml",
        "run.seed=2",
    ]
    by_hand = ["mkdir", "-p", f"{tmp_path}/run/slurm", "&&", *command]
    assert shlex.split(submit(submission, config, dry_run=True)) == by_hand


def test_options_of_sbatch_are_words(tmp_path: Path):
    options = ["-p gpu", "-t9:00:00", "--comment=a b"]
    command = sbatch_command(
        Submission(Path("a.toml"), options=options, environ=ENVIRON), make_config(tmp_path, Layout(1))
    )
    assert command[-6:-2] == ["-p", "gpu", "-t9:00:00", "--comment=a b"]


@pytest.mark.parametrize("option", ["--nodes=4", "-N4", "-N 4", "--nodes 4", "--gpus-per-node=2"])
def test_nodes_that_were_not_checked_are_refused(tmp_path: Path, option: str):
    submission = Submission(Path("a.toml"), options=[option], environ=ENVIRON)
    with pytest.raises(
        ConfigError, match=r"--sbatch=.*: expected --(nodes|gpus-per-node) N, by which the run is checked"
    ):
        sbatch_command(submission, make_config(tmp_path, Layout(1)))


def test_a_file_that_is_not_here_is_refused():
    require_files([])
    with pytest.raises(
        ConfigError, match=r"files: expected what the run reads .* found no data/a\.jsonl; mend the path"
    ):
        require_files([Path("data/a.jsonl"), Path("models/a")])


def test_the_job_of_a_sweep_logs_each_run_apart(tmp_path: Path):
    command = sbatch_command(
        Submission(Path("a.toml"), script="sweep", environ=ENVIRON), make_config(tmp_path, Layout(1))
    )
    assert f"--output={tmp_path}/run/slurm/%A_%a.out" in command


def test_a_percent_sign_in_a_folder_is_no_pattern_of_slurm(tmp_path: Path):
    config = make_config(tmp_path / "50%j", Layout(1))
    command = sbatch_command(Submission(Path("a.toml"), environ=ENVIRON), config)
    assert f"--output={tmp_path}/50%%j/run/slurm/%j.out" in command


@pytest.mark.parametrize(
    "options, limit",
    [
        ([], "3"),
        (["--time=2"], "24:00:00"),
        (["-t3:00"], "24:00:00"),
        (["--time=10", "--signal=B:USR1@600"], ""),
        (["--signal=USR1@90000"], "1-00"),
    ],
)
def test_a_time_limit_without_time_for_a_step_is_refused(tmp_path: Path, options, limit):
    submission = Submission(Path("a.toml"), options=options, environ=ENVIRON | {"TIP_TIME": limit})
    with pytest.raises(ConfigError, match=r"--time: expected more than the \d+ s before the limit at which SLURM"):
        sbatch_command(submission, make_config(tmp_path, Layout(1)))
    longer = Submission(Path("a.toml"), options=[*options, "--time=2-0:00"], environ=submission.environ)
    assert sbatch_command(longer, make_config(tmp_path, Layout(1)))


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("7", 420),
        ("7:30", 450),
        ("1:00:05", 3605),
        ("2-3", 183600),
        ("2-3:04", 183840),
        ("2-3:04:05", 183845),
        ("UNLIMITED", None),
        ("", None),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_as_slurm_writes_them(limit, seconds):
    assert seconds_of(limit) == seconds


def test_the_warning_is_that_of_the_scripts():
    for script in ("train", "train_disaggregated", "sweep"):
        assert f"#SBATCH --signal=B:USR1@{WARNING_SECONDS}\n" in (SLURM / f"{script}.sbatch").read_text()


def test_another_site_file_is_read_by_bash(tmp_path: Path):
    site = tmp_path / "site.sh"
    site.write_text('TIP_PARTITION=$(printf gpu)\nTIP_ACCOUNT="a b"\nTIP_TIME=1\nTIP_TASKS_PER_NODE=4\n')
    values = site_values(ENVIRON | {"TIP_GPU_REQUEST": "--gres=gpu:", "MEGATRON_TIP_SITE": str(site)})
    assert list(values.values()) == ["gpu", "a b", "1", "4", "", "--gres=gpu:", ""]
    with pytest.raises(ConfigError, match=r"nowhere.sh: expected a file of shell variables"):
        site_values(ENVIRON | {"MEGATRON_TIP_SITE": "nowhere.sh"})


def test_an_unknown_script_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"expected one of train, .*, sweep, got tarin; did you mean train\?"):
        Submission(Path("a.toml"), script="tarin", environ=ENVIRON)


def test_without_slurm_the_command_to_run_elsewhere_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"found none; where it is installed, run: mkdir -p .*/run/slurm && sbatch"):
        submit(Submission(Path("a.toml"), environ=ENVIRON), make_config(tmp_path, Layout(1)), dry_run=False)


def test_the_job_has_the_gpus_that_are_asked_for():
    def hosts(*, gpus: int | None = None, nodes: int = 2, **environ: str):
        return hosts_of(Submission(Path("a.toml"), nodes=nodes, gpus_per_node=gpus, environ=ENVIRON | environ))

    assert (hosts().workers, hosts().gpus, hosts().first_port, hosts().by_job) == (16, tuple(range(8)), 31000, True)
    assert hosts(gpus=4, TIP_GPUS_PER_NODE="6").gpus == tuple(range(4)), "the command line wins"
    few = hosts(TIP_GPUS_PER_NODE="6", TIP_TASKS_PER_NODE="4")
    assert (few.workers, few.workers_per_node, len(few.gpus)) == (8, 4, 6)
    assert (hosts(gpus=0).workers, hosts(gpus=0).gpus) == (2, ())
    with pytest.raises(ConfigError, match="expected numbers in TIP_GPUS_PER_NODE"):
        hosts(TIP_GPUS_PER_NODE="eight")


@pytest.mark.parametrize(
    "gpus,environ,expected",
    [
        (4, {}, ["--gpus-per-node=4"]),
        (2, {"TIP_GPU_REQUEST": "--gres=gpu:h800:"}, ["--gres=gpu:h800:2"]),
        (4, {"TIP_GPU_REQUEST": ""}, []),
        (0, {}, []),
    ],
)
def test_slurm_is_asked_for_gpus_as_the_site_says(tmp_path: Path, gpus: int, environ: dict, expected: list[str]):
    submission = Submission(Path("a.toml"), gpus_per_node=gpus, environ=ENVIRON | environ)
    command = sbatch_command(submission, make_config(tmp_path, Layout(1)))
    assert [part for part in command if part.startswith(("--gpus", "--gres"))] == expected
    assert f"--export=ALL,TIP_ROOT={ROOT},TIP_GPUS_PER_NODE={gpus}" in command


def test_a_configuration_is_checked_as_the_script_will_run_it(tmp_path: Path):
    config = make_config(tmp_path, Layout(1))
    apart = Submission(Path("a.toml"), nodes=3, script="train_disaggregated", rollout_nodes=1, teacher_nodes=1)
    assert as_served(config, Submission(Path("a.toml"))) == config
    served = as_served(config, apart)
    assert (served.rollout.engine, len(served.rollout.server_urls)) == ("sglang", 1)
    assert (served.teacher.kind, len(served.teacher.urls)) == ("sglang", 1)
    replay = make_config(tmp_path, Layout(1), rollout={"engine": "replay", "replay_folder": tmp_path})
    with pytest.raises(ConfigError, match=r"that slurm/train_disaggregated\.sbatch starts"):
        as_served(replay, apart)


def test_nodes_for_servers_need_the_script_that_splits_nodes():
    with pytest.raises(ConfigError, match="expected --script train_disaggregated, got --script train"):
        Submission(Path("a.toml"), nodes=2, rollout_nodes=1)


@pytest.mark.parametrize("nodes", [{"nodes": 2, "rollout_nodes": 2}, {"nodes": 2}, {"nodes": 3, "rollout_nodes": 1}])
def test_nodes_that_do_not_add_up_are_refused_before_the_layout_is(nodes):
    teacher_nodes = nodes["nodes"] - 1
    with pytest.raises(ConfigError, match="--nodes: expected at least one trainer and one rollout node"):
        Submission(Path("run.toml"), script="train_disaggregated", teacher_nodes=teacher_nodes, **nodes)
