"""What README and docs say is true as far as a machine can check: links, commands, keys, layouts and memory."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.main import get_command

from megatron_tip import __version__
from megatron_tip.cli import app
from megatron_tip.config.io import load_config
from megatron_tip.config.keys import all_keys
from megatron_tip.diagnostics.advice import STUDIED, StudiedPair
from megatron_tip.diagnostics.papers.write import markdown
from megatron_tip.diagnostics.statistics.seeds import MIN_SEEDS
from megatron_tip.placement.hosts import hosts_elsewhere
from megatron_tip.planning.dry_run import dry_run

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("slurm/*.md")])
README = (ROOT / "README.md").read_text()


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{named(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_reference_of_a_link_is_defined(page: Path):
    text = page.read_text()
    used, defined = set(re.findall(r"\]\[(\w+)\]", text)), set(re.findall(r"^\[(\w+)\]: ", text, flags=re.MULTILINE))
    assert used <= defined


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `megatron-tip` command in an indented block."""
    text = re.sub(r"\\\n\s*", "", page.read_text())  # continued lines
    lines = re.findall(r"^    (?:\S+/)?megatron-tip (.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_exists_with_its_options_keys_and_files(page: Path):
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for words in commands_of(page):
        name, *rest = words
        if name.startswith("--"):
            continue
        command = commands[name]
        if hasattr(command, "commands") and rest and not rest[0].startswith(("[", "bank|")):
            command = command.commands.get(rest[0], command)
        options = {option for parameter in command.params for option in parameter.opts}
        for word in rest:
            word = word.strip("[]")
            if word.startswith("--") and hasattr(command, "params") and not hasattr(command, "commands"):
                assert word.partition("=")[0] in {*options, "--help"}, f"{named(page)}: {words}"
            elif re.match(r"[a-z_]+\.[a-z_0-9]+=", word) and not word.startswith("section.key"):
                assert word.partition("=")[0] in all_keys(), f"{named(page)}: {words}"
            elif word.startswith("examples/") and "NAME" not in word:
                assert (ROOT / word).exists(), f"{named(page)}: {words}"


def test_the_run_of_ones_own_loads_and_is_short(tmp_path: Path):
    (block,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert len(block.splitlines()) <= 15
    (tmp_path / "run.toml").write_text(block)
    config = load_config(tmp_path / "run.toml")
    dry_run(config, hosts_elsewhere(8, 8), gpu_memory_gib=80.0)  # as README's second command says


LAYOUT = re.compile(
    r"^\| \[.*?\]\(examples/(\w+)\) \| (\d+) \| (\S+ x \S+ x \S+) \| (\S+ x \S+ x \d+)(?:, ep (\d+))? \| (\d+) \|$",
    re.MULTILINE,
)


def test_layouts_and_memory_are_those_of_the_dry_run():
    rows = LAYOUT.findall(README)
    assert len(rows) == 7
    for name, gpus, student, teacher, experts, gib in rows:
        config = load_config(ROOT / "examples" / name / f"{name}.toml")
        result = dry_run(config, hosts_elsewhere(int(gpus), 8), gpu_memory_gib=80.0)
        grids = (result.outline.student_grid, result.outline.teacher_grid)
        assert [f"{grid.tp_size} x {grid.pp_size} x {grid.dp_size}" for grid in grids] == [student, teacher], name
        assert [grid.ep_size for grid in grids] == [1, int(experts or 1)], name
        assert f"{result.memory.total_bytes / 2**30:.0f}" == gib, name


def test_every_page_and_example_is_in_its_index():
    docs, examples = ((ROOT / folder / "README.md").read_text() for folder in ("docs", "examples"))
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in docs
    for folder in ROOT.glob("examples/*/"):
        assert f"({folder.name})" in examples


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert not released or released[0] == __version__


def test_the_study_is_quoted_as_it_is():
    study = " ".join((ROOT / "docs/fixed_context_study.md").read_text().split())
    assert "entropy gives held-out contexts 1.24 nats, random tokens 1.02, D 0.93, teachability 0.83" in study
    assert "the best rule keeps 68 % of the gain at 5 %, 76 % at 10 %" in study
    for number in ("1.02 nats", "0.83", "1.24", "68 %", "76 % at 10 %"):
        assert number in README


@pytest.mark.parametrize(
    "pair,tables,digits",
    [
        (STUDIED[0], "fixed_context_study", 2),
        (STUDIED[1], "near_pair_study/near_arithmetic_1e-5", 4),
        (STUDIED[2], "near_pair_study/near_english_1e-5", 4),
        (STUDIED[3], "near_pair_study/healed_arithmetic_1e-5", 4),
        (STUDIED[4], "near_pair_study/healed_english_1e-5", 4),
    ],
    ids=["far", "arithmetic", "english", "healed arithmetic", "healed english"],
)
def test_the_evidence_of_the_advice_is_that_of_the_page(pair: StudiedPair, tables: str, digits: int):
    folder = ROOT / "docs" / tables
    assert tables.startswith(Path(pair.page).stem)
    gains, arms = (pd.read_csv(folder / f"table_{name}.csv") for name in ("gains", "interventions"))
    assert pair.start_kl == pytest.approx(gains.set_index("checkpoint").loc["mean", "kl_before"], abs=5e-4)
    main = arms[(arms["k"] == 16) & (arms["rule"] == "ta_opd_divergence")].set_index("ratio")
    assert pair.high_d == pytest.approx([main.loc[ratio, "kept_compatibility"] for ratio in (0.05, 0.1)], abs=5e-4)
    assert pair.trainings == main.loc[0.05, "seeds"]
    gained = arms[(arms["k"] == 16) & (arms["ratio"] == 0.05)].set_index("rule")["gain"]
    names = {"entropy": "entropy", "D": "divergence", "teachability": "teachability", "D^I": "incompatible"}
    said = dict(re.findall(r"(entropy|random tokens|D\^I|D|teachability) (?:gained )?(-?[\d.]+\d)", pair.found))
    assert {"entropy", "random tokens", "D", "teachability"} <= said.keys()
    for word, number in said.items():
        rule = "random" if word == "random tokens" else f"ta_opd_{names[word]}"
        assert number == f"{gained[rule]:.{digits}f}"


def test_the_study_has_no_verdict_from_fewer_trainings_than_a_verdict_needs():
    page = (ROOT / "docs/fixed_context_study.md").read_text()
    table = pd.read_csv(ROOT / "docs/fixed_context_study/table_claims.csv", keep_default_na=False)
    seeds = len(re.findall(r"full_seed\d", page.split("<!-- end facts -->")[0]))
    words = set(table["verdict"])
    assert seeds >= MIN_SEEDS or words == {f"too few seeds ({seeds} of {MIN_SEEDS})"}
    assert f"<!-- begin claims -->\n{markdown(table)}<!-- end claims -->" in page
    assert f"{len(table)} of {len(table)}.\n<!-- end verdicts -->" in page
    expected = [-1 if claim.startswith("random tokens lose") else 1 for claim in table["claim"]]
    against = int((table["difference"] * expected < 0).sum())
    assert f"In {against} rows the difference points away from the claim" in page
    assert f"None of the {len(table)} rows" in page


def test_the_table_of_the_sweep_is_that_of_its_file():
    page = (ROOT / "docs/sweep.md").read_text()
    table = pd.read_csv(ROOT / "docs/quickstart_sweep/sweep.csv")
    assert len(table) == 12
    for row in table.itertuples():
        after = f"{row.heldout_after_mean:.2f} ± {row.heldout_after_half:.2f}"
        assert f"| `{row.rule}` | {row.budget:g} | {row.retention_percent_mean:.1f} | {after} |" in page
    before = table.heldout_before_mean.unique(), table.heldout_before_half.unique()
    assert f"{before[0].item():.2f} ± {before[1].item():.2f}" in page
