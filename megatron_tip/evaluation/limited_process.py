"""A program that runs one Python program under limits. Started by `code_execution`; needs only the standard library.

    python -I limited_process.py STATUS_FD CPU_SECONDS WALL_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES FOLDER_BYTES
        < ASKED

ASKED is JSON: `program`, the source, and `end`, the mark that the program reached its end. A watcher stays outside the
limits. Its child takes them on, cuts off the network if the kernel allows it, gives up root if the interpreter's files
are readable without it, and runs the program. STATUS_FD, a file, gets "network: cut off" or "network: reachable" as its
first line and, if the program reaches its end, `end`. When the program has ended, or its time is up, the watcher ends
all of its descendants, including those that left its session: orphans become the watcher's children (Linux). Exit code:
0, the program's was 0; TIMED_OUT, its time was up; else 1.
The watcher also ends a program with too many descendants, which no kernel limit stops for root, and one that has filled
its folder.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time

TIMED_OUT = 2
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_PARENT_DEATH_SIGNAL, _CHILD_SUBREAPER = 1, 36
_NOBODY = 65534
_LOOK_SECONDS, _MOST_DESCENDANTS = 0.1, 16


def main() -> None:
    status, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    wall_seconds = float(sys.argv[3])
    memory_bytes, file_bytes, processes, folder_bytes = map(int, sys.argv[4:8])
    asked = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # hides ASKED from the program
    _adopt_orphans()
    worker = os.fork()
    if worker:
        _watch(worker, wall_seconds, folder_bytes)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_cut_off = _cut_network_off()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.geteuid() == 0 and can_give_up_root():
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))  # does not bind root
    os.write(status, b"network: cut off\n" if is_cut_off else b"network: reachable\n")
    exec(compile(asked["program"], "answer.py", "exec"), {"__name__": "__main__"})
    os.write(status, asked["end"].encode())


def _watch(worker: int, wall_seconds: float, folder_bytes: int) -> None:
    """Waits for `worker`, ends whatever is left of it, and exits."""
    code = TIMED_OUT
    until, look_again = time.monotonic() + wall_seconds, 0.0
    while (now := time.monotonic()) < until:
        pid, state = os.waitpid(worker, os.WNOHANG)
        if pid:
            ended = os.waitstatus_to_exitcode(state)
            code = TIMED_OUT if ended == -signal.SIGXCPU else int(ended != 0)
            break
        if now >= look_again:
            look_again = now + _LOOK_SECONDS
            if _num_descendants() > _MOST_DESCENDANTS or _folder_bytes() > folder_bytes:
                code = 1
                break
        time.sleep(0.01)
    _end_with_descendants(code)


def _end_with_descendants(code: int) -> None:
    """Kills children until none are left (those of a killed child become ours), then exits."""
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            os._exit(code)


def _children() -> list[int]:
    return [pid for pid, parent in _parents().items() if parent == os.getpid()]


def _num_descendants() -> int:
    parents, found = _parents(), {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return len(found) - 1


def _parents() -> dict[int, int]:
    """Returns the parent of every process."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    return found


def _folder_bytes() -> int:
    """Returns what the files in the current folder, which is the program's own, take on the disk."""
    total = 0
    for folder, _, names in os.walk("."):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:  # it has just gone
                continue
    return total


def _adopt_orphans() -> None:
    """Makes this process adopt orphaned descendants, and asks for SIGTERM when its own parent ends."""
    signal.signal(signal.SIGTERM, lambda *_: _end_with_descendants(1))
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
    except (OSError, AttributeError):  # another system than Linux
        pass


def _cut_network_off() -> bool:
    """Moves this process into a network namespace that has only a loopback, which is down; returns whether it could."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_USER | _NEW_NETWORK
        return libc.unshare(flags) == 0
    except (OSError, AttributeError):  # another system than Linux
        return False


def can_give_up_root() -> bool:
    """Returns whether the user nobody can read the standard library."""
    os.seteuid(_NOBODY)
    try:
        return os.access(os.__file__, os.R_OK, effective_ids=True)
    finally:
        os.seteuid(0)


if __name__ == "__main__":
    main()
