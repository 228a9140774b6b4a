"""Output of a bank's tables and figures into a folder, and of their numbers into a Markdown page."""

import re
import shutil
from pathlib import Path

import pandas as pd

from megatron_tip.diagnostics.papers import arm_figures, arm_tables, token_tables
from megatron_tip.diagnostics.papers.claims import claims
from megatron_tip.diagnostics.papers.evidence import Evidence
from megatron_tip.diagnostics.papers.frames import rows
from megatron_tip.diagnostics.papers.token_figures import FIGURES
from megatron_tip.errors import InputError
from megatron_tip.files import atomic_write_text, output_errors

_MARK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def write_all(evidence: Evidence, folder: Path) -> dict[str, pd.DataFrame]:
    """Writes every table as CSV, every figure as PNG with its CSV, and `facts.md` into `folder`; returns the tables.

    Raises:
        InputError: no checkpoint after the start was scored. OutputError: the folder is not writable.
    """
    with output_errors(folder, setting="--out"):
        folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "gains": token_tables.gains(evidence),
        "quadrants": token_tables.quadrants(evidence),
        "robustness": token_tables.robustness(evidence),
        "proxies": token_tables.proxies(evidence),
        "regressions": token_tables.regressions(evidence),
        "top_n": token_tables.top_n(evidence),
        "claims": claims(evidence),
    }
    for name, draw in FIGURES.items():
        draw(evidence, folder / f"{name}.png")
    if (size := evidence.arms_support_size) is not None:
        arms = tables["interventions"] = arm_tables.interventions(evidence)
        arm_figures.selectors(arms, size, evidence.main_ratio, folder / "selectors.png")
        arm_figures.budget_sweep(arms, size, folder / "budget_sweep.png")
        arm_figures.support_sizes(arms, evidence.main_ratio, folder / "support_sizes.png")
    for name, table in tables.items():
        csv = table.to_csv(index=False, float_format="%.6g")
        atomic_write_text(folder / f"table_{name}.csv", csv, setting="--out")
    atomic_write_text(folder / "facts.md", facts(evidence), setting="--out")
    return tables


def page_blocks(evidence: Evidence, tables: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Returns Markdown by the name of the block that it fills in a page."""
    blocks = {name: markdown(table) for name, table in tables.items() if name not in ("interventions", "robustness")}
    if (size := evidence.arms_support_size) is not None:
        arms, ratio = tables["interventions"], evidence.main_ratio
        main = rows(arms, k=size, ratio=(ratio, 1.0)).sort_values("gain", ascending=False)
        columns = ["rule", "kept_share", "gain", "low", "high", "seed_sd", "gain_per_keep", "over_random", "over_low"]
        blocks["selectors"] = markdown(main.filter([*columns, "over_high", "q3_share"]))
        swept = rows(arms, k=size).query("ratio < 1").pivot_table(index="rule", columns="ratio", values="gain")
        swept = swept.sort_values(ratio, ascending=False).rename(columns=lambda tried: f"{100 * tried:g} %")
        blocks["budgets"] = markdown(swept.reset_index())
        by_size = arm_tables.by_support_size(arms, ratio).pivot_table(index="rule", columns="k", values="gain")
        blocks["support_sizes"] = markdown(by_size.rename(columns="K = {}".format).reset_index())
    blocks["facts"] = facts(evidence)
    counts = tables["claims"]["verdict"].value_counts().to_dict()
    blocks["verdicts"] = (
        "; ".join(f"{verdict}: {count}" for verdict, count in counts.items()) + f" of {len(tables['claims'])}.\n"
    )
    return blocks


def facts(evidence: Evidence) -> str:
    """Returns what the numbers rest on, one line each."""
    manifest = evidence.bank.manifest
    sampling = manifest.get("sampling")
    sampled = (
        f"temperature {sampling['temperature']}, top-p {sampling['top_p']}, seed {manifest['seed']}"
        if sampling
        else "how they were sampled is not known"
    )
    lines = [
        f"- Bank: {manifest['num_contexts']} contexts of {int(evidence.bank.prompts.max()) + 1} prompts, "
        f"{manifest['num_tokens']} tokens; {sampled}.",
        f"- Start: {evidence.start.about['checkpoint']}. Checkpoints after it: {', '.join(evidence.gains)}; "
        f"{evidence.resamples} resamples of prompts, seed {evidence.seed}.",
    ]
    if evidence.arms:
        seconds = sum(result.cpu_seconds for result in evidence.arms)
        first = evidence.arms[0]
        lines.append(
            f"- Arms: {len(evidence.arms)}, mainly at K = {first.arm.support_size} and {100 * evidence.main_ratio:g} % "
            f"of the tokens; {len(first.trained_contexts)} contexts trained on and {len(first.contexts)} measured on "
            f"in each; {seconds / 60:.1f} minutes of CPU."
        )
    lines += [f"- Note: {sentence}." for sentence in evidence.caveats()]
    lacking = [
        metric for metric in arm_tables.MEANS.values() if any(metric not in result.metrics for result in evidence.arms)
    ]
    if lacking:
        lines.append(f"- Note: not every arm recorded {', '.join(lacking)}: not available in the tables.")
    return "\n".join(lines) + "\n"


def fill_page(page: Path, blocks: dict[str, str], figures: Path) -> None:
    """Puts the blocks between the page's markers, and copies the figures (PNG, CSV) to a folder named after the page.

    Markers without a block keep their content.

    Raises:
        InputError: the page cannot be read, or has no marker. OutputError: it cannot be written.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page}: expected a page to fill, cannot read it: {error.strerror}") from error
    if not _MARK.search(text):
        raise InputError(f"{page}: expected markers `<!-- begin NAME -->` and `<!-- end NAME -->`, found none")
    filled = _MARK.sub(
        lambda found: found[1] + blocks.get(found[2], found[0][len(found[1]) : -len(found[3])]) + found[3], text
    )
    target = page.with_suffix("")
    with output_errors(target, setting="--page"):
        target.mkdir(exist_ok=True)
        for path in sorted([*figures.glob("*.png"), *figures.glob("*.csv")]):
            shutil.copyfile(path, target / path.name)
    atomic_write_text(page, filled, setting="--page")


def markdown(table: pd.DataFrame) -> str:
    """Returns a Markdown table with numbers to three decimals, small ones to two digits."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join("| " + " | ".join(_cell(value) for value in row) + " |\n" for row in rows)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "n/a"
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
    return str(value).replace("|", "\\|")
