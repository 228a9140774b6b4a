"""One process at a time writes into a run's folder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self

from megatron_tip.errors import ConfigError, OutputError
from megatron_tip.files import parse_json

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
_PAUSE_SECONDS = 0.5


class RunLock:
    """A lock on a run's folder, held from `acquire` to `release` or to the end of the process, however it ends.

    It is a POSIX lock on the file `run.lock`, which NFS, Lustre and GPFS pass on to other machines. The operating
    system takes it back when the process dies, and the server of a shared file system when the machine does, after its
    own time (NFS: 90 s). The file's content says who holds it; it is for messages alone.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._file: IO[str] | None = None

    def acquire(self, *, wait_seconds: float = 0.0) -> Self:
        """Takes the lock and returns it.

        Args:
            wait_seconds: how long to wait for another process; a requeued job gives the dead machine's lock that long.

        Raises:
            ConfigError: another process holds it, or the file cannot be written.
        """
        deadline = time.monotonic() + wait_seconds
        # No "w": what the holder wrote must stay if this process does not get the lock.
        self._file = os.fdopen(self._opened(), "r+", encoding="utf-8")
        while not self._try():
            if time.monotonic() >= deadline:
                holder = self._holder()
                self._file.close()
                self._file = None
                raise ConfigError(
                    f"run.folder: expected a folder that no other run writes into, got {self._path.parent}, which "
                    f"{holder} is using; wait until that run has ended, or give another one (run.folder=...)"
                )
            time.sleep(_PAUSE_SECONDS)
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), **_job()}, self._file)
        self._file.flush()
        return self

    def release(self) -> None:
        """Gives the lock back. The file stays: removing it would let two processes lock two files of one name."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror}; give another run.folder") from error

    def _try(self) -> bool:
        assert self._file is not None, "opened by acquire"
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logger.warning(
                "%s: the file system knows no locks (%s); do not start the same run twice", self._path, error.strerror
            )
        return True

    def _holder(self) -> str:
        assert self._file is not None, "opened by acquire"
        try:
            about: dict[str, Any] = parse_json(self._file.read())
            job = f" of SLURM job {about['job']}" if "job" in about else ""
            return f"process {about['pid']}{job} on {about['host']}, since {about['since']},"
        except (ValueError, KeyError, TypeError):
            return "another process"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _job() -> dict[str, str]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job} if job else {}
