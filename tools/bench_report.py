"""The cost of a report: three runs of 1,000 steps, 200 responses of 2,000 tokens with both models' top-16.

    python tools/bench_report.py [--responses 200] [--tokens 2000] [--megabytes 10]

Prints seconds and bytes of `megatron-tip report` in a separate process, including the interpreter's start. If Chromium
is installed, it also prints how long the page takes to open and to react to a reader's actions. The runs are random
numbers (tools/synthetic_runs.py), which compress worse than a language model's.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from synthetic_runs import write_run

STEPS = 1000
ACTIONS = """async () => {
  const milliseconds = {};
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const timed = async (name, act) => {
    await frame();
    const start = performance.now();
    await act();
    await frame();
    milliseconds[name] = Math.round(performance.now() - start);
  };
  const key = (name) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  const first = () => document.querySelector("#text span");
  document.getElementById("tokens").scrollIntoView();
  await timed("next response", async () => {
    const before = first();
    document.getElementById("response-on").click();
    while (first() === before) await new Promise((done) => setTimeout(done));
  });
  await timed("other shade", () => document.querySelector("#shade input[value=student_entropy]").click());
  await timed("filter", () => document.getElementById("filter-Q3").click());
  await timed("search", () => {
    const search = document.getElementById("search");
    search.value = "the";
    search.dispatchEvent(new Event("input"));
  });
  await timed("next by score", () => key("n"));
  const hover = new MouseEvent("mouseover", { bubbles: true });
  await timed("hover", () => document.querySelectorAll("#text span")[9].dispatchEvent(hover));
  return milliseconds;
}"""


def main(
    responses: Annotated[int, typer.Option(min=1, help="Viewed responses, all in one run.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per response.")] = 2000,
    megabytes: Annotated[float, typer.Option(help="--max-megabytes of the report.")] = 10.0,
) -> None:
    """Measure the cost of a report."""
    with tempfile.TemporaryDirectory(prefix="bench_report_") as folder:
        found = measure(Path(folder), responses, tokens, megabytes)
    for name, value in found.items():
        typer.echo(f"{name:32} {value}")


def measure(folder: Path, responses: int, tokens: int, megabytes: float) -> dict[str, Any]:
    """Returns the measurements by name; each name contains its unit."""
    runs = [folder / f"run_{place}" for place in range(3)]
    for place, run in enumerate(runs):
        views = [STEPS] if place == 0 else []
        write_run(run, steps=STEPS, seed=place, view_steps=views, responses=responses, tokens=tokens, vocab_size=50_000)
    page = folder / "report.html"
    command = [sys.executable, "-m", "megatron_tip.cli", "report", *map(str, runs), "--output", str(page)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--max-megabytes", str(megabytes)], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"report, seconds": round(seconds, 1), "report, CPU seconds": round(cpu_seconds, 1)}
    found |= {"report, MB": round(page.stat().st_size / 1e6, 2)}
    table = next((runs[0] / "views").iterdir()).stat().st_size
    return found | {"table on disk, bytes per token": round(table / responses / tokens, 1)} | in_browser(page)


def in_browser(page: Path) -> dict[str, Any]:
    """Returns the seconds until the page is ready and the milliseconds of each action; nothing without Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return {"browser": "not installed"}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1400, "height": 900})
        start = time.perf_counter()
        opened.goto(page.as_uri())
        opened.wait_for_selector("#text span.token")
        inspector = time.perf_counter() - start
        opened.wait_for_selector("html[data-ready]", timeout=60_000)
        ready = time.perf_counter() - start
        milliseconds = opened.evaluate(ACTIONS)
        browser.close()
    seconds = {"inspector open, seconds": round(inspector, 2), "all figures, seconds": round(ready, 2)}
    return seconds | {f"{name}, ms": value for name, value in milliseconds.items()}


if __name__ == "__main__":
    typer.run(main)
