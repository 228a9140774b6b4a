"""All tables and figures of a synthetic bank in which D^L teaches and D^I does not, and the page that they fill."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from megatron_tip.diagnostics.arms import Arm, ArmResult, ArmsFile, settings_digest
from megatron_tip.diagnostics.bank import read_bank, write_bank
from megatron_tip.diagnostics.papers.claims import Claim, arm_claims, token_claims
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.papers.write import facts, fill_page, markdown, page_blocks, write_all
from megatron_tip.diagnostics.scores import Scores, write_scores
from megatron_tip.diagnostics.statistics.bootstrap import Interval
from megatron_tip.diagnostics.statistics.tokens import bank_tokens
from megatron_tip.errors import InputError
from tests.helpers.diagnostics import MANIFEST, make_bank, make_contexts, make_scores, with_gain

GAINS = {"ta_opd_teachability": 0.5, "ta_opd_divergence": 0.3, "random": 0.1, "ta_opd_incompatible": 0.1}
SEEDS = (1, 2, 3, 4, 5)


def settings_of(start: Scores) -> dict[str, Any]:
    names = ("bank", "student", "teacher")
    return {**{name: start.about[name] for name in names}, "loss": {"temperature": start.about["temperature"]}}


def write_arms(folder: Path, settings: dict[str, Any], *, ratios: tuple[float, ...], sizes: tuple[int, ...] = (16,)):
    """Arms of five seeds, each rule with its own of `GAINS`; the first of `ratios` and `sizes` is the study's own."""
    arms = ArmsFile(folder)
    arms.begin(settings)
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        contexts = generator.choice(80, 16, replace=False).tolist()
        before = generator.uniform(20, 40, 16)
        for size, ratio in [(sizes[0], ratio) for ratio in ratios] + [(size, ratios[0]) for size in sizes[1:]]:
            for rule, gain in GAINS.items():
                after = before - 20 * (gain + 0.02 * generator.normal(size=16))
                lists = ([0], contexts, [20] * 16, before.tolist(), after.tolist())
                metrics = {"selection/kept_q3_share": 0.1}
                arm = Arm(rule, ratio, size, seed)
                arms.append(ArmResult(arm, *lists, 1000, round(1000 * ratio), metrics, 1.0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    bank = make_bank(folder / "bank", num_contexts=80)
    start = make_scores(bank)
    table = bank_tokens(start, np.zeros(len(start)), 16)
    write_scores(bank.scores_path("start"), start)
    digest = settings_digest(settings_of(start))
    for seed in SEEDS:
        noise = 0.02 * np.random.default_rng(seed).normal(size=len(start))
        gain = 0.4 * table.column("d_l") + noise
        after = with_gain(start, gain, trained_contexts=[2 * seed, 2 * seed + 1], settings=digest)
        write_scores(bank.scores_path(f"full_seed{seed}"), after)
    write_arms(folder / "arms", settings_of(start), ratios=(0.05, 0.03))
    found = Evidence.read(bank.folder, start="start", after=[], arms=folder / "arms", resamples=200, seed=1)
    return folder, found, write_all(found, folder / "out")


def test_every_figure_has_its_picture_and_its_numbers(written):
    folder, _, tables = written
    pictures = sorted((folder / "out").glob("*.png"))
    assert {path.stem for path in pictures} == {
        *("plane", "gain_plane", "coefficients", "proxy_gaps", "buckets", "overlaps"),
        *("selectors", "budget_sweep", "support_sizes"),
    }
    for path in pictures:
        width, height = Image.open(path).size
        assert width > 700
        assert height > 200
        assert path.stem == "support_sizes" or len(pd.read_csv(path.with_suffix(".csv"))) > 0
    for name, table in tables.items():
        assert len(pd.read_csv(folder / "out" / f"table_{name}.csv")) == len(table)


def test_the_tables_find_what_was_planted(written):
    _, _, tables = written
    regressions = tables["regressions"].set_index("k")
    assert (regressions["gap_low"] > 0).all()
    top = tables["top_n"].query("ratio == 0.05").set_index("rule")["gain"]
    assert top["ta_opd_teachability"] == top.max()
    arms = tables["interventions"].query("ratio == 0.05").set_index("rule")
    for rule, gain in GAINS.items():
        assert arms.loc[rule, "gain"] == pytest.approx(gain, abs=0.02)
        assert arms.loc[rule, "gain_per_keep"] == pytest.approx(gain / 0.05, abs=0.5)
    assert arms.loc["ta_opd_teachability", "over_low"] > 0.3
    assert arms.loc["ta_opd_incompatible", "over_low"] < 0 < arms.loc["ta_opd_incompatible", "over_high"]


def test_claims_are_judged_by_their_intervals(written):
    _, _, tables = written
    verdicts = tables["claims"].set_index("claim")["verdict"]
    assert verdicts["teachability at 5 % gains more than raw KL (D~)"] == "agrees"
    assert verdicts["D^L predicts the gain better than D^I, K = 16"] == "agrees"
    assert verdicts["random tokens lose, under the common update"] == "disagrees"  # they gain 0.4 D^L on the mean
    assert verdicts["teachability at 5 % gains more than entropy"] == "no data"
    by_seed = tables["claims"].set_index("claim")["by_seed"]
    for claim in ("D^L predicts the gain better than D^I, K = 16", "teachability at 5 % gains more than raw KL (D~)"):
        assert len(set(by_seed[claim].split())) > 1
        assert len(by_seed[claim].split()) == len(SEEDS)


def test_too_few_trainings_have_no_verdict_and_say_so(written, tmp_path):
    folder, found, _ = written
    few = Evidence.read(
        folder / "bank", start="start", after=["full_seed1", "full_seed2"], arms=None, resamples=50, seed=1
    )
    assert set(write_all(few, tmp_path)["claims"]["verdict"]) == {"too few seeds (2 of 5)", "no data"}
    assert "Note: too few seeds (2 of 5) for a verdict on a claim." in facts(few)
    four = replace(found, arms=[result for result in found.arms if result.arm.seed < 5])
    verdicts = {claim.text: claim.verdict(0.0) for claim in claims_of(four)}
    assert verdicts["teachability at 5 % gains more than raw KL (D~)"] == "too few seeds (4 of 5)"
    assert "too few seeds (4 of 5)" in facts(four)
    assert "too few seeds" not in facts(found)


def test_checkpoints_of_no_intervention_are_one_training(written):
    _, found, _ = written
    assert len(found.by_training()) == len(SEEDS)
    assert replace(found, trainings=()).num_trainings == 1


def test_the_same_seed_gives_the_same_numbers(written):
    folder, found, tables = written
    again = write_all(
        Evidence.read(found.bank.folder, start="start", after=[], arms=folder / "arms", resamples=200, seed=1),
        folder / "again",
    )
    assert (folder / "out" / "facts.md").read_text() == (folder / "again" / "facts.md").read_text()
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, again[name])
    assert (folder / "out" / "plane.png").read_bytes() == (folder / "again" / "plane.png").read_bytes()


def test_a_page_is_filled_between_its_markers_alone(written, tmp_path):
    folder, found, tables = written
    page = tmp_path / "study.md"
    page.write_text(
        "Before.\n<!-- begin claims -->\nold\n<!-- end claims -->\n"
        "<!-- begin other -->\nkept\n<!-- end other -->\nAfter.\n"
    )
    fill_page(page, page_blocks(found, tables), folder / "out")
    text = page.read_text()
    assert text.startswith("Before.\n<!-- begin claims -->\n| claim |")
    assert text.endswith("<!-- begin other -->\nkept\n<!-- end other -->\nAfter.\n")
    assert "old" not in text
    assert (tmp_path / "study" / "plane.png").exists()
    fill_page(page, page_blocks(found, tables), folder / "out")
    assert page.read_text() == text
    page.write_text("no marker")
    with pytest.raises(InputError, match="markers"):
        fill_page(page, {}, folder / "out")


def claims_of(found: Evidence) -> list[Claim]:
    return [*token_claims(found), *arm_claims(found)]


def evidence_with(written, arms: Path) -> Evidence:
    folder, _, _ = written
    return Evidence.read(folder / "bank", start="start", after=[], arms=arms, resamples=50, seed=1)


@pytest.mark.parametrize("key", ["bank", "student", "teacher", "temperature"])
def test_arms_of_another_bank_start_or_teacher_are_refused(written, tmp_path, key):
    _, found, _ = written
    settings = settings_of(found.start) | ({"loss": {"temperature": 0.5}} if key == "temperature" else {key: "another"})
    write_arms(tmp_path / "arms", settings, ratios=(0.05,))
    with pytest.raises(InputError, match=rf"arms: expected arms that belong to the bank .*bank and .*: {key} .*, got"):
        evidence_with(written, tmp_path / "arms")


def test_arms_without_their_settings_are_refused(written, tmp_path):
    folder, _, _ = written
    shutil.copytree(folder / "arms", tmp_path / "arms")
    (tmp_path / "arms" / "settings.json").unlink()
    with pytest.raises(InputError, match=r"settings\.json: expected the settings"):
        evidence_with(written, tmp_path / "arms")


def test_tables_and_claims_are_at_the_studys_own_budget_and_k(written, tmp_path):
    _, first, _ = written
    write_arms(tmp_path / "arms", settings_of(first.start), ratios=(0.1, 0.2), sizes=(8, 32))
    found = evidence_with(written, tmp_path / "arms")
    tables = write_all(found, tmp_path / "out")
    verdicts = tables["claims"].set_index("claim")["verdict"]
    assert verdicts["teachability at 10 % gains more than raw KL (D~)"] == "agrees"
    assert not [claim for claim in verdicts.index if "at 5 %" in claim or "the 5 %" in claim]
    assert verdicts["teachability gains more at 3 % than at 10 %"] == "no data"
    assert set(tables["top_n"]["ratio"]) == {0.1}
    blocks = page_blocks(found, tables)
    assert "| rule | K = 8 | K = 32 |" in blocks["support_sizes"]
    assert blocks["selectors"].count("| ta_opd_teachability | 0.100 |") == 1
    assert set(pd.read_csv(tmp_path / "out" / "support_sizes.csv")["k"]) == {8, 32}
    assert "Note: no arm was tried at K = 16." in facts(found)
    assert "Note: not every arm recorded selection/kept_student_entropy_mean, selection" in facts(found)
    assert "Note: no arm was tried at 3 %, 5 %: the papers' claims" in facts(found)


def test_a_start_that_did_not_write_the_contexts_is_told_in_the_facts(written):
    _, first, _ = written
    start = Scores(
        *(getattr(first.start, name) for name in ("context", "prompt", "position", "columns")),
        {**first.start.about, "student": "another"},
    )
    stranger = Evidence(first.bank, start, first.gains, [])
    assert "Note: the start (fingerprint another) differs from the student" in facts(stranger)
    assert "Note: the start" not in facts(first)


def test_the_data_of_both_panels_lie_beside_the_picture(written):
    folder, _, _ = written
    data = pd.read_csv(folder / "out" / "gain_plane.csv")
    assert set(data["panel"]) == {"plane", "tenths"}
    assert data.query("panel == 'tenths'").groupby("by").size().to_dict() == {"d_i": 10, "d_l": 10}
    assert data.query("panel == 'tenths'")[["value", "gain", "low", "high"]].notna().all(axis=None)


def test_a_claim_is_decided_over_prompts_and_over_seeds():
    below, steady = Interval(-0.12, -0.24, -0.02), (-0.11, -0.12, -0.13, -0.12, -0.11)
    assert Claim("", "", below, steady).verdict(0.01) == "disagrees"
    assert Claim("", "", below, steady, sign=-1).verdict(0.01) == "agrees"
    assert Claim("", "", below, steady).verdict(0.06) == "undecided"
    assert Claim("", "", below, tuple(-value for value in steady)).verdict(0.01) == "undecided"
    assert Claim("", "", Interval(-0.12, -0.24, 0.02), steady).verdict(0.01) == "undecided"
    assert Claim("", "", below, steady[:4]).verdict(0.01) == "too few seeds (4 of 5)"
    assert np.isnan(Claim("", "", below, steady[:4]).p_value)
    assert Claim("", "", Interval.unknown(), ()).verdict(float("nan")) == "no data"


def test_the_verdicts_of_a_table_are_corrected_for_all_of_its_claims(written):
    _, found, tables = written
    values = np.array([claim.p_value for claim in claims_of(found)])
    adjusted = tables["claims"]["p_holm"].to_numpy()
    known = ~np.isnan(values)
    assert known.sum() > 5
    np.testing.assert_array_equal(known, ~np.isnan(adjusted))
    smallest = np.nanargmin(values)
    assert adjusted[smallest] == pytest.approx(min(1.0, values[smallest] * known.sum()))
    assert (adjusted[known] >= values[known]).all()


def test_scores_of_another_intervention_are_not_set_beside_arms(written, tmp_path):
    _, found, _ = written
    shutil.copytree(found.bank.folder, tmp_path / "bank")
    settings = settings_of(found.start)
    write_arms(tmp_path / "arms", settings, ratios=(0.05,))

    def read(digest: str) -> Evidence:
        bank = read_bank(tmp_path / "bank")
        after = with_gain(found.start, np.full(len(found.start), 0.1), settings=digest)
        write_scores(bank.scores_path("full_seed1"), after)
        return Evidence.read(bank.folder, start="start", after=[], arms=tmp_path / "arms", resamples=10, seed=1)

    assert read(settings_digest(settings)).arms
    with pytest.raises(InputError, match="settings of full_seed1"):
        read(settings_digest({**settings, "optimizer": {"lr": 1e-6}}))


def test_small_numbers_show_in_markdown():
    text = markdown(pd.DataFrame({"a": [0.000123456, -0.00049, 0.0, 1.23456, float("nan")]}))
    assert text.splitlines()[2:] == ["| 0.00012 |", "| -0.00049 |", "| 0.000 |", "| 1.235 |", "| n/a |"]


def test_a_bank_of_one_prompt_has_tables_and_figures_without_verdicts(tmp_path):
    bank = write_bank(tmp_path / "bank", make_contexts(3, num_prompts=1), MANIFEST)
    start = make_scores(bank)
    write_scores(bank.scores_path("start"), start)
    write_scores(bank.scores_path("end"), with_gain(start, np.full(len(start), 0.1)))
    found = Evidence.read(bank.folder, start="start", after=[], arms=None, resamples=50, seed=1)
    tables = write_all(found, tmp_path / "out")
    assert set(tables["claims"]["verdict"]) == {"too few seeds (1 of 5)", "no data"}
    with_arms = replace(
        found,
        arms=[
            ArmResult(Arm(rule, 0.05, 16, 1), [], [0, 1], [20, 20], [9.0, 9.0], [5.0, 4.0], 8, 1, {}, 1.0)
            for rule in ("ta_opd_teachability", "random")
        ],
    )
    verdicts = write_all(with_arms, tmp_path / "arms")["claims"]["verdict"]
    assert set(verdicts) == {"too few seeds (1 of 5)", "no data"}
    assert tables["gains"]["gain"].to_list() == pytest.approx([0.1, 0.1], abs=1e-6)


def test_empty_quadrants_have_no_tokens_in_tables_and_figures(tmp_path):
    """Every token alike: all lie in Q4."""
    bank = make_bank(tmp_path / "bank", num_contexts=10)
    start = make_scores(bank)
    columns = {name: np.full_like(values, 0.5) for name, values in start.columns.items()}
    alike = Scores(start.context, start.prompt, start.position, columns, start.about)
    write_scores(bank.scores_path("start"), alike)
    write_scores(bank.scores_path("end"), with_gain(alike, np.full(len(start), 0.1)))
    found = Evidence.read(bank.folder, start="start", after=[], arms=None, resamples=50, seed=1)
    tables = write_all(found, tmp_path / "out")
    assert tables["quadrants"].set_index("quadrant")["tokens"].to_dict() == {"q1": 0, "q2": 0, "q3": 0, "q4": 200}
    assert "| q3 | 0 | 0.000 | n/a |" in page_blocks(found, tables)["quadrants"]
