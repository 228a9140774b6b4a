"""Every metric that the code names has an entry in the reference, and every entry is a metric of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_tip
from megatron_tip.observability.metric_reference import METRICS, metric_of

PACKAGE = Path(megatron_tip.__file__).parent
AREAS = sorted({metric.name.partition("/")[0] for metric in METRICS})
METRIC = re.compile(rf"({'|'.join(AREAS)})/[a-z0-9_<>]+[a-z0-9>]")


def named_metrics(path: Path) -> Iterator[str]:
    """Yields the metrics in a module's strings; the variable parts of an f-string as `<part>`."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "<part>" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if METRIC.fullmatch(text):
            yield text


def test_metrics_that_the_code_names_have_an_entry():
    names = {name for path in PACKAGE.rglob("*.py") for name in named_metrics(path)}
    assert len(names) > 60
    missing = {name for name in names if "<" not in name and metric_of(name) is None}
    assert not missing


def test_families_that_the_code_names_have_an_entry():
    families = {name for path in PACKAGE.rglob("*.py") for name in named_metrics(path) if "<part>" in name}
    families -= {"selection/<part>", "train/<part>", "heldout/<part>"}  # their names stand elsewhere in full
    known = {re.sub(r"<\w+>", "<part>", metric.name) for metric in METRICS}
    for family in families - known:
        pattern = family.replace("<part>", r"[a-z0-9_<>]*")
        assert any(re.fullmatch(pattern, name) for name in known), family


@pytest.mark.parametrize(
    "name, unit",
    [
        ("train/reverse_kl", "nats"),
        ("selection/kept_q3_share", "share"),
        ("selection/kept_reverse_kl_mean", "its own"),
        ("selection/jaccard_tip_soft_or", "share"),
        ("memory/train_bytes", "bytes"),
        ("perf/saved_train_seconds", "s"),
        ("gpu/power_total_watts", "W"),
    ],
)
def test_a_metric_is_found_by_its_name(name, unit):
    metric = metric_of(name)
    assert metric is not None
    assert metric.unit == unit


def test_a_name_that_no_run_logs_is_not_found():
    assert metric_of("train/fame") is None


def test_no_metric_has_two_entries():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
