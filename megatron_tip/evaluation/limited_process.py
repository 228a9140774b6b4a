"""Runs one Python file under limits. Started as a program by `code_execution`; needs nothing but the standard library.

    python -I limited_process.py PROGRAM CPU_SECONDS MEMORY_BYTES FILE_BYTES

It cuts the network off where the kernel lets it (a network namespace of its own), takes the limits, and gives up root
where the interpreter's files can be read without. Prints "network: cut off" or "network: reachable" as the first line.
"""

import ctypes
import os
import resource
import sys

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_NOBODY = 65534


def _cut_network_off() -> bool:
    """A namespace without any interface but its own loopback, which is down."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_USER | _NEW_NETWORK
        return libc.unshare(flags) == 0
    except (OSError, AttributeError):  # another system than Linux
        return False


def _can_give_up_root() -> bool:
    """Whether nobody can read the standard library."""
    os.seteuid(_NOBODY)
    try:
        return os.access(os.__file__, os.R_OK, effective_ids=True)
    finally:
        os.seteuid(0)


def main() -> None:
    program, cpu_seconds, memory_bytes, file_bytes = sys.argv[1], *map(int, sys.argv[2:5])
    with open(program, "rb") as file:  # before root is given up
        source = file.read()
    is_cut_off = _cut_network_off()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.geteuid() == 0 and _can_give_up_root():
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # of root it would not hold
    print("network: cut off" if is_cut_off else "network: reachable", flush=True)
    exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})


main()
