"""A model's context length, and presets that fit into it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from megatron_tip.evaluation.harness import Model
from megatron_tip.evaluation.presets import Preset

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 2048
"""Tokens reserved for a question; in a context shorter than twice that, half of it."""

_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_SECONDS = 5.0


def context_of(model: Model) -> int | None:
    """Returns the most tokens that prompt and answer may have together; None if not known.

    Read from config.json, in lm-eval's order of keys, or from a server's `/models` (vLLM, SGLang).
    """
    if model.url:
        return _of_server(model)
    config = _read_json(model.path / "config.json") if model.path else {}
    nested = config.get("text_config")
    config = nested if isinstance(nested, Mapping) else config
    return next((int(config[key]) for key in _KEYS if config.get(key)), None)


def fitted(preset: Preset, context: int | None) -> Preset:
    """Returns `preset`, with answers that fit into `context` after PROMPT_TOKENS, and a note in the protocol.

    Otherwise lm-eval would refuse the longer limit, and a server every request.
    """
    if context is None:
        return preset
    most = context - min(PROMPT_TOKENS, context // 2)
    if preset.max_tokens <= most:
        return replace(preset, context=context)
    logger.warning(
        "%s: answers are cut at %d tokens instead of %d: the model's context is %d, of which %d are for the question",
        *(preset.name, most, preset.max_tokens, context, context - most),
    )
    return replace(preset, context=context, max_tokens=most, max_tokens_asked=preset.max_tokens)


def _of_server(model: Model) -> int | None:
    try:
        # Bypasses the environment's proxy, as the harness does.
        answer = httpx.get(f"{model.url.rstrip('/')}/models", timeout=_SECONDS, trust_env=False).raise_for_status()
        cards = answer.json()["data"]
        named = [card for card in cards if card.get("id") == model.name] or cards
        return int(named[0]["max_model_len"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, IndexError):
        return None  # the backend will report a server that is down


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
