"""Helpers for the scripts in slurm/ that start SGLang servers: which, where and with what, and waiting for them.

    python -m megatron_tip.commands.serving servers ADDRESS,... CONFIG.toml [section.key=value ...]
    python -m megatron_tip.commands.serving wait SECONDS PID,... URL...

`servers` takes the addresses of all nodes of the job, and the variables of slurm/lib.sh from the environment. It prints
the processes to start, then the settings that the trainer needs for them; none if the run starts its servers itself.

Passwords go to a file that only its owner can read and to the servers' standard input, never to a command line, an
environment or a log. Servers log only warnings, because at the level below they print their arguments.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError, EngineError, MegatronTipError
from megatron_tip.files import atomic_write_text, parse_json
from megatron_tip.placement.hosts import Hosts, visible_gpus
from megatron_tip.placement.placement import PlacedServer, Placement, Role, job_starts_students, place
from megatron_tip.placement.table import table_of

if TYPE_CHECKING:
    import torch


def write_keys(path: Path) -> None:
    """Writes new random passwords to `path`, as sglang.keys_file reads them; keeps a whole file that exists.

    Only its owner can read the file.

    Raises:
        OutputError: it cannot be written.
    """
    if _are_keys(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {"api": secrets.token_urlsafe(32), "admin": secrets.token_urlsafe(32)}
    atomic_write_text(path, json.dumps(keys), mode=0o600)


def _are_keys(path: Path) -> bool:
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(name), str) for name in ("api", "admin"))


def student_to_serve(config: Config, dtype: "torch.dtype") -> Path:
    """Returns the directory of the student to serve with weights of `dtype`.

    With model.drop_layers, it is a description without weights in the run's folder: the first sync brings all weights.
    """
    if not config.model.drop_layers:
        return config.model.path
    from megatron_tip.conversion.safetensors_io import HfCheckpoint  # late: imports torch
    from megatron_tip.files import new_folder

    target = config.run.folder.absolute() / "servers" / "model"
    with new_folder(target, overwrite=True) as folder:
        student = HfCheckpoint(config.model.path, config.model.drop_layers)
        student.write_description(folder, dtype)
    return target


@dataclass(frozen=True)
class Launch:
    """One process of a server: on `node`, with `gpus`. `url`: of the server; empty in its further processes."""

    server: PlacedServer
    node: int
    gpus: tuple[int, ...]
    url: str
    arguments: list[str]

    def line(self) -> str:
        """Returns what the scripts read: tab-separated fields without empty ones, the arguments as JSON at the end."""
        gpus = ",".join(map(str, self.gpus)) or "-"
        return "\t".join((self.server.role, str(self.node), gpus, self.url or "-", json.dumps(self.arguments)))


def launches(
    config: Config, placement: Placement, addresses: Sequence[str], keys: Mapping[str, str], further: Sequence[str]
) -> list[Launch]:
    """Returns the processes of all servers that the job starts, node by node.

    Args:
        addresses: of all nodes, in the placement's order.
        keys: passwords, as in sglang.keys_file.
        further: arguments of SGLang for every server, which take precedence.
    """
    from megatron_tip.planning.dtypes import Dtypes  # late: imports torch
    from megatron_tip.planning.phases import releases_memory

    dtype = Dtypes.of(config, on_gpu=bool(placement.hosts.gpus)).engine
    models: dict[Role, Path] = {}
    by_job = _by_job(config, placement)
    for server in by_job:
        if server.role not in models:
            models[server.role] = student_to_serve(config, dtype) if server.role == "student" else config.teacher.path
    served = config.rollout.model_copy(update={"engine": "sglang"})  # as the trainer will have it
    savers = releases_memory(config.model_copy(update={"rollout": served}), placement)
    found = []
    for server in by_job:
        address = addresses[server.nodes[0]]
        for rank, node in enumerate(server.nodes):
            own = server_arguments(server, models[server.role], addresses[node], keys)
            if server.role == "student":
                own += ["--dtype", str(dtype).removeprefix("torch.")]
            if savers and server.role == "student" and server.gpus_on(node):
                own.append("--enable-memory-saver")
            if len(server.nodes) > 1:
                own += ["--nnodes", str(len(server.nodes)), "--node-rank", str(rank)]
                own += ["--dist-init-addr", f"{address}:{server.ports[1]}"]
            url = "" if rank else f"http://{address}:{server.port}"
            found.append(Launch(server, node, server.gpus_on(node), url, [*own, *further]))
    return found


def _by_job(config: Config, placement: Placement) -> list[PlacedServer]:
    """Returns the servers that the job starts."""
    with_students = job_starts_students(config, placement.hosts)
    return [server for server in placement.servers if server.role == "teacher" or with_students]


def server_arguments(server: PlacedServer, model: Path, host: str, keys: Mapping[str, str]) -> list[str]:
    """Returns SGLang's arguments for one server; `megatron_tip.rollout.sglang.main` reads them as JSON.

    Prompts and responses travel as token ids, so the server needs no tokenizer. `model`: a directory; without weights
    the server starts with random ones. `host`: the only address that it listens on.
    """
    pairs = {
        "--model-path": str(model),
        "--host": host,
        "--port": str(server.port),
        "--tp-size": str(len(server.places)),
        **({"--mem-fraction-static": f"{server.memory_fraction:g}"} if server.memory_fraction else {}),
        "--api-key": keys["api"],
        "--admin-api-key": keys["admin"],
        "--log-level": "warning",
        **({} if any(model.glob("*.safetensors")) else {"--load-format": "dummy"}),
    }
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output"]
    return [part for pair in pairs.items() for part in pair] + flags


def job_hosts(environ: Mapping[str, str], num_nodes: int) -> Hosts:
    """Returns the nodes of a job of `num_nodes`, as lib.sh describes them in its variables.

    Raises:
        ConfigError: no node is left for the trainer.
    """
    rollout, teacher = (int(environ.get(f"TIP_{kind}_NODES") or 0) for kind in ("ROLLOUT", "TEACHER"))
    trainers, per_node = num_nodes - rollout - teacher, int(environ["TIP_TASKS_PER_NODE"])
    if trainers < 1:
        raise ConfigError(
            f"{num_nodes} nodes: expected some for the trainer besides {rollout} rollout and {teacher} teacher nodes"
        )
    return Hosts(
        trainers * per_node,
        per_node,
        visible_gpus(environ, int(environ["TIP_GPUS_PER_NODE"])),
        rollout_nodes=rollout,
        teacher_nodes=teacher,
        first_port=int(environ["TIP_SGLANG_PORT"]),
        rendezvous_port=int(environ.get("MASTER_PORT") or 0),
        by_job=True,
    )


def trainer_overrides(hosts: Hosts, started: Sequence[Launch], keys_file: Path) -> list[str]:
    """Returns the settings that tell the trainer about the servers of the job."""
    students, teachers = (
        [launch.url for launch in started if launch.server.role == role and launch.url]
        for role in ("student", "teacher")
    )
    settings = []
    if students:
        settings += ["rollout.engine=sglang", f"rollout.server_urls={json.dumps(students)}"]
        settings += [f"sglang.keys_file={keys_file}"]
        if hosts.rollout_nodes:  # and not on the trainer's nodes, whatever the configuration says of them
            settings += ["sglang.share_gpus=false", "sglang.gpus=[]"]
        elif all(launch.server.is_beside_trainers for launch in started if launch.server.role == "student"):
            settings += ["sglang.share_gpus=true"]  # on CPUs too: the trainer comes to the same transport
    if teachers:
        settings += ["teacher.kind=sglang", f"teacher.urls={json.dumps(teachers)}"]
        settings += [f"teacher.keys_file={keys_file}"]
    return settings


def _print_servers(config: Config, addresses: Sequence[str], environ: Mapping[str, str]) -> None:
    """Prints what a job starts: one line per process, then the trainer's further settings, one per line.

    Writes passwords into the run's folder if there are servers. The lines have them, so that they go to a pipe only.
    """
    placement = place(config, job_hosts(environ, len(addresses)))
    print("\n".join(table_of(placement)), file=sys.stderr)
    keys_file = config.run.folder / "servers" / "keys.json"
    if not _by_job(config, placement):
        return
    write_keys(keys_file)
    further = environ.get("TIP_SGLANG_ARGUMENTS", "").split()
    started = launches(config, placement, addresses, json.loads(keys_file.read_text()), further)
    for launch in started:
        print(f"server\t{launch.line()}")
    for setting in trainer_overrides(placement.hosts, started, keys_file):
        print(f"trainer\t{setting}")


def wait_for_servers(urls: Sequence[str], timeout_seconds: float, processes: Sequence[int] = ()) -> None:
    """Waits until all servers answer /health.

    Args:
        processes: that run the servers; one that ends will never answer.

    Raises:
        EngineError: a server ended, or does not answer in time.
    """
    deadline = time.monotonic() + timeout_seconds
    waiting = list(urls)
    while waiting:
        waiting = [url for url in waiting if not _is_healthy(url)]
        if waiting and not all(map(_is_running, processes)):
            raise EngineError(f"one of {', '.join(waiting)}: the server ended while it started; see its messages above")
        if waiting and time.monotonic() > deadline:
            raise EngineError(
                f"{', '.join(waiting)}: expected a healthy server within {timeout_seconds:g} s, got none; see its log "
                "next to the job's"
            )
        time.sleep(0.5 if waiting else 0)


def _is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def main(arguments: Sequence[str]) -> None:
    """Runs one of the commands listed above."""
    match arguments:
        case ["servers", addresses, config_path, *overrides]:
            _print_servers(load_config(Path(config_path), overrides), addresses.split(","), os.environ)
        case ["wait", seconds, processes, *urls]:
            wait_for_servers(urls, float(seconds), [int(process) for process in processes.split(",") if process])
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MegatronTipError as error:
        sys.exit(f"error: {error}")
