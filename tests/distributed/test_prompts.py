"""The first rank alone reads the prompt file, before anything is removed; what is wrong with it reaches all ranks."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.errors import InputError
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.planning import inputs
from megatron_tip.planning.plan import plan_run
from megatron_tip.training.loop import run_to_continue
from megatron_tip.training.setup import with_prompts
from tests.helpers.distributed import run_workers
from tests.helpers.training import Layout, make_config, make_models, this_worker


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def config_of(models: Path, path: Path, *prompts: object) -> Config:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return make_config(models, Layout(2), prompts={"source": "file", "path": path, "tasks": ()})


def read(config: Config) -> tuple[list[int], int | None]:
    """The ranks that read the file, as far as this one knows, and the rows in this rank's plan."""
    readers: list[int] = []
    read_prompt_file = inputs.read_prompt_file

    def read_and_note(*arguments):
        readers.append(dist.get_rank())
        return read_prompt_file(*arguments)

    inputs.read_prompt_file = read_and_note
    plan = with_prompts(config, plan_run(config, 2, reads_prompts=False), this_worker())
    return readers, plan.prompts and plan.prompts.num_rows


def test_the_first_rank_alone_reads_the_file(models: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "p.jsonl", "a", "b", "a")
    assert run_workers(read, 2, tmp_path, config) == [([0], 3), ([], None)]


def start_anew(config: Config) -> str:
    worker = this_worker()
    plan, timer = plan_run(config, 2, reads_prompts=False), PhaseTimer(worker.device)
    with pytest.raises(InputError) as caught:
        run_to_continue(config, plan, worker, timer, RunFolder(config.run.folder), None, fresh=True)
    return str(caught.value)


def test_a_bad_line_is_told_on_all_ranks_before_the_old_run_is_removed(models: Path, tmp_path: Path):
    config = config_of(models, tmp_path / "p.jsonl", "a", 3)
    old = RunFolder.create(config.run.folder).metrics
    old.write_text("{}\n")
    for message in run_workers(start_anew, 2, tmp_path, config):
        assert "p.jsonl, line 2: expected 'prompt' to be a text" in message
    assert old.exists()
