"""The machine on which a run is checked. What it lacks is an error for a run here and a note for a run elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from megatron_tip.errors import ConfigError, OptionalDependencyError

TESTED_MEGATRON = ("0.16.1", "0.19.2")
"""The versions of Megatron-Core that the tests run with."""


def untested_megatron() -> str:
    """Returns a warning if no test runs with the installed Megatron-Core, else an empty text."""
    installed = version("megatron-core")
    if installed in TESTED_MEGATRON:
        return ""
    return f"megatron-core {installed} is not among the versions that are tested, {' and '.join(TESTED_MEGATRON)}"


class Machine:
    """This machine, for a run here or elsewhere.

    `notes`: what is missing here but may exist elsewhere. `absent`: the files and folders among it.
    """

    def __init__(self, *, is_elsewhere: bool = False) -> None:
        """Describes this machine. `is_elsewhere`: whether the run will start on another one."""
        self.is_elsewhere = is_elsewhere
        self.notes: list[str] = []
        self.absent: list[Path] = []

    def has(self, path: Path, setting: str) -> bool:
        """Returns whether `path`, which `setting` names, exists here.

        Raises:
            ConfigError: it does not exist, and the run starts here.
        """
        if path.exists():
            return True
        if not self.is_elsewhere:
            raise ConfigError(f"{setting}: expected an existing path, got {path}")
        self.note_absent(path, f"{path} is not on this machine")
        return False

    def note_absent(self, path: Path, note: str) -> None:
        """Notes that `path`, or what a run needs in it, does not exist here."""
        self.notes.append(note)
        self.absent.append(path)

    @contextmanager
    def lacks_packages(self) -> Iterator[None]:
        """Turns an OptionalDependencyError into a note if the run is elsewhere."""
        try:
            yield
        except OptionalDependencyError as error:
            if not self.is_elsewhere:
                raise
            self.notes.append(str(error))
