"""The servers that a job starts: their passwords, their processes, and what the trainer gets to know of them."""

import json
import os
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_tip.commands.serving import (
    job_hosts,
    launches,
    main,
    trainer_overrides,
    wait_for_servers,
    write_keys,
)
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError, EngineError
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import place


def test_keys_are_their_owners_alone_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    write_keys(path)
    keys = json.loads(path.read_text())
    assert set(keys) == {"api", "admin"}
    assert min(map(len, keys.values())) > 30
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_keys(path)
    assert json.loads(path.read_text()) == keys
    assert [one.name for one in path.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("left", ["", '{"api": "x', '{"api": "x"}', "[1]"])
def test_what_a_crash_left_is_written_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(left)
    write_keys(path)
    assert set(json.loads(path.read_text())) == {"api", "admin"}


CONFIG = """
run.folder = "{folder}/run"
model.path = "{folder}/student"
teacher.path = "{folder}/teacher"
teacher.tensor_parallel_size = 2
prompts.path = "prompts.parquet"
training.steps = 1
rollout.engine = "sglang"
"""
JOB = {"TIP_TASKS_PER_NODE": "2", "TIP_GPUS_PER_NODE": "2", "TIP_SGLANG_PORT": "31000"}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A run whose student has weights and whose teacher is somewhere else."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").touch()
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_servers_beside_the_trainer_are_told_to_the_scripts(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in (JOB | {"TIP_SGLANG_ARGUMENTS": "--log-level error"}).items():
        monkeypatch.setenv(name, value)
    main(["servers", "10.0.0.1,10.0.0.2", str(config_path), "sglang.share_gpus=true"])
    lines = printed(capsys)
    assert [line[:5] for line in lines[:4]] == [
        ["server", "student", "0", "0", "http://10.0.0.1:31000"],
        ["server", "student", "0", "1", "http://10.0.0.1:31001"],
        ["server", "student", "1", "0", "http://10.0.0.2:31000"],
        ["server", "student", "1", "1", "http://10.0.0.2:31001"],
    ]
    arguments = json.loads(lines[3][5])
    keys_file = config_path.parent / "run" / "servers" / "keys.json"
    options = dict(zip(arguments[:18:2], arguments[1:18:2], strict=True))
    assert (options["--host"], options["--port"], options["--tp-size"]) == ("10.0.0.2", "31001", "1")
    assert options["--mem-fraction-static"] == "0.3"
    assert options["--api-key"] == json.loads(keys_file.read_text())["api"]
    assert arguments[-2:] == ["--log-level", "error"]
    assert [line[1] for line in lines[4:]] == [
        "rollout.engine=sglang",
        'rollout.server_urls=["http://10.0.0.1:31000", "http://10.0.0.1:31001", "http://10.0.0.2:31000", '
        '"http://10.0.0.2:31001"]',
        f"sglang.keys_file={keys_file}",
        "sglang.share_gpus=true",
    ]


def test_servers_that_the_user_has_are_not_started_again(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in (JOB | {"TIP_TEACHER_NODES": "1"}).items():
        monkeypatch.setenv(name, value)
    urls = json.dumps([f"http://mine:{port}" for port in range(4)])
    main(["servers", "n1,n2,n3", str(config_path), "sglang.share_gpus=true", f"rollout.server_urls={urls}"])
    lines = printed(capsys)
    assert [line[1] for line in lines if line[0] == "server"] == ["teacher"]
    assert not [line for line in lines if line[1].startswith("rollout.")]


def test_on_cpus_the_trainer_comes_to_the_transport_of_the_job(config_path: Path):
    config = load_config(config_path, ["sync.transport=ipc"])
    placement = place(config, job_hosts(JOB | {"TIP_TASKS_PER_NODE": "1", "TIP_GPUS_PER_NODE": "0"}, 2))
    started = launches(config, placement, ["n1", "n2"], {"api": "a", "admin": "b"}, [])
    in_trainer = load_config(
        config_path, ["sync.transport=ipc", *trainer_overrides(placement.hosts, started, Path("keys.json"))]
    )
    there = place(in_trainer, Hosts(2, 1))
    assert (there.transport, there.handing_ranks) == (placement.transport, placement.handing_ranks) == ("ipc", (0, 1))


@pytest.mark.parametrize(
    "overrides, gpus, expected",
    [
        ([], "2", "bfloat16"),
        ([], "0", "float32"),
        (["model.dtype=float32"], "2", "float32"),
        (["model.dtype=float32", "rollout.dtype=bfloat16"], "2", "bfloat16"),
    ],
)
def test_a_student_is_served_in_the_dtype_that_the_probe_expects(config_path: Path, overrides, gpus, expected):
    config = load_config(config_path, overrides)
    environ = JOB | {"TIP_GPUS_PER_NODE": gpus, "TIP_ROLLOUT_NODES": "1", "TIP_TEACHER_NODES": "1"}
    hosts = job_hosts(environ, 3)
    further = ["--dtype", "float16"]
    started = launches(config, place(config, hosts), ["n1", "n2", "n3"], {"api": "a", "admin": "b"}, further)
    for launch in started:
        named = [value for name, value in pairwise(launch.arguments) if name == "--dtype"]
        assert named == ([expected, "float16"] if launch.server.role == "student" else ["float16"])


@pytest.mark.parametrize("wanted", ["always", "never"])
def test_servers_can_give_memory_back_whatever_engine_the_file_names(config_path: Path, wanted: str):
    config = load_config(config_path, ["rollout.engine=embedded", f"sglang.release_memory={wanted}"])
    placement = place(config, job_hosts(JOB | {"TIP_ROLLOUT_NODES": "1"}, 2))
    started = launches(config, placement, ["n1", "n2"], {"api": "a", "admin": "b"}, [])
    assert [("--enable-memory-saver" in one.arguments) for one in started] == [wanted == "always"] * 2


def test_on_one_node_the_run_starts_its_servers_itself(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    main(["servers", "10.0.0.1", str(config_path), "sglang.share_gpus=true"])
    assert printed(capsys) == []
    assert not (config_path.parent / "run").exists()


def test_a_teacher_over_two_nodes_has_a_process_on_each(config_path: Path):
    config = load_config(config_path, ["teacher.tensor_parallel_size=4", "sglang.share_gpus=true", "sglang.gpus=[1]"])
    hosts = job_hosts(JOB | {"TIP_ROLLOUT_NODES": "1", "TIP_TEACHER_NODES": "2"}, 4)
    keys = {"api": "a", "admin": "b"}
    started = launches(config, place(config, hosts), ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], keys, [])
    assert [(one.server.role, one.node, one.gpus, one.url) for one in started] == [
        ("student", 1, (1,), "http://10.0.0.2:31000"),
        ("teacher", 2, (0, 1), "http://10.0.0.3:31000"),
        ("teacher", 3, (0, 1), ""),
    ]
    shared = ["--nnodes", "2", "--node-rank"]
    assert started[1].arguments[-6:] == [*shared, "0", "--dist-init-addr", "10.0.0.3:31001"]
    assert started[2].arguments[-6:] == [*shared, "1", "--dist-init-addr", "10.0.0.3:31001"]
    assert "--mem-fraction-static" not in started[1].arguments, "alone on its GPUs: SGLang chooses"
    assert trainer_overrides(hosts, started, Path("keys.json")) == [
        "rollout.engine=sglang",
        'rollout.server_urls=["http://10.0.0.2:31000"]',
        "sglang.keys_file=keys.json",
        "sglang.share_gpus=false",
        "sglang.gpus=[]",
        "teacher.kind=sglang",
        'teacher.urls=["http://10.0.0.3:31000"]',
        "teacher.keys_file=keys.json",
    ]


def test_a_split_without_a_trainer_is_refused():
    with pytest.raises(ConfigError, match="2 nodes: expected some for the trainer besides 1 rollout and 1 teacher nod"):
        job_hosts(JOB | {"TIP_ROLLOUT_NODES": "1", "TIP_TEACHER_NODES": "1"}, 2)


def test_the_wait_ends_with_the_first_server_that_ended():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:1: the server ended while it started"):
        wait_for_servers(["http://127.0.0.1:1"], 60.0, [os.getpid(), ended.pid])
    with pytest.raises(EngineError, match="expected a healthy server within 0 s"):
        wait_for_servers(["http://127.0.0.1:1"], 0.0, [os.getpid()])
