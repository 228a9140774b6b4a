"""How servers of our own are started: arguments, environment, passwords. None is started here."""

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import dump_config
from megatron_tip.errors import ConfigError
from megatron_tip.rollout.sglang.keys import ServerKeys, new_keys, read_keys
from megatron_tip.rollout.sglang.server import (
    CPU_SHIM,
    ServerSettings,
    _copy_redacted,
    server_arguments,
    server_environment,
)
from megatron_tip.rollout.sglang.setup import check_sglang


def settings_of(tmp_path, **values):
    return ServerSettings(tmp_path / "model", tmp_path / "log", **values)


def config_of(tmp_path, **sections):
    values = {
        "run": {"folder": tmp_path / "run"},
        "model": {"path": tmp_path},
        "teacher": {"path": tmp_path},
        "prompts": {"source": "reasoning_gym", "tasks": ("basic_arithmetic",)},
        "training": {"steps": 1},
        "rollout": {"engine": "sglang"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_passwords(host):
    assert new_keys(host) == ServerKeys()


def test_other_addresses_get_two_random_passwords_that_no_repr_shows(tmp_path):
    keys, others = new_keys("0.0.0.0"), new_keys("0.0.0.0")
    assert keys.api
    assert keys.admin
    assert len({keys.api, keys.admin, others.api, others.admin}) == 4
    shown = repr(keys) + repr(settings_of(tmp_path, host="0.0.0.0", keys=keys))
    assert keys.api not in shown
    assert keys.admin not in shown


def test_passwords_are_in_the_arguments_and_not_in_the_environment(tmp_path):
    settings = settings_of(tmp_path, host="0.0.0.0", keys=ServerKeys("secret-a", "secret-b"))
    arguments = server_arguments(settings, 1234)
    assert arguments[arguments.index("--api-key") + 1] == "secret-a"
    assert arguments[arguments.index("--admin-api-key") + 1] == "secret-b"
    assert "secret" not in str(server_environment(settings, {}))


def test_what_a_server_prints_is_kept_without_the_passwords(tmp_path):
    log = (tmp_path / "log").open("wb")
    _copy_redacted(io.BytesIO(b"server_args={'api_key': 'secret-a'}\nready\n"), log, [b"secret-a", b"secret-b"])
    assert (tmp_path / "log").read_bytes() == b"server_args={'api_key': '***'}\nready\n"


def test_a_log_that_cannot_be_written_does_not_stop_the_server(tmp_path):
    lines = io.BytesIO(b"x" * 100_000 + b"\nready\n")
    with open("/dev/full", "wb") as full:
        _copy_redacted(lines, full, [b"secret"])
    assert lines.read() == b"", "what is not read from a pipe blocks the server that writes to it"


def test_the_shim_is_on_the_path_of_cpu_servers_alone(tmp_path):
    cpu = server_environment(settings_of(tmp_path), {"PYTHONPATH": "/mine"})["PYTHONPATH"].split(":")
    gpu = server_environment(settings_of(tmp_path, device="cuda"), {"PYTHONPATH": "/mine"})["PYTHONPATH"].split(":")
    assert cpu[0] == str(CPU_SHIM)
    assert (CPU_SHIM / "sitecustomize.py").exists()
    assert str(CPU_SHIM) not in gpu
    assert cpu[-1] == gpu[-1] == "/mine"


def test_servers_see_nothing_of_the_trainers_world(tmp_path):
    world = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x"}
    environment = server_environment(settings_of(tmp_path), world | {"HOME": "/home/me"})
    assert not world.keys() & environment.keys()
    assert environment["HOME"] == "/home/me"


def test_gpus_are_given_out_and_cpu_ranks_get_cores(tmp_path):
    gpu = server_environment(settings_of(tmp_path, device="cuda", gpus=(4, 5), tp_size=2), {})
    assert gpu["CUDA_VISIBLE_DEVICES"] == "4,5"
    cpu = server_environment(settings_of(tmp_path, tp_size=2), {})
    assert len(cpu["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2


def test_top_p_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="nucleus"):
        check_sglang(config_of(tmp_path, rollout={"top_p": 0.9}))


def test_a_url_without_scheme_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.server_urls"):
        check_sglang(config_of(tmp_path, rollout={"server_urls": ("localhost:30000",)}))


@pytest.mark.parametrize(
    "urls, router, message",
    [
        ((), "http://router:1", "rollout.server_urls as well"),
        (("http://a:1",), "router:1", "sglang.router_url: expected"),
    ],
)
def test_a_router_without_servers_or_scheme_is_refused(tmp_path, urls, router, message):
    with pytest.raises(ConfigError, match=message):
        check_sglang(config_of(tmp_path, rollout={"server_urls": urls}, sglang={"router_url": router}))


def test_a_server_whose_port_is_taken_ends_before_it_loads_anything():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "megatron_tip.rollout.sglang.main"],
            input=json.dumps(["--host", "127.0.0.1", "--port", port]) + "\n",
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}: expected a free port of this machine" in ended.stderr
    assert "set another TIP_SGLANG_PORT" in ended.stderr


def test_ahead_needs_servers(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.ahead"):
        config_of(tmp_path, rollout={"engine": "embedded", "ahead": 1})


def test_passwords_of_given_servers_come_from_a_file_and_stay_out_of_the_dumped_config(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"api": "secret-a", "admin": "secret-b"}))
    keys = read_keys(path)
    assert (keys.api, keys.admin) == ("secret-a", "secret-b")
    config = config_of(tmp_path, rollout={"server_urls": ("http://host:1",)}, sglang={"keys_file": path})
    check_sglang(config)
    assert "secret" not in dump_config(config)


@pytest.mark.parametrize("content", ["secret", '["secret"]', '{"api": 5, "x": "secret"}', '{"password": "secret"}'])
def test_a_broken_file_of_passwords_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="keys_file") as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)


def test_only_a_server_that_shares_its_gpu_can_give_back_its_memory(tmp_path):
    settings = ServerSettings(model_path=tmp_path, log_path=tmp_path / "log", device="cuda")
    assert "--enable-memory-saver" not in server_arguments(settings, 1)
    assert "--enable-memory-saver" in server_arguments(replace(settings, memory_saver=True), 1)
