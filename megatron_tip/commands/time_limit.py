"""The time limit of a SLURM job, and the warning before it."""

import re
from collections.abc import Sequence

from megatron_tip.errors import ConfigError

WARNING_SECONDS = 180
"""How long before the limit the scripts of slurm/ ask for their warning (`#SBATCH --signal=B:USR1@180`)."""

_UNITS = (86400, 3600, 60, 1)


def check_time_limit(site_time: str, options: Sequence[str]) -> None:
    """Checks that a job has time before SLURM warns it of its end.

    Args:
        site_time: TIP_TIME of the site's file.
        options: further options of sbatch; their --time and --signal win.

    Raises:
        ConfigError: the limit is not longer than the warning: every start would be warned before it could take a step.
    """
    limit = _last(options, ("--time", "-t")) or site_time
    found = re.search(r"@(\d+)", _last(options, ("--signal",)))
    warning = int(found[1]) if found else WARNING_SECONDS
    seconds = seconds_of(limit)
    if seconds is not None and seconds <= warning:
        raise ConfigError(
            f"--time: expected more than the {warning} s before the limit at which SLURM tells the run to save "
            f"(--signal), plus the time for its start and a step, got {limit}; raise TIP_TIME or --sbatch=--time=..."
        )


def seconds_of(limit: str) -> int | None:
    """Returns a time limit in seconds; None if it is unlimited, empty or in a form that SLURM does not document."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if not found:
        return None
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        numbers = [int(days), *numbers]
    elif len(numbers) == 3:  # hours:minutes:seconds
        numbers = [0, *numbers]
    else:  # minutes[:seconds]
        numbers = [0, 0, *numbers]
    return sum(number * unit for number, unit in zip(numbers, _UNITS, strict=False))


def _last(options: Sequence[str], names: Sequence[str]) -> str:
    """Returns the value of the last of `options` that has one of these names, as --name=value or -nvalue; or ""."""
    values = [
        option[len(name) :].lstrip("=")
        for option in options
        for name in names
        if option.startswith(f"{name}=") or (not name.startswith("--") and option.startswith(name))
    ]
    return values[-1] if values else ""
