"""What tools/check_gpu.py makes of its checks: the whole runs in tests/integration/test_check_gpu.py."""

from dataclasses import replace
from importlib.metadata import distributions
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_tip import __version__
from tools.gpu_checks import run
from tools.gpu_checks.checks import CHECKS, Check
from tools.gpu_checks.gpu_tests import ROOT, marked_files, run_pytest
from tools.gpu_checks.run import Outcome, run_checks
from tools.gpu_checks.summary import table_of
from tools.gpu_checks.task import Found, Task
from tools.gpu_checks.wheels import NEEDED, PINS, describe_package, install, pinned

MACHINE = CHECKS[0]


def test_what_a_check_found_survives_its_end(tmp_path: Path):
    task = Task("cpu", tmp_path)
    assert task.found() == Found()
    task.note(ms={"one": 1.0}, name="a")
    task.note(ms={"two": 2.0})
    task.require(True, "holds")
    task.require(False, "does not hold")
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('["values", {"cut')  # killed while it wrote
    assert task.found() == Found({"ms": {"one": 1.0, "two": 2.0}, "name": "a"}, ["does not hold"])


@pytest.mark.parametrize(
    "found, code, status",
    [
        (Found(is_whole=True), 0, "passed"),
        (Found(is_whole=True, failures=["no"]), 0, "failed"),
        (Found(failures=["no"]), None, "failed"),
        (Found(), None, "timed out"),
        (Found(), 1, "error"),
        (Found(), 0, "error"),
    ],
)
def test_how_a_check_ended(found: Found, code: int | None, status: str):
    assert run._status(found, code) == status


@pytest.mark.parametrize("status, is_bad", [("passed", False), ("skipped", False), ("not run", True), ("error", True)])
def test_what_is_not_shown_to_be_right_is_bad_unless_it_only_measures(status: run.Status, is_bad: bool):
    outcome = Outcome("a", status, 1.0, True, {}, [])
    assert outcome.is_bad == is_bad
    assert not replace(outcome, proves=False).is_bad


def test_a_check_has_its_own_limit_and_one_without_time_is_not_run():
    hurried = replace(MACHINE, seconds=0.3)
    needs_gpu = Check("other", "other:nothing", 60, "nothing", needs_gpu="a CPU cannot")
    first, second = run_checks([hurried, needs_gpu], "cpu", 60)
    assert (first.status, first.why) == ("timed out", f"limit {0.3 * run._PATIENCE_ON_CPU:.0f} s")
    assert (second.status, second.why) == ("skipped", "a CPU cannot")
    (late,) = run_checks([MACHINE], "cpu", 0.0)
    assert (late.status, late.why) == ("not run", "0 s are left")


def test_a_check_that_raises_is_an_error_with_the_end_of_its_log():
    (outcome,) = run_checks([Check("unknown", "unknown:unknown", 60, "is not in the table")], "cpu", 60)
    assert outcome.status == "error"
    assert "ValueError" in outcome.log


def test_every_check_has_a_function_and_a_place_in_the_docs():
    text = (ROOT / "docs/gpu_check.md").read_text()
    for check in CHECKS:
        module, function = check.place.split(":")
        assert f"def {function}(task: Task)" in (ROOT / f"tools/gpu_checks/{module}.py").read_text()
        assert f"| `{check.name}` |" in text


def test_the_table_shows_what_failed():
    outcomes = [
        Outcome("loss", "failed", 3.0, True, {"kl": {"eager": {"ms": 1.23456}}}, ["off by [1e-1]"], log="a\nlast line"),
        Outcome("late", "not run", 0.0, False, {}, [], why="3 s are left"),
    ]
    console = Console(width=100, record=True, file=StringIO())
    console.print(table_of(outcomes))
    text = console.export_text()
    for part in ("off by [1e-1]", "last line", "kl, eager: ms 1.23", "3 s are left", "(measures)"):
        assert part in text


def test_what_came_of_tests_is_read_from_their_report(tmp_path: Path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip\ndef test_not(): pass\n"
    )
    results = run_pytest([file], [], tmp_path / "results.xml")
    assert (results.passed, results.skipped) == (1, 1)
    (failed,) = results.failed
    assert "test_bad" in failed
    assert "no" in failed


def test_the_files_of_marked_tests_are_found():
    found = {str(path.relative_to(ROOT / "tests")) for path in marked_files(ROOT / "tests")}
    gpu = {f"unit/{room}/test_on_gpu.py" for room in ("vocab_parallel", "models", "rollout/handover")}
    assert gpu | {"distributed/test_one_device.py"} <= found
    assert not any("sglang" in name or "report" in name for name in found), "they import what the machine lacks"


def test_wheels_are_those_that_the_requirements_pin(tmp_path: Path):
    assert len(pinned(PINS.read_text())) == len(NEEDED)
    with pytest.raises(FileNotFoundError, match="--collect-wheels"):
        install(tmp_path, tmp_path / "site")


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path):
    describe_package(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("megatron_tip", __version__)
