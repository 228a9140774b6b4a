import re
from pathlib import Path

import pytest

from megatron_tip.errors import ConfigError
from megatron_tip.selection import RULES, Selector
from megatron_tip.statistics import TokenStatistics
from tests.helpers.selection import settings_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_published_scope_and_statistics(rule):
    row = RULES[rule]
    assert row.name == rule
    per_rollout = rule.startswith(("tip_", "se_kd"))
    assert row.scope == ("whole_rollouts" if rule == "fire" else "rollout" if per_rollout else "batch")
    assert row.required_statistics <= set(TokenStatistics.__dataclass_fields__)
    assert Selector(**settings_of(rule, 1.0)).resolved_scope == row.scope


def test_every_rule_and_its_test_are_in_the_documentation():
    table = [line for line in (ROOT / "docs/selection.md").read_text().splitlines() if line.startswith("| `")]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert set(RULES) <= names
    tests = {name for line in table for name in re.findall(r"`(test_\w+)`", line)}
    sources = "".join(path.read_text() for path in (ROOT / "tests/unit/selection").glob("test_*.py"))
    assert len(tests) == 4
    assert all(f"def {name}(" in sources for name in tests)


def install(folder: Path, name: str, entry_points: str, monkeypatch) -> None:
    """A package of that name with these entry points, as pip would leave it."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[megatron_tip.selection_rules]\n{entry_points}\n")
    monkeypatch.syspath_prepend(folder)


def test_installed_packages_offer_rules(tmp_path, monkeypatch):
    (tmp_path / "surprising.py").write_text(
        "from megatron_tip.selection import NORMALISERS, Input, Rule\n"
        "def surprise(support_divergence, teacher_entropy):\n    return support_divergence * (1 - teacher_entropy)\n"
        "LOWEST = Rule('any', surprise, (Input('reverse_kl'), Input('jsd', NORMALISERS['raw'])), take='bottom')\n"
    )
    offers = "surprise = surprising:surprise\nleast_surprise = surprising:LOWEST\nbroken = surprising:nothing"
    install(tmp_path, "surprising", offers, monkeypatch)
    assert Selector("surprise", 0.5).required_statistics == {"support_divergence", "teacher_entropy"}
    rule = Selector("least_surprise", 0.5).resolved_rule
    assert (rule.name, rule.take, rule.required_statistics) == ("least_surprise", "bottom", {"reverse_kl", "jsd"})
    with pytest.raises(ConfigError, match=r"cannot import 'surprising:nothing'"):
        Selector("broken", 0.5)
    with pytest.raises(ConfigError, match="the nearest name is 'surprise'"):
        Selector("surprize", 0.5)
    install(tmp_path / "second", "other", "surprise = surprising:LOWEST", monkeypatch)
    with pytest.raises(ConfigError, match=r"one package to offer it, got \['other', 'surprising'\]"):
        Selector("surprise", 0.5)
