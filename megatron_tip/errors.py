"""Errors that a user can cause and mend. Broken invariants of our own are plain `assert`s.

Every message says where, what was expected, what came, and what to do about it.
"""

from __future__ import annotations


class MegatronTipError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MegatronTipError, ValueError):
    """A configuration, or a combination of it with the models or the world size, that cannot run."""


class InputError(MegatronTipError, ValueError):
    """An argument, a prompt file or a rollout that is not what the function takes."""


class WeightsError(MegatronTipError, ValueError):
    """Model weights that are missing, truncated, of another shape or of an unsupported architecture."""


class EngineError(MegatronTipError, RuntimeError):
    """A rollout engine that failed, or that answered with something other than rollouts."""


class ServerError(EngineError):
    """An inference server that failed a call; the work may succeed on another server or later."""


class ServerRefusedError(ServerError):
    """A server that understood a request and refused it (HTTP 4xx): the request is at fault, elsewhere as well."""


class ServerAnswerError(ServerError):
    """A server's answer that is broken or is not what was asked for."""


class ServerMismatchError(EngineError):
    """A server that is not SGLang, or that serves another model or vocabulary; waiting does not mend it."""


class WeightsLostError(EngineError):
    """No server that is up holds the student's weights any more; a sync mends it and generation goes on."""


class ServersLostError(EngineError):
    """No server was left, or came back within the limit; a run that meets it can be resumed from its checkpoint."""


class TrainingError(MegatronTipError, RuntimeError):
    """A training step that must not be applied: no valid token, a loss or gradient that is not finite."""


class NotFiniteError(InputError, TrainingError):
    """NaN or infinity where a step needs numbers; training skips the step."""


class TooManySkips(TrainingError):  # noqa: N818  (what happened, and not an error of one step)
    """Several steps in a row were not finite; the run is saved and ends."""


class PeerError(MegatronTipError, RuntimeError):
    """Another rank failed and this one ends with it; the other rank's own error says why and is the one to show.

    `cause`: the class of the other rank's error, where it is known.
    """

    def __init__(self, message: str, *, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class OptionalDependencyError(MegatronTipError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


class CheckpointError(MegatronTipError, RuntimeError):
    """A run that cannot continue: no checkpoint of it is whole, or another run wrote them."""


class HangError(MegatronTipError, RuntimeError):
    """No step was finished for too long; the stacks of all ranks say where they stood."""


class EvaluationError(MegatronTipError, RuntimeError):
    """A benchmark that could not be run to its end."""


class OutputError(MegatronTipError, OSError):
    """A file of the run that cannot be written: a full disk, a folder that was taken away."""
