"""The source of the documentation site: the repository's pages with links that work there, and a complete reference."""

from pathlib import Path

import pytest

from megatron_tip.config.keys import all_keys
from megatron_tip.selection.rules import RULES
from megatron_tip.statistics import STATISTICS
from tools.docs_site import main


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "docs"
    main(target)
    return target


def test_the_reference_has_every_key_command_rule_and_statistic(site: Path):
    keys, commands, rules, statistics = (
        (site / "reference" / f"{name}.md").read_text() for name in ("keys", "commands", "rules", "statistics")
    )
    for key in all_keys().values():
        assert f"| `{key.short_name}` |" in keys
    names = ("train", "submit", "plan", "sweep", "report", "eval", "doctor", "diagnose bank", "diagnose intervene")
    for command in names:
        assert f"## megatron-tip {command}\n" in commands
    assert "Keys of CONFIG.toml" not in commands
    for name in RULES:
        assert f"| `{name}` |" in rules
    for name in STATISTICS:
        assert f"| `{name}` |" in statistics


def test_tables_have_the_same_cells_in_every_row(site: Path):
    for page in site.glob("reference/*.md"):
        rows = [line.replace("\\|", "") for line in page.read_text().splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, page.name


def test_links_to_folders_lead_to_their_pages_and_files_come_along(site: Path):
    front = (site / "README.md").read_text()
    assert "](examples/quickstart_cpu/README.md)" in front
    assert "](docs/README.md)" in front
    for name in ("docs/step.svg", "docs/report.png", "docs/fixed_context_study/plane.png", "LICENSE"):
        assert (site / name).is_file()
