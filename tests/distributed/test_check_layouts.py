"""The table of layouts that the command prints."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.check_layouts import DENSE, MIXED, FirstStep, check, row_of

SINGLE = FirstStep(0.5, 2.0, frozenset({(0, 1), (2, 3)}), ("tp 1", "tp 2"))


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"loss": 0.5 * (1 + 1e-7)}, "| dense | tp 1 | tp 2 | 1e-07 | 0e+00 | 0 | same |"),
        ({"loss": 0.5 * (1 + 1e-4)}, "| dense | tp 1 | tp 2 | 1e-04 | 0e+00 | 0 | DIFFERENT |"),
        ({"grad_norm": 1.0}, "| dense | tp 1 | tp 2 | 0e+00 | 5e-01 | 0 | DIFFERENT |"),
        ({"selected": frozenset({(0, 1), (2, 4)})}, "| dense | tp 1 | tp 2 | 0e+00 | 0e+00 | 2 | DIFFERENT |"),
        ({"grad_norm": float("nan")}, "| dense | tp 1 | tp 2 | 0e+00 | nan | 0 | DIFFERENT |"),
    ],
)
def test_a_row_says_how_far_a_layout_is_from_one_process(changed: dict, expected: str):
    row, is_same = row_of("dense", replace(SINGLE, **changed), SINGLE)
    assert row == expected
    assert is_same == expected.endswith(" same |")


def test_a_layout_in_parts_is_checked_against_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    only = str(next(case for case in DENSE if case.student and not case.teacher))
    assert check(["dense"], only, 2, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| dense | tp 1 x pp 1 x cp 2 x dp 1 | tp 1 x pp 1 x dp 2 |")
    assert len(lines) == 3


def test_a_dense_student_and_a_teacher_with_experts_in_another_layout_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    only = str(next(case for case in MIXED if case.student and case.world_size == 2))
    assert check(["mixed"], only, 2, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    teacher = "tp 1 x pp 1 x dp 2 (experts tp 1 x ep 2 x dp 1)"
    assert lines[2].startswith(f"| mixed | tp 2 x pp 1 x dp 1 | {teacher} |")
    assert len(lines) == 3
