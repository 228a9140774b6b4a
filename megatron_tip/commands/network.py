"""What keeps processes on GPUs and hosts from meeting: busy GPUs, names, interfaces, ports, NCCL, given servers."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping

from megatron_tip.commands.finding import Finding
from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, EngineError, ServerRefusedError
from megatron_tip.parallel.environment import nccl_environment
from megatron_tip.placement.hosts import gpu_request

_BUSY_MIB = 1024
_SERVER_PORTS = 8


def gpu_findings() -> Iterator[Finding]:
    """Yields GPUs that others use, and GPUs of this machine that torch does not see."""
    import torch

    if request := gpu_request(os.environ):
        state = "ok" if torch.cuda.is_available() else "missing"
        yield Finding(state, f"GPUs were asked for ({request})", "" if state == "ok" else "see nvidia-smi on this node")
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        used = {int(index): int(memory) for index, memory in (line.split(",") for line in shown.splitlines())}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Finding("note", f"nvidia-smi does not tell the GPUs' memory: {error}", "nvidia-smi")
        return
    if used and not torch.cuda.is_available():
        yield Finding(
            "missing",
            f"torch {torch.__version__} sees none of this machine's {len(used)} GPUs; a run would use the CPU",
            "install torch's CUDA build, or correct CUDA_VISIBLE_DEVICES",
        )
    for index, memory in used.items():
        if memory > _BUSY_MIB:
            yield Finding(
                "note",
                f"GPU {index} is in use: {memory / 1024:.1f} GiB are taken",
                "end that process (nvidia-smi lists it), or leave the GPU out of CUDA_VISIBLE_DEVICES",
            )


def address_findings(name: str) -> Iterator[Finding]:
    """Yields whether other hosts can use the address that this machine's name resolves to."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding(
            "note",
            f"this machine's name, {name}, does not resolve ({error.strerror}); gloo looks it up on runs over several "
            "hosts",
            "export GLOO_SOCKET_IFNAME=<interface>, or TIP_SOCKET_IFNAME in slurm/site.sh",
        )
        return
    if not address.startswith("127."):
        yield Finding("ok", f"this machine's name, {name}, is {address}")
        return
    yield Finding(
        "note",
        f"this machine's name, {name}, is {address}: other hosts cannot reach gloo there",
        "export GLOO_SOCKET_IFNAME=<interface>, or TIP_SOCKET_IFNAME in slurm/site.sh (or correct /etc/hosts)",
    )


def network_findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yields the network's settings: interfaces that do not exist here, and NCCL's that all processes must share."""
    known = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TIP_SOCKET_IFNAME"):
        value = environ.get(variable, "")
        names = [part for part in value.removeprefix("=").split(",") if part]
        if not names or value.startswith("^"):
            continue
        exact = value.startswith("=") or variable != "NCCL_SOCKET_IFNAME"  # NCCL takes beginnings of names
        if not any(name == one or (not exact and name.startswith(one)) for one in names for name in known):
            yield Finding(
                "missing",
                f"{variable}={value}: this machine has {', '.join(known)}",
                f"export {variable}=<one of them that the other hosts reach>, or unset it",
            )
    built_for, here = _torch_of_sglang(), importlib.metadata.version("torch").split("+")[0]
    if built_for not in ("", here):
        yield Finding(
            "note",
            f"SGLang asks for torch {built_for}, here is {here}: servers from another environment have another NCCL",
            "python -c 'import torch; print(torch.cuda.nccl.version())' in both environments must print the same",
        )
    shared = nccl_environment(environ)
    told = ", ".join(f"{name}={value}" for name, value in shared.items())
    yield Finding("ok", f"NCCL: {told} in the trainer and in servers that it or its job starts")
    for name, value in shared.items():
        if value != "0":
            yield Finding(
                "note", f"{name}={value}: servers that were started by other means need it too", f"unset {name}"
            )


def server_findings(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yields whether given servers answer and take the password, and whether ports are free for those of a job."""
    from megatron_tip.rollout.sglang.keys import read_keys

    rollout, teacher = config.rollout, config.teacher
    groups = (
        ("rollout.server_urls", rollout.server_urls, config.sglang.keys_file, "sglang.keys_file"),
        ("teacher.urls", [url for _, url in teacher.routes], teacher.keys_file, "teacher.keys_file"),
    )
    for setting, urls, keys_file, keys_setting in groups:
        for url in urls:
            try:
                keys = read_keys(keys_file, setting=keys_setting)
            except ConfigError as error:
                yield Finding("missing", str(error), f"set {keys_setting} to the file of the servers' passwords")
                break
            yield _given_server(setting, url, keys.api, keys_setting)
    if rollout.engine == "sglang" and not rollout.server_urls:
        yield from _ports(int(environ.get("TIP_SGLANG_PORT") or 31000))


def _given_server(setting: str, url: str, api_key: str | None, keys_setting: str) -> Finding:
    from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
    from megatron_tip.rollout.sglang.keys import ServerKeys

    limits = Timeouts(connect=3.0, silence=10.0, retries=0)
    try:
        with SGLangClient(url, vocab_size=1, keys=ServerKeys(api=api_key), timeouts=limits) as client:
            version = client.server_info().version
    except ServerRefusedError as error:
        remedy = f"put the server's --api-key into {keys_setting}" if "401" in str(error) else "see its log"
        return Finding("missing", f"{setting}: {error}", remedy)
    except EngineError as error:
        return Finding("missing", f"{setting}: {error}", f"start the server, or correct {setting}; curl {url}/health")
    own = _own_sglang()
    if own and own != version:
        return Finding(
            "note",
            f"{url}: SGLang {version}, here {own}; its NCCL may be another one than the trainer's",
            "python -c 'import torch; print(torch.cuda.nccl.version())' in both environments must print the same",
        )
    return Finding("ok", f"{url}: SGLang {version} answers")


def _torch_of_sglang() -> str:
    """Returns the version of torch that the installed SGLang requires exactly; empty without one."""
    try:
        requirements = importlib.metadata.requires("sglang") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((one.removeprefix("torch==") for one in requirements if one.startswith("torch==")), "")


def _own_sglang() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ports(first: int) -> Iterator[Finding]:
    for port in range(first, first + _SERVER_PORTS):
        try:
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            yield Finding(
                "note",
                f"port {port} of servers that a job starts here is not free: {error}",
                "`ss -ltnp` shows who has it; export another TIP_SGLANG_PORT",
            )
            return
    yield Finding("ok", f"ports {first} to {first + _SERVER_PORTS - 1} are free for servers that a job starts here")
