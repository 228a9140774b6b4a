"""Synthetic banks and scores, with gains that are known."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_tip.diagnostics.bank import ContextBank, write_bank
from megatron_tip.diagnostics.scores import SUPPORT, WHOLE, Scores, scores_of
from megatron_tip.records import Rollout

MANIFEST: dict[str, Any] = {
    "student": {"path": "student", "drop_layers": [], "fingerprint": "s"},
    "teacher": {"path": "teacher", "fingerprint": "t"},
    "tokenizer": "words",
    "vocab_size": 300,
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_response_tokens": 20, "samples_per_prompt": 1},
    "seed": 1,
    "source": "generated",
}


def make_contexts(num_contexts: int, num_tokens: int = 20, *, num_prompts: int | None = None) -> list[Rollout]:
    """Responses of `num_tokens` ids; the i-th is to prompt i modulo `num_prompts`."""
    num_prompts = num_prompts or num_contexts
    return [
        Rollout(
            prompt_index=place % num_prompts,
            sample_index=place // num_prompts,
            prompt_ids=(3, 4 + place % num_prompts),
            response_ids=tuple(range(5, 5 + num_tokens)),
            rollout_logprobs=(-1.0,) * num_tokens,
            finish_reason="length",
            weight_version=0,
        )
        for place in range(num_contexts)
    ]


def make_bank(folder: Path, num_contexts: int = 60, num_tokens: int = 20, **changes: Any) -> ContextBank:
    return write_bank(folder, make_contexts(num_contexts, num_tokens), {**MANIFEST, **changes})


def make_scores(bank: ContextBank, *, support_sizes: tuple[int, ...] = (8, 16), seed: int = 0) -> Scores:
    """Plausible statistics without any relation to each other; C is the same at every K."""
    generator = np.random.default_rng(seed)
    size = len(bank.rows)
    columns = {name: generator.gamma(2.0, 0.5, size).astype(np.float32) for name in WHOLE}
    for name in ("student_logprobs", "teacher_logprobs"):
        columns[name] = -columns[name]
    for name in SUPPORT:
        values = generator.uniform(size=size)
        for k in support_sizes:
            scale = k if name == "support_overlap" else 1
            columns[f"{name}_k{k}"] = (np.floor(values * k) if scale > 1 else values).astype(np.float32)
    about = {"checkpoint": "start", "student": "s", "teacher": "t", "temperature": 1.0}
    return scores_of(bank, columns, {**about, "support_sizes": list(support_sizes)})


def with_gain(scores: Scores, gain: np.ndarray, **about: Any) -> Scores:
    """The scores of a checkpoint whose KL(teacher || student) is lower by `gain` at each position."""
    lower = (scores.columns["forward_kl"].astype(np.float64) - gain).astype(np.float32)
    columns = {**scores.columns, "forward_kl": lower}
    return Scores(scores.context, scores.prompt, scores.position, columns, {**scores.about, **about})
