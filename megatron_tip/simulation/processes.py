"""Processes that simulate at the same time as this one: a simulated step takes one core, most of it in Python."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.observability.logs import hide_warnings_of_libraries


@contextmanager
def other_processes(count: int) -> Iterator[Executor]:
    """Yields `count` processes with one thread each, which end with the block. They are started anew, not forked."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare) as processes:
        yield processes


def _prepare() -> None:
    """Imports Megatron as the command does, before the first call brings it along; ends with the command."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    hide_warnings_of_libraries()
    with lean_imports():
        import torch

        import megatron_tip.models.gpt  # noqa: F401
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however: by a signal it closes nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process of a pool"
    parent.join()
    os._exit(1)
