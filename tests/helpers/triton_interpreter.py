"""Triton's kernels on a machine without a GPU."""

import importlib.util
import os
import sys
from pathlib import Path


def use_interpreter() -> None:
    """Makes this process, a test's worker that has not imported Triton, run Triton's kernels in its interpreter.

    `make test` installs Triton into a folder of its own: SGLang's stand-in must win over it elsewhere.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is None:
        sys.path.append(str(Path(sys.prefix) / "triton"))
