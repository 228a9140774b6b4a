"""All tables and figures of a synthetic bank in which D^L teaches and D^I does not, and the page that they fill."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from megatron_tip.diagnostics.arms import Arm, ArmResult, ArmsFile
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.papers.write import fill_page, page_blocks, write_all
from megatron_tip.diagnostics.scores import write_scores
from megatron_tip.diagnostics.statistics.tokens import token_table
from megatron_tip.errors import InputError
from tests.helpers.diagnostics import make_bank, make_scores, with_gain

GAINS = {"ta_opd_teachability": 0.5, "ta_opd_divergence": 0.3, "random": 0.1, "ta_opd_incompatible": 0.1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    bank = make_bank(folder / "bank", num_contexts=80)
    start = make_scores(bank)
    table = token_table(start, np.zeros(len(start)), 16)
    noise = 0.02 * np.random.default_rng(1).normal(size=len(start))
    after = with_gain(start, 0.4 * table.column("d_l") + noise, trained_contexts=[0, 1])
    write_scores(bank.scores_path("start"), start)
    write_scores(bank.scores_path("full_seed1"), after)
    arms = ArmsFile(folder / "arms")
    arms.begin({})
    generator = np.random.default_rng(2)
    for seed in (1, 2, 3):
        contexts = generator.choice(80, 16, replace=False).tolist()
        before = generator.uniform(20, 40, 16)
        for rule, gain in GAINS.items():
            for ratio in (0.03, 0.05):
                result = before - 20 * (gain + 0.02 * generator.normal(size=16))
                arm = Arm(rule, ratio, 16, seed)
                metrics = {"selection/kept_q3_share": 0.1}
                arms.append(
                    ArmResult(
                        arm,
                        [0],
                        contexts,
                        [20] * 16,
                        before.tolist(),
                        result.tolist(),
                        1000,
                        int(1000 * ratio),
                        metrics,
                        1.0,
                    )
                )
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


def test_the_same_seed_gives_the_same_numbers(written):
    folder, found, tables = written
    again = write_all(
        Evidence.read(found.bank.folder, start="start", after=[], arms=folder / "arms", resamples=200, seed=1),
        folder / "again",
    )
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
