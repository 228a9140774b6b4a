"""What the doctor finds on a host of a cluster."""

import json
import socket
from pathlib import Path

import pytest

from megatron_tip.commands import network
from megatron_tip.commands.finding import Finding
from megatron_tip.commands.network import address_findings, gpu_findings, network_findings, server_findings
from tests.helpers.fake_sglang import FakeSGLang
from tests.helpers.training import Layout, make_config


def texts(findings, *states: str) -> list[str]:
    return [finding.text for finding in findings if finding.state in states]


def test_a_name_that_is_loopback_is_told_with_the_interface_to_set(monkeypatch: pytest.MonkeyPatch):
    addresses = {"n1": "127.0.1.1", "n2": "10.0.0.2"}
    monkeypatch.setattr(network.socket, "gethostbyname", addresses.__getitem__)
    (finding,) = address_findings("n1")
    assert (finding.state, "n1, is 127.0.1.1: other hosts cannot reach gloo" in finding.text) == ("note", True)
    assert "GLOO_SOCKET_IFNAME" in finding.remedy
    assert [finding.state for finding in address_findings("n2")] == ["ok"]

    def fails(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(network.socket, "gethostbyname", fails)
    assert "does not resolve (Name or service not known)" in texts(address_findings("n3"), "note")[0]


@pytest.mark.parametrize(
    "variable,value,is_there",
    [
        ("NCCL_SOCKET_IFNAME", "lo", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "l", True),
        ("NCCL_SOCKET_IFNAME", "^docker0", True),
        ("GLOO_SOCKET_IFNAME", "l", False),
        ("TIP_SOCKET_IFNAME", "bond77", False),
        ("NCCL_SOCKET_IFNAME", "bond77,lo", True),
    ],
)
def test_an_interface_that_is_not_here_is_missing(variable: str, value: str, is_there: bool):
    missing = texts(network_findings({variable: value}), "missing")
    assert [text.startswith(f"{variable}={value}: this machine has ") for text in missing] == [True] * (not is_there)


def test_settings_of_nccl_that_servers_would_not_have_are_told():
    assert not [text for text in texts(network_findings({}), "note") if "NCCL_" in text]
    (text,) = [text for text in texts(network_findings({"NCCL_NVLS_ENABLE": "1"}), "note") if "NCCL_" in text]
    assert text.startswith("NCCL_NVLS_ENABLE=1: servers that were started by other means need it too")


def test_another_torch_than_that_of_sglang_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "_torch_of_sglang", lambda: "1.0.0")
    assert any(text.startswith("SGLang asks for torch 1.0.0, here is ") for text in texts(network_findings({}), "note"))


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which somebody uses the second; torch's CPU build sees neither."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, 4\\n1, 40960\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("nvidia_smi")
def test_busy_gpus_and_a_torch_that_sees_none(monkeypatch: pytest.MonkeyPatch):
    findings = list(gpu_findings())
    assert texts(findings, "note") == ["GPU 1 is in use: 40.0 GiB are taken"]
    (text,) = texts(findings, "missing")
    assert text.endswith("sees none of this machine's 2 GPUs; a run would use the CPU")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # an empty list asks for the CPU
    assert "GPUs were asked for (SLURM_GPUS_ON_NODE=2)" in texts(gpu_findings(), "missing")


def test_given_servers_are_asked(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with FakeSGLang() as fake:
        urls = (fake.url, f"http://127.0.0.1:{port}")
        config = make_config(tmp_path, Layout(1), rollout={"engine": "sglang", "server_urls": urls})
        there, gone = server_findings(config, {})
    assert fake.url in there.text
    assert there.state in ("ok", "note")
    assert (gone.state, gone.text.startswith("rollout.server_urls: ")) == ("missing", True)
    assert gone.remedy.startswith("start the server, or correct rollout.server_urls; curl http://127.0.0.1:")


def test_a_wrong_password_is_told_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(client) -> None:
        raise network.ServerRefusedError(f"{client.url}/server_info: HTTP 401: Unauthorized")

    monkeypatch.setattr("megatron_tip.rollout.sglang.client.SGLangClient.server_info", refuses)
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"api": "secret"}))
    teacher = {"kind": "sglang", "urls": ("http://n7:1",), "keys_file": keys}
    (finding,) = server_findings(make_config(tmp_path, Layout(1), teacher=teacher), {})
    assert finding == Finding(
        "missing",
        "teacher.urls: http://n7:1/server_info: HTTP 401: Unauthorized",
        "put the server's --api-key into teacher.keys_file",
    )


def test_a_port_that_a_jobs_server_would_need_is_told(tmp_path: Path):
    config = make_config(tmp_path, Layout(1), rollout={"engine": "sglang"})
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (finding,) = server_findings(config, {"TIP_SGLANG_PORT": str(port)})
    assert (finding.state, finding.text.startswith(f"port {port} of servers that a job starts")) == ("note", True)
    assert "TIP_SGLANG_PORT" in finding.remedy
