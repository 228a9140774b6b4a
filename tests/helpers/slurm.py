"""A real SLURM of three nodes on this machine: munged, slurmctld and slurmd, all of their state in one folder."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import wait_until

PROGRAMS = ("sbatch", "srun", "scontrol", "sinfo", "slurmctld", "slurmd", "munged")
"""What Debian's packages slurm-wlm and munge bring."""

NODES = ("n1", "n2", "n3")
CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job may start again once its old credential has expired, by default after two minutes; 5 s is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
KillWait=10
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=1 State=UNKNOWN
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.3 Port={ports[3]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """The programs of SLURM that this machine lacks."""
    return [name for name in PROGRAMS if _find(name) is None]


class SlurmCluster:
    """A cluster that is up; `stop` ends what it started."""

    def __init__(self, folder: Path) -> None:
        """Starts the cluster with its state under `folder` and waits until all nodes are idle."""
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(
            CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(1 + len(NODES)))
        )
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environ["SLURM_CONF"] = str(conf)
        self.environ["PATH"] = f"{self.environ['PATH']}:/usr/sbin"
        try:
            self._start_munged()
            self._start("slurmctld", "-D", "-f", conf, "-L", folder / "slurmctld.log")
            for node in NODES:
                self._start("slurmd", "-D", "-f", conf, "-N", node, "-L", folder / f"slurmd-{node}.log")
            self.wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all jobs and all daemons."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:  # slurmctld is there to answer
            self.run("scancel", "--user", getpass.getuser(), check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, program: str, *arguments: object, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Runs one of SLURM's programs and returns what it printed."""
        ended = subprocess.run(
            [program, *map(str, arguments)],
            env=self.environ | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert ended.returncode == 0 or not check, f"{program}: {ended.stdout}"
        return ended.stdout

    def submit(self, script: Path, *arguments: object, options: Sequence[str] = (), env: Mapping[str, str]) -> "Job":
        """Submits a script of the repository; the job's output goes to a file of its own."""
        output = self.folder / f"job-{secrets.token_hex(4)}-%a.out"
        root = script.parents[1]
        printed = self.run(
            "sbatch", "--parsable", f"--chdir={root}", f"--output={output}", *options, script, *arguments, env=env
        )
        return Job(self, printed.strip().splitlines()[-1].partition(";")[0], output)

    def wait_until_idle(self, timeout_seconds: float = 60.0) -> None:
        """Waits until all nodes can take a job."""
        deadline = time.monotonic() + timeout_seconds
        while self.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False).strip() != str(len(NODES)):
            assert time.monotonic() < deadline, f"the nodes did not become idle; see {self.folder}/*.log"
            time.sleep(0.2)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until((self.folder / "munge.socket").exists)

    def _start(self, program: str, *arguments: object) -> None:
        """Starts a daemon that ends with this process, however this one ends."""
        command = ["setpriv", "--pdeathsig", "KILL", program, *map(str, arguments)]
        log = (self.folder / f"{program}.out").open("ab")
        self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))
        log.close()


@dataclass(frozen=True)
class Job:
    """A submitted job, or one task of an array (`task`)."""

    cluster: SlurmCluster
    identity: str
    output: Path
    task: int | None = None

    def of_task(self, task: int) -> "Job":
        """The array's task `task`."""
        return Job(self.cluster, self.identity, self.output, task)

    @property
    def name(self) -> str:
        return self.identity if self.task is None else f"{self.identity}_{self.task}"

    def fact(self, key: str) -> str:
        """One value of `scontrol show job`, such as JobState or ExitCode."""
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.name)
        return dict(word.partition("=")[::2] for word in shown.split())[key]

    def log(self) -> str:
        """What the job has printed so far, over all its starts."""
        task = "4294967294" if self.task is None else str(self.task)  # SLURM's "no array task"
        path = Path(str(self.output).replace("%a", task))
        return path.read_text() if path.exists() else ""

    def wait_for(self, *states: str, timeout_seconds: float = 200.0) -> str:
        """Waits until the job is in one of `states` and returns it."""
        deadline = time.monotonic() + timeout_seconds
        while (state := self.fact("JobState")) not in states:
            ended = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
            told = f"job {self.name} is {state}:\n{self.log()}"
            assert not ended, told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        return state

    def wait_for_log(self, text: str, timeout_seconds: float = 120.0) -> None:
        """Waits until the job has printed `text`."""
        deadline = time.monotonic() + timeout_seconds
        while text not in self.log():
            assert time.monotonic() < deadline, f"job {self.name}: no {text!r} in\n{self.log()}"
            time.sleep(0.1)


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
