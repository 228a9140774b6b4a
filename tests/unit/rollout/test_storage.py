import json

import pytest

from megatron_tip.errors import InputError, OutputError
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.storage import read_rollouts, rollout_file, write_rollouts

PROMPTS = [Prompt(3, "2 + 2 = \u2192 é", (1, 2, 3)), Prompt(4, "", (9,))]
ROLLOUTS = [
    Rollout(3, 0, (1, 2, 3), (4, 5), (-0.10000000149011612, -1 / 3), "stop", 7),
    Rollout(3, 1, (1, 2, 3), (), (), "length", 7),
    Rollout(4, 0, (9,), (8, 7, 6, 5, 4, 3), (-0.5, 0.0, 0.0, -1.0, 0.0, -2.0), "turns", 6, ((1, 3), (4, 5))),
]


def test_a_file_gives_back_what_was_written(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    write_rollouts(folder, "step_000001", ROLLOUTS, PROMPTS)
    path = folder / "step_000001.jsonl"
    assert rollout_file(folder, "step_000001") == path
    assert read_rollouts(path) == ROLLOUTS
    assert [json.loads(line)["prompt_text"] for line in path.read_text().splitlines()] == ["2 + 2 = \u2192 é"] * 2 + [
        ""
    ]
    assert list(folder.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize("missing_bytes", [1, 2, 40])
def test_a_file_that_was_cut_off_is_named_with_the_line(tmp_path, missing_bytes):
    write_rollouts(tmp_path, "step_000001", ROLLOUTS, PROMPTS)
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(InputError, match=r"step_000001\.jsonl, line 3: .*cut off"):
        read_rollouts(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response_ids": [4, 5, 6]}, "2 logprobs for 3 response ids"),
        ({"response_ids": [4, "5"]}, r"response_ids is \[4, '5'\], not a list of int"),
        ({"prompt_index": True}, "prompt_index is True, not of type int"),
        ({"weight_version": None}, "weight_version is None, not of type int"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        (
            {"response_ids": [4, 2**63]},
            "response_ids has 4 to 9223372036854775808, which is outside the range",
        ),
        ({"prompt_ids": [-(2**63) - 1]}, "prompt_ids has -9223372036854775809 to .* outside the range of int64"),
        ({"prompt_index": 2**63}, "prompt_index is 9223372036854775808, not of type int within int64"),
        ({"environment_spans": [[0, 2**63]]}, r"environment_spans is .*, not a list of \[start, end\]"),
        ({"environment_spans": [1, 2]}, r"environment_spans is \[1, 2\], not a list of \[start, end\]"),
        ({"environment_spans": [[0, 1]]}, "with generated ids before, between and after them"),
        ({"environment_spans": [[1, 2]]}, "within 2 response ids"),
        ({"environment_spans": [[1, 1]]}, "ranges in order"),
    ],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path, changes, message):
    write_rollouts(tmp_path, "step_000001", ROLLOUTS, PROMPTS)
    path = tmp_path / "step_000001.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | changes)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        read_rollouts(path)


def test_a_line_from_before_there_were_environments_is_read(tmp_path):
    write_rollouts(tmp_path, "step_000001", ROLLOUTS[:1], PROMPTS)
    path = tmp_path / "step_000001.jsonl"
    record = json.loads(path.read_text())
    del record["environment_spans"]
    path.write_text(json.dumps(record) + "\n")
    assert read_rollouts(path) == ROLLOUTS[:1]


def test_files_and_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: .*No such file"):
        read_rollouts(tmp_path / "nowhere.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"step_000001\.jsonl: cannot write"):
        write_rollouts(tmp_path / "file", "step_000001", ROLLOUTS, PROMPTS)
