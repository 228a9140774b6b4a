"""A sweep: rules x budgets x seeds over one configuration, each an ordinary run."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from megatron_tip.config import Config, Section
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.planning.settings import make_selector
from megatron_tip.report.sweep_data import SweepEntry
from megatron_tip.selection.rules import load_rule
from megatron_tip.training.checkpoints.same_run import defining_settings


class Sweep(Section):
    """What a sweep runs."""

    config: Path
    """The configuration that all runs share, relative to the current directory."""
    folder: Path
    """Folder of the runs' folders."""
    rules: tuple[str, ...] = Field(min_length=1)
    """Values of selection.rule."""
    budgets: tuple[float, ...] = Field(min_length=1)
    """Values of selection.retention_ratio; a preset that keeps all tokens runs once per seed instead."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Values of run.seed."""
    overrides: tuple[str, ...] = ()
    """"section.key=value" of every run."""
    overrides_of: dict[str, tuple[str, ...]] = Field(default={})
    """The same for the runs of one rule, by its name."""


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its place in the list, its configuration file and the overrides that make it this run."""

    entry: SweepEntry
    config_path: Path
    overrides: tuple[str, ...]

    def config(self) -> Config:
        """Returns the resolved configuration; raises ConfigError if it cannot run."""
        try:
            config = load_config(self.config_path, self.overrides)
            make_selector(config)
        except ConfigError as error:
            raise ConfigError(f"{self.entry.name}: {error}") from error
        return config


def load_sweep(path: Path) -> Sweep:
    """Returns the sweep in a TOML file.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown, missing or of a wrong type; lists all of them.
    """
    try:
        sweep = Sweep.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the sweep: {error.strerror}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r:.80}" for one in error.errors()]
        raise ConfigError("\n  ".join([f"{path}: expected {', '.join(Sweep.model_fields)}", *lines])) from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected TOML, got a syntax error: {error}") from None
    if unknown := sorted(sweep.overrides_of.keys() - set(sweep.rules)):
        raise ConfigError(f"{path}: overrides_of: expected rules of the sweep, got {', '.join(unknown)}")
    if broken := [one for one in (*sweep.overrides, *sum(sweep.overrides_of.values(), ())) if "\n" in one]:
        raise ConfigError(f"{path}: expected overrides of one line, got {broken[0]!r:.80}")
    return sweep


def runs_of(sweep: Sweep) -> list[SweepRun]:
    """Returns the sweep's runs, seed by seed, so that an interrupted sweep has compared all rules at some seeds.

    Raises:
        ConfigError: a rule is unknown, or two runs would share a folder.
    """
    runs = list(_runs(sweep))
    names = [run.entry.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"sweep: expected different rules, budgets and seeds, got {', '.join(twice)} twice")
    return runs


def _runs(sweep: Sweep) -> Iterator[SweepRun]:
    for seed in sweep.seeds:
        for rule in sweep.rules:
            for budget in (1.0,) if load_rule(rule).take == "all" else sweep.budgets:
                name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', rule)}-{budget:g}-seed{seed}"
                own = (
                    f"selection.rule={rule}",
                    f"selection.retention_ratio={budget}",
                    f"run.seed={seed}",
                    f"run.folder={sweep.folder / name}",
                )
                overrides = (*sweep.overrides, *sweep.overrides_of.get(rule, ()), *own)
                yield SweepRun(SweepEntry(name, rule, budget, seed), sweep.config, overrides)


def unfinished(runs: list[SweepRun]) -> list[int]:
    """Returns the places in `runs` of those without a summary.

    Raises:
        ConfigError: a run cannot run, or its folder holds a finished run with other settings.
    """
    places = []
    for place, run in enumerate(runs):
        config = run.config()
        folder = RunFolder(config.run.folder)
        if not folder.summary.exists():
            places.append(place)
        elif defining_settings(load_config(folder.config)) != defining_settings(config):
            raise ConfigError(
                f"{folder.path}: expected the run that the sweep asks for, got a finished one with other settings; "
                "move it away, or give the sweep another folder"
            )
    return places
