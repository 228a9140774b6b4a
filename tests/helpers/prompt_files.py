"""Files of prompts, and what is loaded of them with a tiny tokenizer."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.prompts.source import PromptSource, load_prompts
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def write_texts(folder: Path, *texts: str) -> Path:
    return write_lines(folder, *(json.dumps({"prompt": text}) for text in texts))


def write_both(folder: Path, rows: list[dict]) -> list[Path]:
    """The rows as JSONL and as Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    return [write_lines(folder, *map(json.dumps, rows)), folder / "p.parquet"]


def load(
    heldout: int = 0, prompts_per_step: int = 3, steps: int = 2, seed: int = 5, tokenizer=None, verify="no", **options
) -> PromptSource:
    return load_prompts(
        PromptsConfig(**options),
        HeldoutConfig(num_prompts=heldout, verify=verify),
        tokenizer or make_tiny_tokenizer(),
        prompts_per_step=prompts_per_step,
        steps=steps,
        seed=seed,
    )
