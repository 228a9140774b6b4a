"""The page's tables: the runs in numbers, differences of their configurations, benchmarks, samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tip.files import finite_number
from megatron_tip.report.run_data import RunData, differing_keys
from megatron_tip.report.user_words import user_words

NOT_RECORDED = "not recorded"
NOTHING = "\N{EN DASH}"
Row = tuple[str, list[str]]


def overview_rows(runs: Sequence[RunData]) -> list[Row]:
    """Returns the overview's rows: a label, and a text for each run."""
    rows: list[tuple[str, Callable[[RunData], str]]] = [
        ("Student", lambda run: _model(run, "model")),
        ("Teacher", lambda run: _model(run, "teacher")),
        ("Prompts", _prompts),
        ("Rule, budget", _rule),
        ("Steps", lambda run: str(run.steps[-1]) if run.steps else "0"),
        ("Held-out reverse KL", _heldout),
        ("Tokens supervised", _supervised),
        ("Tokens through the training pass", _trained),
        ("Time", lambda run: _seconds(_get(run, "seconds", "total"))),
        ("Rate", _rate),
        ("Peak memory, all workers", lambda run: _bytes((run.summary or {}).get("peak_rss_bytes"))),
        ("Layout", _layout),
    ]
    return [(name, [text(run) for run in runs]) for name, text in rows]


def config_rows(runs: Sequence[RunData]) -> list[Row]:
    """Returns (key, its value in each run) where the configurations differ; empty for a single run."""
    if len(runs) == 1:
        return []
    shown = {
        key: [NOTHING if value is None else str(value) for value in values] for key, values in differing_keys(runs)
    }
    return list(shown.items())


def evaluation_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Returns the benchmark rows: run, model, benchmark, metric, mean +- sd, seeds, questions, protocol."""
    return [_evaluation(run.name, record) for run in runs for record in run.evaluations]


def heldout_warning(runs: Sequence[RunData]) -> str:
    """Returns a warning if the runs' held-out measurements are of different things; empty if they can be compared."""
    generated = any(run.config.get("prompts", {}).get("source") == "reasoning_gym" for run in runs)
    names = {*_HELDOUT_KEYS, *(["run.seed"] if generated else [])}
    differing = [key for key, _ in differing_keys(runs) if key in names]
    if not differing:
        return ""
    return f"not the same held-out set or measurement ({', '.join(differing)} differ): held-out values do not compare"


_HELDOUT_KEYS = (
    *("prompts.source", "prompts.path", "prompts.field", "prompts.tasks", "prompts.apply_chat_template"),
    *("prompts.system_prompt", "prompts.max_prompt_tokens", "heldout.num_prompts", "teacher.path"),
    *("rollout.max_response_tokens", "rollout.temperature", "rollout.top_p", "loss.temperature"),
)
"""Keys on which the held-out prompts, the answers' sampling or what is measured depend."""


def sample_rows(runs: Sequence[RunData]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Returns (the user's words, prompt, [(run, before, after)]) for each held-out prompt.

    The answers are those of the runs that have the prompt.
    """
    found: dict[str, list[tuple[str, str, str]]] = {}
    for run in runs:
        for sample in run.samples:
            texts = [str(sample.get(name, NOT_RECORDED)) for name in ("prompt", "before", "after")]
            found.setdefault(texts[0], []).append((run.name, texts[1], texts[2]))
    return [(user_words(prompt), prompt, answers) for prompt, answers in found.items()]


def _rule(run: RunData) -> str:
    selection = run.config.get("selection", {})
    if selection.get("rule") == "full":
        return "full"
    return f"{selection.get('rule', '?')}, {_percent(selection.get('retention_ratio'))}"


def _model(run: RunData, section: str) -> str:
    model = run.config.get(section, {})
    if "path" not in model:
        return NOT_RECORDED
    dropped = model.get("drop_layers") or []
    return Path(str(model["path"])).name + (f" without {len(dropped)} layers" if dropped else "")


def _prompts(run: RunData) -> str:
    prompts = run.config.get("prompts", {})
    if "path" in prompts:
        return Path(str(prompts["path"])).name
    return ", ".join(map(str, prompts.get("tasks") or [])) or NOT_RECORDED


def _rate(run: RunData) -> str:
    seconds, tokens = _get(run, "seconds", "total"), _get(run, "tokens", "valid")
    steps = finite_number((run.summary or {}).get("steps"))
    if not seconds or not steps:
        return NOT_RECORDED
    per_second = "" if tokens is None else f", {tokens / seconds:,.1f} response tokens per second"
    return f"{seconds / steps:.1f} s per step{per_second}, with start, measurements and saves"


def _heldout(run: RunData) -> str:
    divergence, right = (
        _divergence(run),
        [one for one in run.metrics.get("heldout/task_accuracy", []) if one is not None],
    )
    if not right:
        return divergence
    return f"{divergence}; right answers {' → '.join(_percent(one) for one in dict.fromkeys((right[0], right[-1])))}"


def _divergence(run: RunData) -> str:
    for name in ("heldout/reverse_kl", "heldout/topk_reverse_kl"):
        values = [value for value in run.metrics.get(name, []) if value is not None]
        if len(values) > 1:
            return f"{values[0]:.3f} → {values[-1]:.3f} nats per token"
        if values:
            return f"{values[0]:.3f} nats per token"
    return NOT_RECORDED


def _supervised(run: RunData) -> str:
    valid, selected = (_get(run, "tokens", name) for name in ("valid", "selected"))
    if not valid or selected is None:
        return NOT_RECORDED
    return f"{selected:,.0f} of {valid:,.0f} ({_percent(selected / valid)})"


def _trained(run: RunData) -> str:
    trained, uncut = (_get(run, "tokens", name) for name in ("trained", "trained_uncut"))
    if not uncut or trained is None:
        return NOT_RECORDED
    return f"{trained:,.0f} of {uncut:,.0f} ({_percent(trained / uncut)})"


def _layout(run: RunData) -> str:
    world = (run.summary or {}).get("world")
    return " · ".join(f"{name} {size}" for name, size in world.items()) if world else NOT_RECORDED


def _evaluation(name: str, record: Mapping[str, Any]) -> list[str]:
    mean, sd = finite_number(record.get("mean")), finite_number(record.get("sd"))
    spread = "" if sd is None else f" ± {100 * sd:.1f}"
    score = NOT_RECORDED if mean is None else f"{100 * mean:.1f}{spread}"
    protocol = record.get("protocol") or {}
    asked = ", ".join(f"{key} {value}" for key, value in protocol.items())
    texts = [record.get(key, NOTHING) for key in ("model", "benchmark", "metric")]
    seeds, questions = (str(record.get(key, NOTHING)) for key in ("num_seeds", "num_questions"))
    if record.get("limit"):
        questions += ", a part (--limit)"
    return [name, *map(str, texts), score, seeds, questions, asked]


def _get(run: RunData, section: str, name: str) -> float | None:
    return finite_number(((run.summary or {}).get(section) or {}).get(name))


def _percent(share: Any) -> str:
    number = finite_number(share)
    return "?" if number is None else f"{number:.1%}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return NOT_RECORDED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _bytes(value: Any) -> str:
    number = finite_number(value)
    return NOT_RECORDED if number is None else f"{number / 1e9:.2f} GB"
