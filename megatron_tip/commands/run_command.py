"""What the commands that read a run's configuration share: their arguments' errors, and modules beside the file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.config import Config
from megatron_tip.config.hints import names_a_key, override_hint
from megatron_tip.config.io import load_config
from megatron_tip.config.keys import all_keys
from megatron_tip.errors import ConfigError

_OF_SBATCH = ("partition", "account", "time", "qos", "reservation", "constraint", "exclude", "nodelist", "mail-user")
_ELSEWHERE = {
    **{f"--{name}": ("--sbatch", f"--sbatch=--{name}=...") for name in _OF_SBATCH},
    **{f"-{letter}": ("--sbatch", f"--sbatch='-{letter} ...'") for letter in "pAtq"},
    "--nodes": ("--world-size", "--world-size, the number of GPUs of all nodes"),
    "--gpus": ("--gpus-per-node", "--gpus-per-node"),
}
"""Options that another command has, or sbatch: the option that takes their place, and how it is written."""


def complete_override(incomplete: str) -> list[str]:
    """Returns the overrides that begin with `incomplete`, for the shell: keys, and after "=" the values of a choice."""
    name, equals, _ = incomplete.partition("=")
    if not equals:
        return [f"{key}=" for key in all_keys() if key.startswith(incomplete)]
    key = all_keys().get(name)
    values = [] if key is None else ["true", "false"] if key.expected == "boolean" else key.choices
    return [full for value in values if (full := f"{name}={value}").startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Overrides of the file.", autocompletion=complete_override),
]


class RunCommand(TyperCommand):
    """A command that takes overrides; one that was written as an option is answered with how to write it."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        options = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        with errors_reported():
            for before, word in zip(["", *args], args, strict=False):
                if before == "--sbatch":
                    continue
                name = word.partition("=")[0]
                if not word.startswith("-") or name in options:
                    continue
                if names_a_key(word):
                    raise ConfigError(f"command line: expected section.key=value, got {word!r}{override_hint(word)}")
                ours, use = _ELSEWHERE.get(name, ("", ""))
                if ours in options:
                    raise ConfigError(f"command line: {name}: no such option; use {use}")
        return super().parse_args(ctx, args)


def configured_run(config_path: Path, overrides: Sequence[str] | None) -> Config:
    """Returns the configuration; rules and environments that it names are also looked for in the file's folder.

    Raises:
        ConfigError: as `load_config`.
    """
    config = load_config(config_path, overrides or [])
    look_beside(config_path)
    return config


def look_beside(path: Path) -> None:
    """Makes modules in the file's folder importable: the last place, so that none there hides an installed package."""
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)
