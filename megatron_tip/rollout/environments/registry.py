"""A registry of environments by their configured names."""

import difflib
import importlib
from typing import Any

from megatron_tip.errors import ConfigError
from megatron_tip.rollout.environments.calculator import CalculatorEnvironment
from megatron_tip.rollout.environments.environment import EnvironmentFactory

ENVIRONMENTS: dict[str, EnvironmentFactory] = {"calculator": CalculatorEnvironment}


def load_environment(name: str) -> EnvironmentFactory:
    """Returns the factory of environments, one per rollout, by name or as the class at "package.module:attribute".

    Raises:
        ConfigError: the name or class does not exist, or the class lacks a method of `Environment`.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        nearest = difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"rollout.environment: expected one of {', '.join(ENVIRONMENTS)} or an import path 'package.module:Class', "
            f"got {name!r}; the nearest name is {nearest!r}"
        )
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"rollout.environment: cannot import {name!r} ({error}); the module lies beside the run's TOML, is "
            "installed, or is on PYTHONPATH"
        ) from error
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))]
    if missing:
        raise ConfigError(
            f"rollout.environment: expected {name!r} to be a class with the methods reset and step, got "
            f"{type(found).__name__} without {missing}"
        )
    return found
