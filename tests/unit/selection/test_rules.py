import re
from pathlib import Path

import pytest

from megatron_tip.records import TokenStatistics
from megatron_tip.selection import RULES, Selector

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_published_scope_and_statistics(rule):
    row = RULES[rule]
    assert row.name == rule
    assert row.scope == ("rollout" if rule.startswith("tip_") else "batch")
    assert row.required_statistics <= set(TokenStatistics.__dataclass_fields__)
    assert Selector(rule=rule).resolved_scope == row.scope


def test_every_rule_and_its_test_are_in_the_documentation():
    table = [line for line in (ROOT / "docs/selection.md").read_text().splitlines() if line.startswith("| `")]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert set(RULES) <= names
    tests = {name for line in table for name in re.findall(r"`(test_\w+)`", line)}
    sources = "".join(path.read_text() for path in (ROOT / "tests/unit/selection").glob("test_*.py"))
    assert len(tests) == 3
    assert all(f"def {name}(" in sources for name in tests)
