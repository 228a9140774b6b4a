"""The registered study is the one that its page describes, and its script gives settings that can be loaded."""

import os
import re
import runpy
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.diagnostics.arms import planned_arms
from megatron_tip.diagnostics.papers.claims import BEST, OTHERS, TABLE_2

ROOT = Path(__file__).parents[3]
STUDY = ROOT / "examples/near_pair_study"
verdicts = SimpleNamespace(**runpy.run_path(str(STUDY / "verdicts.py")))
PAGE = " ".join((ROOT / "docs/near_pair_study.md").read_text().split())
PLACES = {f"{pair}_{source}" for pair in ("near", "far", "healed") for source in ("arithmetic", "english")}


def commands(tmp_path: Path, *arguments: str) -> list[list[str]]:
    """What the script would call, with a program that prints its arguments instead."""
    done = subprocess.run(
        [STUDY / "run.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"TIP": "echo", "STUDY": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


def configurations(lines: list[list[str]], command: str) -> dict[str, Config]:
    """The configurations of a command by the name of the folder above run.folder."""
    found = [load_config(ROOT / line[2], line[3:]) for line in lines if line[:2] == ["diagnose", command]]
    return {config.run.folder.parent.name: config for config in found}


def test_the_results_are_those_of_the_tables():
    tables = ROOT / "docs/near_pair_study"
    shown = [line for line in (ROOT / "docs/near_pair_study.md").read_text().splitlines() if line.startswith("|")]
    lines = verdicts.summary(tables).splitlines()
    for pair in ("near", *(pair for pair in verdicts.pairs_run(tables) if pair != "near")):
        lines += verdicts.table(tables, pair).splitlines() + verdicts.gains(tables, pair).splitlines()
    assert shown[-len(lines) :] == lines
    for source, words in (
        ("english", "{agrees} of 20 claims agree, {disagrees} disagree, {undecided} are undecided"),
        ("arithmetic", "{agrees} claim agrees, {disagrees} disagree, {undecided} are undecided"),
    ):
        found = Counter(claim["verdict"] for claim in verdicts.read_claims(tables, "near", source).values())
        assert found.total() == 20
        assert words.format(**found) in PAGE
        gained = {row["rule"]: row["gain"] for row in verdicts.read_table(tables, "near", source, "interventions")[:16]}
        for rule in ("full", "random", "ta_opd_teachability"):
            assert f"{float(gained[rule]):.4f}" in PAGE.split("### Verdicts")[0]


@pytest.mark.parametrize(
    "row,pattern",
    [
        ("start KL, nats per token", r"the student is ([\d.]+)"),
        ("C on average", r"a probability C of ([\d.]+)"),
        ("C among the 5 % with the highest D", r"on average, ([\d.]+) .*? among the 5 %"),
        ("share of Q3", r"above its own\): ([\d.]+)"),
    ],
)
def test_the_facts_of_a_pair_are_those_of_its_advice(row: str, pattern: str):
    lines = (ROOT / "docs/near_pair_study.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    for pair, place in (("far", 0), ("healed", 1), ("near", 2)):
        cell = line.split("|")[2 + place]
        for source in verdicts.sources_run(ROOT / "docs/near_pair_study", pair):
            text = (ROOT / f"docs/near_pair_study/{pair}_{source}_1e-5/advice.txt").read_text()
            found = re.search(pattern, text)
            assert found
            assert f"{float(found[1]):.2f}" in cell, (pair, source)


def test_what_the_page_says_of_far_and_healed_is_in_the_tables():
    tables, words = ROOT / "docs/near_pair_study", PAGE.split("### What holds where")[1].split("### The near pair")[0]

    def gain(pair: str, source: str, rule: str) -> str:
        rows = verdicts.read_table(tables, pair, source, "interventions")
        return f"{float(next(row['gain'] for row in rows if row['rule'] == rule)):.4f}"

    for rule in ("full", "ta_opd_entropy", "ta_opd_teachability", "random"):
        for source in ("arithmetic", "english"):
            assert f"{float(gain('far', source, rule)):.3f}" in words
    assert gain("healed", "english", "full").startswith("-0.0028")
    for rule in ("ta_opd_q3_low_compatibility", "ta_opd_q3_low_teachability", "ta_opd_teachability"):
        for source in ("arithmetic", "english"):
            assert gain("healed", source, rule) in words
    expectations = {
        ("far", "english"): 8,
        ("far", "arithmetic"): 8,
        ("healed", "english"): 2,
        ("healed", "arithmetic"): 1,
    }
    for (pair, source), expected in expectations.items():
        claims = verdicts.read_claims(tables, pair, source).values()
        assert Counter(claim["verdict"] for claim in claims)["disagrees"] == expected


def test_a_claim_holds_in_a_regime_if_it_agrees_on_both_sources():
    def verdict(*words: str) -> str:
        return verdicts.regime_verdict([{"verdict": word} for word in words])

    assert verdict("agrees", "agrees") == "holds"
    assert verdict("disagrees", "disagrees") == "fails"
    assert verdict("agrees", "disagrees") == verdict("agrees", "undecided") == "undecided"
    assert verdict("agrees", "too few seeds (3 of 5)") == verdict("no data", "no data") == "not run"


def test_the_plan_is_what_the_page_says():
    config = load_config(STUDY / "study.toml")
    assert f"| Arms | {len(planned_arms(config))} for each pair and source |" in PAGE
    assert f"the {6 * len(planned_arms(config)):,} arms" in PAGE
    assert f"| Seeds | {config.diagnostics.seeds}," in PAGE
    assert config.optimizer.lr == config.optimizer.min_lr == 1e-5
    assert (config.training.steps, config.rollout.prompts_per_step, config.heldout.num_prompts) == (4, 4, 16)
    assert "four steps of four contexts at a constant rate of 1e-5; measured on 16 contexts" in PAGE


def test_every_rule_of_a_claim_is_trained_and_no_other():
    claimed = {BEST, *(rule for rule, _, _ in TABLE_2), *(rule for _, _, *pair, _ in OTHERS for rule in pair)}
    assert set(load_config(STUDY / "study.toml").diagnostics.rules) == claimed - {"full"}


@pytest.mark.parametrize("command", ["bank", "score", "intervene"])
def test_the_script_runs_three_pairs_on_two_sources(tmp_path: Path, command: str):
    found = configurations(commands(tmp_path), command)
    assert set(found) == {f"{place}_1e-5" for place in PLACES}
    for name, config in found.items():
        pair, source, _ = name.split("_")
        assert config.diagnostics.bank == tmp_path / name / "bank"
        assert len(config.model.drop_layers) == {"near": 1, "far": 6, "healed": 0}[pair]
        assert (config.prompts.tasks == ("basic_arithmetic",)) == (source == "arithmetic")
        assert (config.model.path == tmp_path / "healed" / "hf") == (pair == "healed")
        assert config.diagnostics.retention_ratios == (0.1,)


def test_the_healed_student_is_trained_as_the_pruned_pair_is(tmp_path: Path):
    (line,) = [line for line in commands(tmp_path) if line[0] == "train"]
    config = load_config(ROOT / line[1], line[2:])
    assert (config.selection.rule, config.training.steps) == ("full", 60)
    assert config.model.drop_layers == load_config(ROOT / line[1]).model.drop_layers


def test_what_comes_further_is_three_per_cent_and_lower_rates(tmp_path: Path):
    found = configurations(commands(tmp_path, "further"), "intervene")
    assert set(found) == {f"{place}_1e-5" for place in PLACES} | {
        f"near_{source}_{rate}" for source in ("arithmetic", "english") for rate in ("3e-6", "1e-6")
    }
    assert found["far_english_1e-5"].diagnostics.retention_ratios == (0.1, 0.03)
    assert found["near_english_1e-6"].optimizer.lr == found["near_english_1e-6"].optimizer.min_lr == 1e-6
