"""Triton's kernels on a machine without a GPU."""

import importlib.util
import os
import sys
from pathlib import Path


def use_interpreter() -> None:
    """Makes this process, a test's worker that has not imported Triton, run Triton's kernels in its interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    find_triton()


def find_triton() -> None:
    """Makes this process find Triton, which `make test` installs into a folder of its own.

    Elsewhere SGLang's stand-in must win over it.
    """
    if importlib.util.find_spec("triton") is None:
        sys.path.append(str(Path(sys.prefix) / "triton"))
