"""The end of a command: its error message and exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console

from megatron_tip.errors import MegatronTipError, is_refusal
from megatron_tip.parallel.launch import Outcome


@contextmanager
def errors_reported() -> Iterator[None]:
    """Ends the command with a message if an error is raised before its workers start.

    The exit code is 2 for errors in the user's input, 130 for Ctrl-C and 1 for all others.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail("ended by SIGINT", exit_code=130)
    except MegatronTipError as error:
        _fail(str(error), exit_code=2 if is_refusal(type(error)) else 1)


def end_as(outcome: Outcome) -> None:
    """Ends the command with its workers' message and exit code; returns if they succeeded."""
    if outcome.exit_code:
        screen = Console(stderr=True)
        if screen.is_terminal:  # a worker killed while it showed its progress bar left the cursor hidden
            screen.show_cursor()
            screen.line()
        _fail(outcome.message, exit_code=outcome.exit_code)


def _fail(message: str, *, exit_code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(exit_code)
