"""The study's gains and verdicts as docs/near_pair_study.md shows them, from the tables of `diagnose report`.

    python examples/near_pair_study/verdicts.py docs/near_pair_study

The folder is STUDY/tables of run.sh, or a copy of it; pairs that were not run on both sources are left out.
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


def pairs_run(folder: Path) -> list[str]:
    """Returns the pairs that have tables of both sources."""
    return [pair for pair in PAIRS if all((folder / f"{pair}_{source}_{RATE}").is_dir() for source in SOURCES)]


def read_table(folder: Path, pair: str, source: str, name: str) -> list[dict[str, str]]:
    """Returns the rows of a pair's and source's table_NAME.csv."""
    with (folder / f"{pair}_{source}_{RATE}" / f"table_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_claims(folder: Path, pair: str, source: str) -> dict[str, Claim]:
    """Returns the rows of a pair's and source's table_claims.csv by their claim."""
    return {row["claim"]: row for row in read_table(folder, pair, source, "claims")}


def gains(folder: Path, pair: str) -> str:
    """Returns a pair's gains in Markdown: a row for each rule, the best on the first source first."""
    found = {
        (source, row["rule"], row["ratio"]): row
        for source in SOURCES
        for row in read_table(folder, pair, source, "interventions")
    }
    columns = [(source, ratio) for ratio in RATIOS for source in SOURCES]
    rules = {rule for _, rule, _ in found} - {"full"}
    ordered = sorted(rules, key=lambda rule: -float(found[SOURCES[0], rule, RATIOS[0]]["gain"]))
    lines = [
        "| rule | " + " | ".join(f"{source}, {100 * float(ratio):g} %" for source, ratio in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        "| all tokens | " + " | ".join(_gain(found[source, "full", "1"]) for source in SOURCES) + " | | |",
    ]
    for rule in ordered:
        cells = [_gain(found[source, rule, ratio]) for source, ratio in columns]
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(row: dict[str, str]) -> str:
    gain, low, high = (f"{float(row[name]):.4f}" for name in ("gain", "low", "high"))
    return f"{gain} [{low}, {high}]" + ("" if int(row["seeds"]) == NUM_SEEDS else f", {row['seeds']} seeds")


def regime_verdict(claims: list[Claim]) -> str:
    """Returns whether a claim holds in a regime, given its rows of all sources."""
    verdicts = {claim["verdict"] for claim in claims}
    if verdicts - {"agrees", "disagrees", "undecided"}:
        return "not run"
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


def table(folder: Path) -> str:
    """Returns the table in Markdown: a row for each claim, and for each pair that was run its sources and verdict."""
    pairs = pairs_run(folder)
    found = {pair: [read_claims(folder, pair, source) for source in SOURCES] for pair in pairs}
    header = ["claim", *(f"{pair}: {name}" for pair in pairs for name in (*SOURCES, "verdict"))]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for claim in found[pairs[0]][0]:
        cells = [claim]
        for pair in pairs:
            rows = [claims[claim] for claims in found[pair]]
            cells += [*map(cell, rows), f"**{regime_verdict(rows)}**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    tables = Path(sys.argv[1])
    if not pairs_run(tables):
        sys.exit(f"{tables}: expected near_arithmetic_{RATE}/ and near_english_{RATE}/, or another pair's, found none")
    print(table(tables))
    for one in pairs_run(tables):
        print(f"\nGains of the {one} pair, nats per token:\n\n{gains(tables, one)}")
