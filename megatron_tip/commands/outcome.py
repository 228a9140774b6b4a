"""How a command ends: what was wrong as a message, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_tip.errors import ConfigError, InputError, MegatronTipError, WeightsError


@contextmanager
def errors_reported() -> Iterator[None]:
    """What was wrong before anything started ends the command with a message: exit code 2 for the user's input."""
    try:
        yield
    except KeyboardInterrupt:
        fail("ended by SIGINT", exit_code=130)
    except MegatronTipError as error:
        fail(str(error), exit_code=2 if isinstance(error, ConfigError | InputError | WeightsError) else 1)


def fail(message: str, *, exit_code: int) -> NoReturn:
    """Ends the command with a message."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(exit_code)
