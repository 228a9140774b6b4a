"""Which errors refuse what the user asked for."""

import pytest

from megatron_tip.errors import (
    ConfigError,
    DroppedLayersError,
    NotFiniteError,
    OptionalDependencyError,
    OutputError,
    TrainingError,
    is_refusal,
)


@pytest.mark.parametrize("kind", [ConfigError, DroppedLayersError, OptionalDependencyError])
def test_what_the_user_can_change_before_the_run_is_a_refusal(kind: type[BaseException]):
    assert is_refusal(kind)


@pytest.mark.parametrize("kind", [TrainingError, NotFiniteError, OutputError, KeyError])
def test_what_happens_during_a_run_is_not(kind: type[BaseException]):
    assert not is_refusal(kind)
