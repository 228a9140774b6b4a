"""Errors that a user can cause and fix. Broken invariants of our own are plain `assert`s.

Every message says where, what was expected, what was found, and what to do about it.
"""


class MegatronTipError(Exception):
    """Base of every error that this package raises on purpose.

    `met_on_rank`: the rank that met it, on the other ranks that end with it (`parallel.together`); None on that rank.
    """

    met_on_rank: int | None = None


class ConfigError(MegatronTipError, ValueError):
    """A configuration that cannot run, by itself or with these models or this world size."""


class InputError(MegatronTipError, ValueError):
    """An argument, a prompt file or a rollout that is not what the function takes."""


class WeightsError(MegatronTipError, ValueError):
    """Model weights that are missing, truncated, of another shape or of an unsupported architecture."""


class DroppedLayersError(WeightsError):
    """Layers to drop that the model does not have."""


class EngineError(MegatronTipError, RuntimeError):
    """A rollout engine that failed, or that answered with something other than rollouts."""


class ServerError(EngineError):
    """An inference server that failed a call; the work may succeed on another server or later."""


class ServerRefusedError(ServerError):
    """A server that understood a request and refused it (HTTP 4xx): other servers would refuse it too."""


class ServerAnswerError(ServerError):
    """A server's answer that is broken or is not what was asked for."""


class ServerMismatchError(EngineError):
    """A server that is not SGLang, or that serves another model or vocabulary; waiting does not help."""


class WeightsLostError(EngineError):
    """No running server holds the student's weights any more; generation continues after a sync."""


class ServersLostError(EngineError):
    """No server was left, and none came back within the limit; the run can be resumed from its checkpoint."""


class TrainingError(MegatronTipError, RuntimeError):
    """A training step that must not be applied: no valid token, a loss or gradient that is not finite."""


class NotFiniteError(InputError, TrainingError):
    """NaN or infinity where a step needs numbers; training skips the step."""


class TooManySkips(TrainingError):  # noqa: N818  (it names what happened)
    """Several steps in a row that were not finite; the run saves and ends."""


class PeerError(MegatronTipError, RuntimeError):
    """A failure of another rank, with which this one ends; that rank's own error says why and is the one to show."""


class OptionalDependencyError(MegatronTipError, ImportError):
    """An optional package that is not installed; the message names the extra to install."""


def is_refusal(kind: type[BaseException]) -> bool:
    """Returns whether errors of this kind refuse what the user asked for: the command then ends with exit code 2."""
    return issubclass(kind, _REFUSALS) and not issubclass(kind, TrainingError)


_REFUSALS = (ConfigError, InputError, WeightsError, OptionalDependencyError)


class CheckpointError(MegatronTipError, RuntimeError):
    """A run that cannot continue: none of its checkpoints is intact, or another run wrote them."""


class HangError(MegatronTipError, RuntimeError):
    """No step was finished for too long; the stacks of all ranks show where they were."""


class EvaluationError(MegatronTipError, RuntimeError):
    """A benchmark that could not be completed."""


class OutputError(MegatronTipError, OSError):
    """A file of the run that cannot be written: the disk is full, or the folder has been removed."""
