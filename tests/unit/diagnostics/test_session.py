"""What is refused of a checkpoint before any model is built."""

import pytest

from megatron_tip.diagnostics.session import resolve_checkpoint
from megatron_tip.errors import ConfigError
from megatron_tip.planning.plan import plan_run
from tests.helpers.training import Layout, make_config, make_models


def test_of_another_architecture_only_what_differs_is_told(tmp_path):
    models = make_models(tmp_path)
    plan = plan_run(make_config(models, Layout(1)), 1)
    assert resolve_checkpoint(models / "student", plan) == models / "student"
    with pytest.raises(ConfigError) as refused:
        resolve_checkpoint(models / "teacher", plan)
    assert plan.teacher is not None
    own, other = plan.student.architecture, plan.teacher.architecture
    assert f"(hidden_size: expected {own.hidden_size}, got {other.hidden_size}; " in str(refused.value)
    assert "tied_embeddings: expected True, got False); set model.path" in str(refused.value)
    assert "num_layers" not in str(refused.value)
