"""Sweeps: their runs, what is left of them, the command's way with failures, and the page over seeds."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

from megatron_tip.commands import report, submit, sweep
from megatron_tip.commands.sweep_runs import load_sweep, runs_of, unfinished
from megatron_tip.config.io import dump_config
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.report.sweep_data import read_sweep, sweep_file, write_sweep
from megatron_tip.report.sweep_page import write_sweep_page

RUN = """
[run]
folder = "unused"
[model]
path = "models/student"
[teacher]
path = "models/teacher"
[prompts]
path = "prompts.jsonl"
[training]
steps = 3
"""
SWEEP = """
config = "run.toml"
folder = "sweep"
rules = ["random", "iw_opd", "tsd_kd"]
budgets = [0.05, 0.1]
seeds = [1, 2]
overrides = ["training.steps=7"]
[overrides_of]
tsd_kd = ["loss.divergence=jsd"]
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return tmp_path / "sweep.toml"


def finish(folder: Path, after: float, *, config: str = "") -> None:
    folder.mkdir(parents=True)
    summary = {"heldout_reverse_kl": {"before": 2.0, "after": after}, "retention_ratio": {"got": 0.05}}
    (folder / "summary.json").write_text(json.dumps(summary | {"seconds": {"total": 10.0}}))
    (folder / "config.toml").write_text(config)


