"""Logging of a worker: its rank in every line, INFO from rank 0, warnings from all."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a live display puts itself there and prints lines above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def configure_logging(rank: int) -> None:
    """Sends the log of this process to stderr. Call it before Megatron is imported: it warns at import."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("megatron_tip").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # Both are optional and said to be so in the README; three ranks would say it four times each.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
