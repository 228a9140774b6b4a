"""Several hosts on one machine: network namespaces, each with an address and a name of its own, joined by a bridge.

As on many clusters, a host's own name resolves to 127.0.1.1 on it, and an interface that leads nowhere (a container
bridge with the same address on every host) comes before the one that leads to the others.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

WRONG_ADDRESS = "172.31.250.1"
"""Of each host's interface that leads nowhere."""

_LEADS_OUT = "net1"


@dataclass(frozen=True)
class Host:
    """A host of `hosts`, reached by the others at `address`."""

    name: str
    namespace: str
    address: str

    def start(
        self,
        command: Sequence[str],
        *,
        log: IO[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Starts `command` on this host, in a session of its own."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *named],
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def vanish(self) -> None:
        """Cuts the host off: what is sent to it gets no answer, as after a power failure."""
        self._link("down")

    def return_(self) -> None:
        """Connects the host again."""
        self._link("up")

    def _link(self, state: str) -> None:
        _run("ip", "netns", "exec", self.namespace, "ip", "link", "set", _LEADS_OUT, state)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Yields `count` hosts; skips the test where this machine does not let us make them."""
    prefix = f"tip{os.getpid()}"
    network = 16 + os.getpid() % 200
    made = [Host(f"node{i}", f"{prefix}n{i}", f"10.77.{network}.{i + 1}") for i in range(count)]
    try:
        try:
            _join(f"{prefix}sw", made)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"needs root, iproute2 and network namespaces: {reason}")
        yield made
    finally:
        for namespace in [f"{prefix}sw", *(host.namespace for host in made)]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _join(switch: str, made: Sequence[Host]) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for number, host in enumerate(made):
        own_files = Path("/etc/netns") / host.namespace
        own_files.mkdir(parents=True)
        others = "".join(f"{other.address} {other.name}\n" for other in made if other is not host)
        (own_files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
        at = ("ip", "-n", host.namespace)
        _run("ip", "netns", "add", host.namespace)
        _run(*at, "link", "set", "lo", "up")
        _run(*at, "link", "add", "docker0", "type", "bridge")
        _run(*at, "addr", "add", f"{WRONG_ADDRESS}/16", "dev", "docker0")
        _run(*at, "link", "set", "docker0", "up")
        _run(*at, "link", "add", _LEADS_OUT, "type", "veth", "peer", "name", f"port{number}", "netns", switch)
        _run("ip", "-n", switch, "link", "set", f"port{number}", "master", "bridge")
        _run("ip", "-n", switch, "link", "set", f"port{number}", "up")
        _run(*at, "addr", "add", f"{host.address}/24", "dev", _LEADS_OUT)
        _run(*at, "link", "set", _LEADS_OUT, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
