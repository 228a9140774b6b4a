"""Synthetic run folders for `bench_report.py` and the report's tests: random numbers in real files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tip.observability.token_table import (
    TokenTable,
    TokenTableFacts,
    ViewedRollout,
    encode_token_table,
    token_table_file,
)

WORDS = ("the", " sum", " of", " two", " is", "\n", " 7", "x", " therefore", ".", " not", " é", " 数")
PHASES = ("rollout", "teacher", "score", "select", "train", "sync")


def write_run(
    folder: Path,
    *,
    steps: int,
    rule: str = "ta_opd_teachability",
    seed: int = 0,
    without: Sequence[str] = (),
    view_steps: Sequence[int] = (),
    responses: int = 2,
    tokens: int = 30,
    vocab_size: int = 400,
    support_size: int = 16,
    texts: dict[int, str] | None = None,
    sample: str = "an answer",
) -> None:
    """Writes a finished run to `folder`.

    Args:
        without: name prefixes of metrics that the run lacks.
        view_steps: steps that have a token table of `responses` responses of `tokens` tokens.
        texts: the texts of some token ids; the others have words.
    """
    random = np.random.default_rng(seed)
    (folder / "views").mkdir(parents=True)
    lines = [_metrics(step, steps, random) for step in range(steps + 1)]
    kept = [
        {key: value for key, value in line.items() if not key.startswith(tuple(without) or ("-",))} for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (folder / "config.toml").write_text(
        f'[run]\nseed = {seed}\n\n[selection]\nrule = "{rule}"\nretention_ratio = 0.1\n'
    )
    answer = {"prompt": "What is 3 + 4?", "before": "x", "after": sample}
    (folder / "samples.jsonl").write_text(json.dumps(answer) + "\n")
    summary = {
        "steps": steps,
        "world": {"tp": 1, "pp": 1, "dp": 1},
        "tokens": {"valid": 1000, "selected": 100, "trained": 700, "trained_uncut": 1000},
        "seconds": {"total": 75.0 * steps},
        "peak_rss_bytes": 2 * 10**9,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for step in view_steps:
        content = _table(step, rule, random, responses, tokens, vocab_size, support_size, texts or {})
        token_table_file(folder / "views", step).write_bytes(content)


def _metrics(step: int, steps: int, random: np.random.Generator) -> dict[str, Any]:
    done = step / steps
    line: dict[str, Any] = {"step": step}
    if step in (0, steps):
        line["heldout/reverse_kl"] = 4.0 - 3 * done
    if step == 0:
        return line
    for name, start, end in (
        ("train/reverse_kl", 4, 1),
        ("train/loss", 5, 2),
        ("train/student_entropy", 5, 3),
        ("train/teacher_entropy", 5.5, 3.2),
        ("train/support_divergence", 4, 1.2),
        ("train/compatibility", 0.1, 0.7),
        ("train/grad_norm", 50, 8),
        ("rollout/response_tokens_mean", 200, 300),
        ("rollout/truncated_ratio", 0.5, 0.2),
        ("selection/retention_ratio", 0.1, 0.1),
    ):
        line[name] = float(start + (end - start) * done) * random.uniform(0.95, 1.05)
    for group in ("", "kept_"):
        shares = random.dirichlet((3, 3, 3, 5))
        line |= {f"selection/{group}q{k + 1}_share": float(share) for k, share in enumerate(shares)}
    for phase in PHASES:
        line[f"time/{phase}_seconds"] = float(random.uniform(1, 4))
        line[f"memory/{phase}_bytes"] = float(random.uniform(1e9, 3e9))
    line["host/rss_total_bytes"] = float(random.uniform(2e9, 3e9))
    return line | {f"selection/jaccard_rule_{k}": float(random.uniform()) for k in range(60)}


def _table(
    step: int,
    rule: str,
    random: np.random.Generator,
    responses: int,
    tokens: int,
    vocab_size: int,
    support_size: int,
    texts: dict[int, str],
) -> bytes:
    """Returns a token table; every statistic is random or computed from random candidates."""
    n = responses * tokens
    supports = _supports(random, n, support_size, vocab_size)
    statistics = _statistics(random, supports)
    spelled = [texts.get(token, WORDS[token % len(WORDS)]) for token in range(vocab_size)]
    token_ids = supports["student_support_ids"][:, 0]
    valid = random.uniform(size=n) < 0.98
    kept = valid & (statistics["score"] > 0.3)
    axes = [statistics[name] for name in ("student_entropy", "support_divergence")]
    facts = TokenTableFacts(
        step=step,
        rule=rule,
        retention_ratio=0.1,
        temperature=1.0,
        divergence="support_divergence",
        medians=(float(np.median(axes[0])), float(np.median(axes[1]))) if n else None,
        rollouts=tuple(ViewedRollout(place, place // 2, place % 2, "stop", "Q?") for place in range(responses)),
        points=tuple(zip(*(axis[:2000].tolist() for axis in (*axes, kept)), strict=True)),
        id_texts=dict(enumerate(spelled)),
    )
    columns: dict[str, Any] = {
        "rollout": np.repeat(np.arange(responses), tokens),
        "position": np.tile(np.arange(tokens), responses),
        "token_id": token_ids,
        "text": [spelled[token] for token in token_ids],
        "valid": valid,
        "selected": kept,
    }
    for name, values in statistics.items():
        columns[name] = pa.array(np.where(valid, values, np.nan).astype(np.float32), from_pandas=True)
    offsets = pa.array(np.arange(n + 1) * support_size, type=pa.int32())
    for name, values in supports.items():
        flat = values.reshape(-1).astype(np.int32 if name.endswith("ids") else np.float16)
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(flat))
    return encode_token_table(TokenTable.of_columns(facts, columns))


def _supports(random: np.random.Generator, n: int, support_size: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns `[n, support_size]` ids and logprobs of both models; the sampled token is the student's first."""
    # Most positions are nearly certain, as in a language model.
    sharpness = np.where(random.uniform(size=(n, 1)) < 0.25, 1.5, random.gamma(4.0, 4.0, size=(n, 1)))
    student = _normalised(np.sort(random.normal(size=(n, support_size)) * sharpness, axis=1)[:, ::-1])
    teacher = _normalised(np.sort(student + random.normal(scale=0.3, size=student.shape), axis=1)[:, ::-1])
    ids = random.zipf(1.2, size=(n, 1)) + np.arange(support_size) * 7
    student_ids = ids % vocab_size
    teacher_ids = np.where(random.uniform(size=ids.shape) < 0.8, student_ids, (ids + 3) % vocab_size)
    return {
        "student_support_ids": student_ids,
        "teacher_support_ids": teacher_ids,
        "student_support_logprobs": student,
        "teacher_support_logprobs": teacher,
    }


def _statistics(random: np.random.Generator, supports: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the statistics, `[n]` each."""
    student, teacher = supports["student_support_logprobs"], supports["teacher_support_logprobs"]
    entropy = -(np.exp(student) * student).sum(1)
    divergence = random.gamma(0.7, 1.0, size=len(entropy)) * (0.01 + entropy)
    compatibility = np.minimum(1.0, np.exp(teacher).sum(1))
    return {
        "student_entropy": entropy,
        "reverse_kl": divergence * 1.1,
        "support_divergence": divergence,
        "compatibility": compatibility,
        "student_logprobs": student[:, 0],
        "teacher_logprobs": teacher[:, 0],
        "score": divergence / (1 + divergence) * compatibility,
    }


def _normalised(logits: np.ndarray) -> np.ndarray:
    """Returns logprobs of candidates that together have 98 % of the mass."""
    largest = logits[:, :1]
    return logits - largest - np.log(np.exp(logits - largest).sum(1, keepdims=True)) - 0.02
