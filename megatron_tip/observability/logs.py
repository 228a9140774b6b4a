"""Logging of a worker: its rank in every line, INFO from rank 0, warnings from all ranks."""

import logging
import sys
import warnings
from typing import TextIO


class _StderrHandler(logging.StreamHandler):
    """A handler that looks up sys.stderr at each write: a live display replaces it, to print lines above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def configure_logging(rank: int) -> None:
    """Sends the log of this process to stderr. Call it before importing Megatron, which warns at import."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("megatron_tip").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    hide_warnings_of_libraries()


def hide_warnings_of_libraries() -> None:
    """Hides warnings of Megatron and torch that a user cannot act on. Call it before importing Megatron."""
    # All are optional, as the README says of two; each rank would repeat the warning several times.
    for absent in ("Transformer Engine and Apex are not installed", "Apex is not installed", "absl.logging is not"):
        warnings.filterwarnings("ignore", message=absent)
    # What these libraries will change is for those who call them, not for who starts a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron|transformers)\.")
    for change in (".* is deprecated", ".* is experimental and still under active development"):
        warnings.filterwarnings("ignore", message=change, module=r"megatron\.core\.")
    gpt = logging.getLogger("megatron.core.models.gpt.gpt_model")  # from 0.19 on each model says so, in capitals
    gpt.addFilter(lambda record: "IS DEPRECATED" not in record.getMessage())
