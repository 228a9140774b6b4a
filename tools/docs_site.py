"""The documentation site's source: the repository's pages as they are, and a reference that the code writes.

python tools/docs_site.py TARGET        `make docs` then builds the site from TARGET
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from megatron_tip.cli import app
from megatron_tip.config.keys import keys_of, sections
from megatron_tip.observability.metric_reference import METRICS
from megatron_tip.selection import RULES, Rule
from megatron_tip.statistics import STATISTICS

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "examples/**/*.md", "slurm/*.md")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def main(target: Annotated[Path, typer.Argument(help="Folder to create; replaced if it exists.")]) -> None:
    """Write the site's source."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            copy = target / page.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_with_files(page, target), encoding="utf-8")
    reference = target / "reference"
    reference.mkdir()
    for name, lines in (
        ("keys", _keys()),
        ("commands", _commands()),
        ("rules", _rules()),
        ("statistics", _statistics()),
        ("metrics", _metrics()),
    ):
        (reference / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _with_files(page: Path, target: Path) -> str:
    """Returns the page's text, with links to folders as links to their README; copies the files that it links to."""

    def found(match: re.Match[str]) -> str:
        begin, link, end = match.groups()
        path = (page.parent / link).resolve()
        if "://" in link or not path.is_relative_to(ROOT):
            return match[0]
        if (path / "README.md").exists():
            return f"{begin}{link.rstrip('/')}/README.md{end}"
        if path.is_file() and path.suffix != ".md":
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        return match[0]

    return _LINK.sub(found, page.read_text(encoding="utf-8"))


def _keys() -> Iterator[str]:
    yield "# Keys of a configuration"
    yield "\nEach is a line of the TOML, or `section.key=value` on the command line."
    for name, section in sections().items():
        yield f"\n## [{name}]\n\n{section.__doc__}\n\n| Key | Accepts | Default | Meaning |\n|---|---|---|---|"
        for key in keys_of(name):
            accepts, default = key.expected.replace("|", "\\|"), key.default.removeprefix("default ")
            meaning = " ".join(key.description.split()).replace("|", "\\|")
            yield f"| `{key.short_name}` | {accepts} | {default} | {meaning} |"


def _commands() -> Iterator[str]:
    yield "# Commands"
    root = get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts = getattr(command, "commands", {})
        for words, part in {name: command, **{f"{name} {inner}": part for inner, part in parts.items()}}.items():
            context = part.context_class(part, info_name=f"megatron-tip {words}", max_content_width=100)
            text = part.get_help(context).partition("\nKeys of CONFIG.toml")[0]
            yield f"\n## megatron-tip {words}\n\n```text\n{text.strip()}\n```"


def _rules() -> Iterator[str]:
    yield "# Rules"
    yield "\nValues of `selection.rule`. Equations and sources: [Token selection](../docs/selection.md)."
    yield "\n| Rule | Takes | Of the score of | Weighs by | Budget's scope |\n|---|---|---|---|---|"
    yield from (_rule(rule) for rule in RULES.values())


def _rule(rule: Rule) -> str:
    statistics = ", ".join(f"`{item.statistic}`" for item in rule.inputs) or "nothing"
    weights = ", ".join(f"`{weight.function.__name__}`" for weight in rule.weights) or "nothing"
    return f"| `{rule.name}` | {rule.take} | {statistics} | {weights} | {rule.scope} |"


def _statistics() -> Iterator[str]:
    yield "# Statistics of a token"
    yield "\nWhat rules can use, and what views and reports show."
    yield "\n| Statistic | Symbol | Meaning |\n|---|---|---|"
    for name, one in STATISTICS.items():
        yield f"| `{name}` | {one.symbol.replace('|', chr(92) + '|')} | {one.meaning.replace('|', chr(92) + '|')} |"


def _metrics() -> Iterator[str]:
    yield "# Metrics"
    yield "\nOf each step, in `metrics.jsonl` and in every tracker. Which of them a run has depends on its settings."
    area = ""
    for metric in METRICS:
        if (own := metric.name.partition("/")[0]) != area:
            area = own
            yield f"\n## {area}\n\n| Metric | Unit | Meaning |\n|---|---|---|"
        yield f"| `{metric.name}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    typer.run(main)