def test_runs_are_rules_by_budgets_by_seeds(path: Path):
    runs = runs_of(load_sweep(path))
    of_seed = ["random-0.05", "random-0.1", "iw_opd-1", "tsd_kd-1"]
    assert [run.entry.name for run in runs] == [f"{name}-seed{seed}" for seed in (1, 2) for name in of_seed]
    config = runs[7].config()
    assert (config.selection.rule, config.selection.retention_ratio, config.run.seed) == ("tsd_kd", 1.0, 2)
    assert (config.loss.divergence, config.training.steps) == ("jsd", 7)
    assert config.run.folder == Path("sweep/tsd_kd-1-seed2")
    assert runs[1].config().loss.divergence == "reverse_kl"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds = [1, 2]", "", r"expected config, folder, .*\n  seeds: Field required"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "random-0.05-seed1.* twice"),
        (
            "budgets = [0.05, 0.1]",
            "budgets = [0.05, 2.0]",
            r"(?s)random-2-seed1: .*retention_ratio .*expected",
        ),
        ("tsd_kd = [", "eopd = [", "overrides_of: expected rules of the sweep, got eopd"),
        ('"training.steps=7"', '"training.stops=7"', "(?s)random-0.05-seed1: .*did you mean training.steps"),
        ('["loss.divergence=jsd"]', "[]", 'tsd_kd-1-seed1: loss.divergence: expected "jsd"'),
        ("seeds", "seeds = ", "expected TOML, got a syntax error"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(path: Path, old: str, new: str, message: str):
    path.write_text(SWEEP.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        unfinished(runs_of(load_sweep(path)))


def test_finished_runs_are_skipped_unless_they_are_others(path: Path):
    runs = runs_of(load_sweep(path))
    assert unfinished(runs) == list(range(8))
    finish(Path("sweep") / runs[3].entry.name, 1.0, config=dump_config(runs[3].config()))
    assert unfinished(runs) == [0, 1, 2, 4, 5, 6, 7]
    path.write_text(SWEEP.replace("steps=7", "steps=8"))
    with pytest.raises(ConfigError, match="tsd_kd-1-seed1: expected the run that the sweep asks for"):
        unfinished(runs_of(load_sweep(path)))


def test_one_run_is_printed_for_a_task_of_an_array(path: Path, capsys: pytest.CaptureFixture[str]):
    sweep.command(path, run=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run.toml"
    assert "loss.divergence=jsd" in lines
    assert lines[-1] == "run.folder=sweep/tsd_kd-1-seed1"
    with pytest.raises(SystemExit):
        sweep.command(path, run=8)
    assert "--run: expected at most 7, got 8" in capsys.readouterr().err


def test_an_array_has_the_unfinished_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    runs = runs_of(load_sweep(path))
    finish(Path("sweep") / runs[0].entry.name, 1.0, config=dump_config(runs[0].config()))
    monkeypatch.setattr("megatron_tip.commands.sweep.train.check_elsewhere", lambda *_: None)
    sweep.command(path, submit=True, nodes=2, gpus_per_node=8, sbatch=["--qos=high"], dry_run=True)
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == ["mkdir", "-p", f"{Path.cwd()}/sweep/slurm", "&&", "sbatch"]
    assert {"--nodes=2", "--array=1,2,3,4,5,6,7", "--qos=high"} <= set(words)
    assert f"--output={Path.cwd()}/sweep/slurm/%A_%a.out" in words
    assert words[-2:] == [str(Path(submit.__file__).parents[2] / "slurm/sweep.sbatch"), str(path)]
    assert not sweep_file(Path("sweep")).exists()
    with pytest.raises(SystemExit):
        submit.command(path, script="sweep")
    assert "a sweep is `megatron-tip sweep --submit`" in capsys.readouterr().err


def fake_train(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `sweep` start this program in place of the interpreter; it sees the arguments of python."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\nname = sys.argv[-1]\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_run_that_fails_does_not_end_the_others(path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    fake_train(path.parent, "open('ran', 'a').write(name + '\\n')\nsys.exit(3 * ('iw_opd' in name))", monkeypatch)
    with pytest.raises(SystemExit) as caught:
        sweep.command(path)
    assert caught.value.code == 1
    assert "2 of 8 runs failed: iw_opd-1-seed1 (exit code 3), iw_opd-1-seed2 (exit code 3)" in capsys.readouterr().err
    ran = Path("ran").read_text().splitlines()
    assert ran == [f"run.folder=sweep/{run.entry.name}" for run in runs_of(load_sweep(path))]
    assert len(json.loads(sweep_file(Path("sweep")).read_text())["runs"]) == 8


def test_a_signal_reaches_the_run_once_and_ends_the_sweep(path: Path, monkeypatch: pytest.MonkeyPatch):
    body = (
        "def saved(*_):\n    open('got', 'a').write('x')\n    time.sleep(0.2)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, saved)\nopen('ready', 'w').close()\ntime.sleep(60)"
    )
    fake_train(path.parent, body, monkeypatch)
    script = (
        "import sys; from megatron_tip.commands import sweep; from pathlib import Path; "
        f"sys.executable = {sys.executable!r}; sweep.command(Path({str(path)!r}))"
    )
    command = [os.path.realpath("/proc/self/exe"), "-c", script]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not Path("ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert Path("got").read_text() == "x"


def sweep_with_results(path: Path) -> Path:
    runs = runs_of(load_sweep(path))
    write_sweep(Path("sweep"), [run.entry for run in runs])
    results = {"random-0.05-seed1": 1.0, "random-0.05-seed2": 1.4, "iw_opd-1-seed1": 0.9}
    for name, after in results.items():
        finish(Path("sweep") / name, after)
    return Path("sweep")


def test_the_report_shows_intervals_over_seeds(path: Path):
    folder = sweep_with_results(path)
    arms = read_sweep(folder)
    assert [(arm.rule, arm.budget) for arm in arms[:2]] == [("iw_opd", 1.0), ("random", 0.05)]
    mean, half = arms[1].interval("heldout_reverse_kl", "after")
    assert mean == pytest.approx(1.2)
    assert half == pytest.approx(stats.t.ppf(0.975, 1) * 0.2)
    assert (arms[0].missing, arms[1].missing) == ([2], [])
    report.command([folder])
    page = (folder / "sweep.html").read_text()
    assert "1.2000 ± 2.5412" in page
    assert "<td>0.9000</td>" in page
    assert '<a href="iw_opd-1-seed1/report.png">1</a> missing: 2</td>' in page
    report.command([folder], output=Path("pages/sweep.html"))
    assert '<a href="../sweep/iw_opd-1-seed1/report.png">1</a>' in Path("pages/sweep.html").read_text()
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["rule"] for row in rows] == ["iw_opd", "random", "random", "tsd_kd"]
    assert float(rows[1]["heldout_after_half"]) == pytest.approx(half)
    assert rows[0]["heldout_after_half"] == rows[3]["heldout_after_mean"] == ""


def test_a_sweep_that_cannot_be_read_is_refused(path: Path):
    with pytest.raises(InputError, match="expected the runs of a sweep, cannot read them"):
        read_sweep(Path("sweep"))
    write_sweep(Path("sweep"), [])
    with pytest.raises(InputError, match="expected a sweep with a finished run, got 0 arms"):
        write_sweep_page(Path("sweep"), Path("page.html"))
    sweep_file(Path("sweep")).write_text('{"format": "other"}')
    with pytest.raises(InputError, match="the format 'other'"):
        read_sweep(Path("sweep"))
