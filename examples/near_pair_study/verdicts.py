"""The study's gains and verdicts as docs/near_pair_study.md shows them, from the tables of `diagnose report`.

    python examples/near_pair_study/verdicts.py docs/near_pair_study

The folder is STUDY/tables of run.sh, or a copy of it; pairs and sources that were not run are left out.
"""

import csv
import sys
from pathlib import Path

PAIRS = ("far", "healed", "near")
SOURCES = ("arithmetic", "english")
RATE = "1e-5"
RATIOS = ("0.05", "0.1")
NUM_SEEDS = 8

Claim = dict[str, str]


def sources_run(folder: Path, pair: str) -> list[str]:
    """Returns the prompt sources of which a pair has tables."""
    return [source for source in SOURCES if (folder / f"{pair}_{source}_{RATE}").is_dir()]


def pairs_run(folder: Path) -> list[str]:
    """Returns the pairs that have tables."""
    return [pair for pair in PAIRS if sources_run(folder, pair)]


def read_table(folder: Path, pair: str, source: str, name: str) -> list[dict[str, str]]:
    """Returns the rows of a pair's and source's table_NAME.csv."""
    with (folder / f"{pair}_{source}_{RATE}" / f"table_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_claims(folder: Path, pair: str, source: str) -> dict[str, Claim]:
    """Returns the rows of a pair's and source's table_claims.csv by their claim."""
    return {row["claim"]: row for row in read_table(folder, pair, source, "claims")}


def gains(folder: Path, pair: str) -> str:
    """Returns a pair's gains in Markdown: a row for each rule, the best on the first source first."""
    sources = sources_run(folder, pair)
    found = {
        (source, row["rule"], row["ratio"]): row
        for source in sources
        for row in read_table(folder, pair, source, "interventions")
    }
    rules = {rule for _, rule, ratio in found if ratio == RATIOS[0]}
    columns = [
        (source, ratio)
        for ratio in RATIOS
        for source in sources
        if all((source, rule, ratio) in found for rule in rules)
    ]
    ordered = sorted(rules, key=lambda rule: (-float(found[sources[0], rule, RATIOS[0]]["gain"]), rule))
    everything = [_gain(found[source, "full", "1"]) if ratio == RATIOS[0] else "" for source, ratio in columns]
    lines = [
        _row(["rule", *(f"{source}, {100 * float(ratio):g} %" for source, ratio in columns)]),
        "|---" * (1 + len(columns)) + "|",
        _row(["all tokens", *everything]),
    ]
    for rule in ordered:
        cells = [_gain(found[source, rule, ratio]) for source, ratio in columns]
        lines.append(_row([f"`{rule}`", *cells]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _gain(row: dict[str, str]) -> str:
    gain, low, high = (f"{float(row[name]):.4f}" for name in ("gain", "low", "high"))
    return f"{gain} [{low}, {high}]" + ("" if int(row["seeds"]) == NUM_SEEDS else f", {row['seeds']} seeds")


def regime_verdict(claims: list[Claim]) -> str:
    """Returns whether a claim holds in a regime, given its rows of all sources."""
    verdicts = {claim["verdict"] for claim in claims}
    if verdicts - {"agrees", "disagrees", "undecided"}:
        return "not run"
    if len(claims) < len(SOURCES):
        return "one source alone"
    return {frozenset({"agrees"}): "holds", frozenset({"disagrees"}): "fails"}.get(frozenset(verdicts), "undecided")


def cell(claim: Claim) -> str:
    """Returns a claim's difference with its interval, p, seeds if some are missing, and verdict."""
    if not claim["difference"]:
        return claim["verdict"]
    low, high = (f"{float(claim[name]):+.4f}" for name in ("low", "high"))
    text = f"{float(claim['difference']):+.4f} [{low}, {high}]"
    if claim["p_holm"]:
        text += f", p {float(claim['p_holm']):.2g}"
    seeds = len(claim["by_seed"].split())
    return f"{text}{'' if seeds == NUM_SEEDS else f', {seeds} seeds'}: {claim['verdict']}"


def summary(folder: Path) -> str:
    """Returns whether each claim holds in the regimes that were run, in Markdown."""
    pairs = pairs_run(folder)
    found = {pair: [read_claims(folder, pair, source) for source in sources_run(folder, pair)] for pair in pairs}
    lines = [_row(["claim", *pairs]), "|---" * (1 + len(pairs)) + "|"]
    lines += [
        _row([claim, *(regime_verdict([rows[claim] for rows in found[pair]]) for pair in pairs)])
        for claim in found[pairs[0]][0]
    ]
    return "\n".join(lines)


def table(folder: Path, pair: str) -> str:
    """Returns a pair's differences in Markdown: a row for each claim, a column for each source that was run."""
    sources = sources_run(folder, pair)
    found = [read_claims(folder, pair, source) for source in sources]
    lines = [_row(["claim", *sources]), "|---" * (1 + len(sources)) + "|"]
    lines += [_row([claim, *(cell(rows[claim]) for rows in found)]) for claim in found[0]]
    return "\n".join(lines)


if __name__ == "__main__":
    tables = Path(sys.argv[1])
    if not pairs_run(tables):
        sys.exit(f"{tables}: expected near_arithmetic_{RATE}/ and near_english_{RATE}/, or another pair's, found none")
    print(summary(tables))
    for one in pairs_run(tables):
        print(f"\nThe {one} pair:\n\n{table(tables, one)}\n\nIts gains, nats per token:\n\n{gains(tables, one)}")
