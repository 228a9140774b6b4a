"""The page's tables: the runs in numbers, differences of their configurations, benchmarks, samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_tip.files import finite_number
from megatron_tip.report.run_data import RunData, differing_keys

NOT_RECORDED = "not recorded"
NOTHING = "\N{EN DASH}"
Row = tuple[str, list[str]]


def overview_rows(runs: Sequence[RunData]) -> list[Row]:
    """Returns the overview's rows: a label, and a text for each run."""
    rows: list[tuple[str, Callable[[RunData], str]]] = [
        ("Rule, budget", _rule),
        ("Steps", lambda run: str(run.steps[-1]) if run.steps else "0"),
        ("Held-out reverse KL", _heldout),
        ("Tokens supervised", _supervised),
        ("Tokens through the training pass", _trained),
        ("Time", lambda run: _seconds(_get(run, "seconds", "total"))),
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


def sample_rows(runs: Sequence[RunData]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns (prompt, [(run, before, after)]) for each held-out prompt, with the answers of the runs that have it."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for run in runs:
        for sample in run.samples:
            texts = [str(sample.get(name, NOT_RECORDED)) for name in ("prompt", "before", "after")]
            found.setdefault(texts[0], []).append((run.name, texts[1], texts[2]))
    return list(found.items())


def _rule(run: RunData) -> str:
    selection = run.config.get("selection", {})
    return f"{selection.get('rule', '?')}, {_percent(selection.get('retention_ratio'))}"


def _heldout(run: RunData) -> str:
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
