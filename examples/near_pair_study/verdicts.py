"""The study's gains and verdicts as docs/near_pair_study.md shows them, from the tables of `diagnose report`.

    python examples/near_pair_study/verdicts.py docs/near_pair_study

The folder has PAIR_SOURCE/table_claims.csv and table_interventions.csv for each pair and source that was run.
"""

import csv
import sys
from pathlib import Path

PAIRS = ("far", "healed", "near")
SOURCES = ("arithmetic", "english")
NUM_SEEDS = 8

RATIOS = ("0.05", "0.1")

Claim = dict[str, str]


def read_table(folder: Path, name: str) -> list[dict[str, str]]:
    """Returns the rows of a folder's table_NAME.csv."""
    with (folder / f"table_{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_claims(folder: Path) -> dict[str, Claim]:
    """Returns the rows of a folder's table_claims.csv by their claim."""
    return {row["claim"]: row for row in read_table(folder, "claims")}


def gains(folder: Path, pair: str) -> str:
    """Returns a pair's gains in Markdown: a row for each rule, the best on the first source first."""
    found = {
        (source, row["rule"], row["ratio"]): row
        for source in SOURCES
        for row in read_table(folder / f"{pair}_{source}", "interventions")
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
    pairs = [pair for pair in PAIRS if all((folder / f"{pair}_{source}").is_dir() for source in SOURCES)]
    found = {pair: [read_claims(folder / f"{pair}_{source}") for source in SOURCES] for pair in pairs}
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
    print(table(Path(sys.argv[1])))
    for one in PAIRS:
        if all((Path(sys.argv[1]) / f"{one}_{source}").is_dir() for source in SOURCES):
            print(f"\nGains of the {one} pair, nats per token:\n\n{gains(Path(sys.argv[1]), one)}")
