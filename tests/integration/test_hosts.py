"""Runs over several hosts: trainers on two, SGLang servers on two others, and what happens when one vanishes.

The hosts are network namespaces with addresses of their own. On each, its own name resolves to 127.0.1.1, and an
interface that leads nowhere has the same address everywhere.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tip.commands.serving import server_arguments, write_keys
from megatron_tip.observability.metrics_file import read_metrics
from megatron_tip.placement.placement import PlacedServer
from megatron_tip.placement.slots import Place
from megatron_tip.rollout.sglang.server import CPU_ENVIRONMENT, CPU_SHIM
from tests.helpers.hosts import Host, hosts
from tests.helpers.processes import wait_until
from tests.helpers.training import RUN_TOML, make_models

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PORT = 31000
CPU = "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --sleep-on-idle"


@dataclass(frozen=True)
class Cluster:
    """Hosts of one run: the first two train, the others serve a student of `models` at `urls`."""

    trainers: list[Host]
    servers: list[Host]
    models: Path
    keys: Path

    @property
    def urls(self) -> list[str]:
        return [f"http://{host.address}:{PORT}" for host in self.servers]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    models = make_models(tmp_path_factory.mktemp("models"))
    folder = tmp_path_factory.mktemp("servers")
    with hosts(4) as made, started() as processes:
        found = Cluster(made[:2], made[2:], models, folder / "keys.json")
        write_keys(found.keys)
        keys = json.loads(found.keys.read_text())
        for host in found.servers:
            server = PlacedServer("student", 0, (Place(2, None),), (PORT,), 0.2)
            arguments = server_arguments(server, models / "student", host.address, keys)
            arguments += [*CPU.split(), "--max-total-tokens", "4096"]
            with (folder / f"{host.name}.log").open("w") as log:
                environment = {**CPU_ENVIRONMENT, "PYTHONPATH": f"{CPU_SHIM}:{ROOT}"}
                command = [sys.executable, "-m", "megatron_tip.rollout.sglang.main"]
                process = host.start(command, log=log, environment=environment)
            processes.append(process)
            assert process.stdin
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
        with (folder / "wait.log").open("w") as log:
            command = [sys.executable, "-m", "megatron_tip.commands.serving", "wait", "270", "", *found.urls]
            waiting = found.trainers[0].start(command, log=log, environment={"PYTHONPATH": str(ROOT)})
        assert waiting.wait(300) == 0, (folder / "wait.log").read_text()
        yield found


@contextmanager
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to be ended, with all that they have started."""
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Run:
    """One start of a run's workers, one per trainer host; `folder` is shared by all hosts."""

    folder: Path
    processes: list[subprocess.Popen[str]]

    def metrics(self) -> list[dict[str, float]]:
        path = self.folder / "run" / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def wait(self, seconds: float) -> list[int]:
        """The workers' exit codes; fails if one still runs after that time."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, f"still running after {seconds} s:\n{self.log()}"
            time.sleep(0.1)
        return [process.returncode for process in self.processes]


@contextmanager
def run_on(cluster: Cluster, folder: Path, *overrides: str) -> Iterator[Run]:
    """Starts the workers as srun would: nothing says which interface to use."""
    config = folder / "run.toml"
    config.write_text(RUN_TOML.format(folder=folder / "run", models=cluster.models, threads=1))
    settings = [
        "model.drop_layers=[]",
        f"teacher.path={cluster.models / 'teacher'}",
        "rollout.engine=sglang",
        f"rollout.server_urls={json.dumps(cluster.urls)}",
        f"sglang.keys_file={cluster.keys}",
        "sglang.heartbeat_seconds=1",
        "sglang.silence_seconds=4",
        "sync.timeout_seconds=6",
        *overrides,
    ]
    first = cluster.trainers[0].address
    with started() as processes:
        for rank, host in enumerate(cluster.trainers):
            place = {"RANK": rank, "WORLD_SIZE": len(cluster.trainers), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            address = {"MASTER_ADDR": first, "MASTER_PORT": 29500, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
            command = [sys.executable, "-m", "megatron_tip.cli", "train", str(config), *settings]
            with (folder / f"{host.name}.log").open("a") as log:
                environment = {name: str(value) for name, value in {**place, **address}.items()}
                processes.append(host.start(command, log=log, environment=environment))
        yield Run(folder, processes)


def test_a_run_over_four_hosts(cluster: Cluster, tmp_path: Path):
    with run_on(cluster, tmp_path, "model.tensor_parallel_size=2") as run:
        assert run.wait(150) == [0, 0], run.log()
        assert [line["sync/num_servers"] for line in run.metrics()] == [2, 2, 2, 2]
        assert all(line["rollout/num_stale"] == 0 for line in run.metrics()[1:])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world"] == {"tp": 2, "pp": 1, "cp": 1, "dp": 1}


@pytest.mark.parametrize("moment", ["generation", "sync"])
def test_a_servers_host_vanishes(cluster: Cluster, tmp_path: Path, moment: str):
    """The run continues with the other server, and uses the lost one again once its host is back."""
    lost = cluster.servers[1]
    with run_on(cluster, tmp_path, "training.steps=200", "sync.bucket_bytes=4096") as run:
        wait_until(lambda: len(run.metrics()) > 2 or run.processes[0].poll() is not None)
        if moment == "sync":
            _wait_for_a_sync(lost, cluster)
        lost.vanish()
        try:
            wait_until(lambda: _num_servers(run)[-1] == 1 or run.processes[0].poll() is not None)
        finally:
            lost.return_()
        wait_until(lambda: _num_servers(run)[-1] == 2 or run.processes[0].poll() is not None)
        assert run.processes[0].poll() is None, run.log()
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait(60) == [75, 75], run.log()


def _num_servers(run: Run) -> list[float]:
    return [line["sync/num_servers"] for line in run.metrics()]


def _wait_for_a_sync(host: Host, cluster: Cluster) -> None:
    """Until the server on `host` has opened a session for new weights."""
    key = json.loads(cluster.keys.read_text())["api"]
    script = (
        "import json, urllib.request as r\n"
        f"ask = r.Request('http://{host.address}:{PORT}/model_info', headers={{'Authorization': 'Bearer {key}'}})\n"
        "while 'incomplete' not in json.load(r.urlopen(ask))['weight_version']: pass"
    )
    with started() as processes, open(os.devnull, "w") as nothing:
        processes.append(host.start([sys.executable, "-c", script], log=nothing))
        assert processes[0].wait(60) == 0


def test_a_trainers_host_vanishes_during_a_save(cluster: Cluster, tmp_path: Path):
    """The other rank ends with a message within the time limit, and the same command continues the run."""
    overrides = ("training.steps=5", "checkpoint.every_steps=1", "checkpoint.in_background=false")
    limit = "fault.step_timeout_seconds=15"
    checkpoints = tmp_path / "run" / "checkpoints"
    with run_on(cluster, tmp_path, *overrides, limit, "model.tensor_parallel_size=2") as run:
        wait_until(lambda: len(run.metrics()) > 1 or run.processes[0].poll() is not None)
        wait_until(lambda: any(checkpoints.glob("*partial*")) or run.processes[0].poll() is not None)
        cluster.trainers[1].vanish()
        try:
            codes = run.wait(120)
        finally:
            cluster.trainers[1].return_()
        assert 0 not in codes, run.log()
        assert "rank" in run.log()
    with run_on(cluster, tmp_path, *overrides, limit, "model.tensor_parallel_size=2") as run:
        assert run.wait(150) == [0, 0], run.log()
        steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(6))
