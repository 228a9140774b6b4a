"""What all ranks must agree on before the models of a run are built."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import place
from megatron_tip.planning.plan import plan_run
from megatron_tip.training import setup
from megatron_tip.training.run import RolloutSource
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, make_config, make_models, this_worker


def build_on(cases: list[tuple[Config, list[int]]]) -> tuple[list[str], int]:
    """How `build_run` ends on this rank for each configuration, with the workers of each rank's node and two GPUs.

    And how often it has closed its engine.
    """
    engine = Mock()

    def build(*_):
        raise NotImplementedError("building")

    setup.load_hf = build
    setup._source = lambda *_: RolloutSource(Mock(), engine)
    worker, messages = this_worker(), []
    for config, workers_per_node in cases:
        hosts = Hosts(2, workers_per_node[worker.rank], (0, 1))
        plan = replace(plan_run(config, 2), placement=place(config, hosts))
        with pytest.raises((ConfigError, NotImplementedError)) as caught:
            setup.build_run(config, plan, worker, PhaseTimer(worker.device), num_threads=1)
        messages.append(str(caught.value))
    dist.barrier()
    return messages, engine.close.call_count


def test_ranks_that_placed_the_servers_differently_are_refused_together(tmp_path: Path):
    models = make_models(tmp_path / "models")
    sections = {"rollout": {"engine": "sglang"}, "sglang": {"share_gpus": True, "release_memory": "never"}}
    served, embedded = make_config(models, Layout(2), **sections), make_config(models, Layout(2))
    cases = [(served, [1, 2]), (served, [2, 2]), (embedded, [1, 2])]
    found = run_workers(build_on, 2, tmp_path, cases, timeout_seconds=300.0)
    (first, first_closed), (second, second_closed) = found
    assert first == second
    assert "got 1 workers and 2 GPUs on the node of rank 0, 2 workers and 2 GPUs on that of rank 1" in first[0]
    assert first[1:] == ["building", "building"], "the same placement, and no servers"
    assert (first_closed, second_closed) == (2, 0), "a set-up that fails gives its servers back"
