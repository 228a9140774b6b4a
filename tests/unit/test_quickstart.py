"""The quickstart's questions are those that its script makes, and no held-out country is trained on."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart_cpu"
script = SimpleNamespace(**runpy.run_path(str(EXAMPLE / "make_questions.py")))


def test_the_questions_are_those_of_the_script():
    assert (EXAMPLE / "capitals.jsonl").read_text(encoding="utf-8") == script.questions(script.read_countries())


def test_no_held_out_country_is_trained_on():
    lines = [json.loads(line) for line in (EXAMPLE / "capitals.jsonl").read_text(encoding="utf-8").splitlines()]
    training, held_out = lines[: -script.NUM_HELD_OUT], lines[-script.NUM_HELD_OUT :]
    knows = {row["capital"] for row in script.read_countries() if row["teacher_knows"] == "yes"}
    assert {line["answer"] for line in held_out} <= knows
    assert {line["answer"] for line in held_out}.isdisjoint(line["answer"] for line in training)
    assert len(lines) == len({line["prompt"] for line in lines}) == 3 * 98 + 48
