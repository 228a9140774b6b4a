"""Good inputs of every command, small: models, prompts, a run's folder, a bank, and configurations."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tip.config.io import load_config
from megatron_tip.diagnostics.scores import write_scores
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.records import Prompt
from megatron_tip.rollout.storage import write_rollouts
from megatron_tip.training.checkpoints.files import SHARDS_NAME, STATE_NAME, CheckpointFiles, checksum, write_state
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.same_run import defining_settings
from megatron_tip.training.recorder import RecorderState
from tests.helpers.diagnostics import make_bank, make_scores, with_gain
from tests.helpers.tiny import make_llama
from tests.helpers.training import make_rollouts
from tools.synthetic_runs import write_run

CONFIG = """
[run]
folder = "run"
threads = 1
[model]
path = "model"
dtype = "float32"
[teacher]
path = "model"
dtype = "float32"
[prompts]
path = "prompts.jsonl"
max_prompt_tokens = 200
[heldout]
num_prompts = 2
num_samples = 1
[rollout]
prompts_per_step = 2
max_response_tokens = 8
[selection]
retention_ratio = 0.25
[optimizer]
lr = 1e-3
[training]
steps = 4
max_tokens_per_micro_batch = 300
[diagnostics]
rollouts = "run/rollouts"
bank = "new_bank"
num_contexts = 4
"""


def make_material(folder: Path) -> None:
    """Writes everything into `folder`, the current directory; all paths in it are relative."""
    Path("run.toml").write_text(CONFIG)
    make_llama(folder / "model", seed=1, num_layers=2)
    Path("model/generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.6}')
    _shard(folder / "model")
    questions: list[dict[str, Any]] = [
        {"prompt": f"what is {number} + {number}?", "teacher": "t"} for number in range(8)
    ]
    questions[3] = {"prompt": [{"role": "user", "content": "1 + 1 ?"}], "teacher": "t"}
    Path("prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    texts = [question["prompt"] for question in questions if isinstance(question["prompt"], str)]
    pq.write_table(pa.table({"prompt": texts, "teacher": ["t"] * len(texts)}), "prompts.parquet")
    _write_run_folder(Path("done"))
    _write_run_folder(Path("run"))
    Path("run/summary.json").unlink()
    bank = make_bank(Path("bank"), num_contexts=12, num_tokens=6)
    scores = make_scores(bank)
    write_scores(bank.scores_path("start"), scores)
    write_scores(bank.scores_path("after"), with_gain(scores, np.full(len(scores), 0.1), checkpoint="after"))


def _shard(model: Path) -> None:
    """Splits the weights into two files and an index."""
    from safetensors.torch import load_file, save_file

    single = model / "model.safetensors"
    tensors, weight_map = load_file(single), {}
    single.unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, model / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_run_folder(path: Path) -> None:
    """Writes a run with a view, an evaluation, a timeline and a checkpoint."""
    write_run(path, steps=4, view_steps=[2], responses=2, tokens=12)
    folder, config = RunFolder(path), load_config("run.toml")
    folder.write_config(config)
    (path / "run.lock").write_text('{"host": "a", "pid": 1, "since": "2026-01-01"}')
    (path / "trackers.json").write_text('{"wandb": "abc"}')
    result: dict[str, Any] = {
        "benchmark": "gsm8k",
        "model": "hf",
        "metric": "m",
        "mean": 0.5,
        "sd": 0.1,
        "num_seeds": 2,
    }
    result |= {"num_questions": 9, "limit": 9, "protocol": {"seed": 1}}
    folder.evaluations.write_text(json.dumps(result) + "\n")
    folder.trace.mkdir()
    events = [{"name": "rollout", "ph": "X", "ts": 0, "dur": 1e6}, {"name": "step 1", "ph": "i", "ts": 3e6}]
    (folder.trace / "rank_00000.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rollouts = make_rollouts([6, 7, 5, 8])
    prompts = [Prompt(rollout.prompt_index, "1 + 1?", tuple(rollout.prompt_ids)) for rollout in rollouts]
    write_rollouts(folder.rollouts, "step_000001", rollouts, prompts)
    files = CheckpointFiles(folder.checkpoints)
    partial = files.begin(2)
    (partial / SHARDS_NAME / "common.pt").write_bytes(b"shards")
    progress = RunProgress(step=2, unrecorded={"train/loss": 0.5}, num_updates=2)
    state = {"settings": defining_settings(config), "progress": progress.as_json(), "recorder": asdict(RecorderState())}
    write_state(partial, {**state, "seconds": {"train": 1.0}, "workers": "1 cpu", "prompts": ""})
    names = (STATE_NAME, f"{SHARDS_NAME}/common.pt")
    files.commit(2, partial, {name: checksum(partial / name) for name in names})


def override_names() -> list[str]:
    """Returns `section.key` of every key, and some that do not exist."""
    sections = type(load_config("run.toml")).model_fields
    names = [f"{name}.{key}" for name, one in sections.items() for key in one.annotation.model_fields]  # type: ignore[union-attr]
    return [*names, "run.nothing", "nothing.folder", "run", "run.folder.x"]
