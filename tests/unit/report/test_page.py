"""What the report reads, packs and writes, without a browser."""

import base64
import json
import re
import subprocess
import sys
import unicodedata
import zlib

import numpy as np
import pytest

from megatron_tip.errors import InputError, OutputError
from megatron_tip.observability.token_table import (
    SCHEMA,
    VALUES,
    TokenTable,
    encode_token_table,
    read_token_table,
    token_table_file,
)
from megatron_tip.report import timeline
from megatron_tip.report.packing import COARSE_MISSING, MISSING, coarse, packed, planes, thousandths
from megatron_tip.report.page import write_report_page
from megatron_tip.report.run_data import differing_keys, read_runs, thinned
from megatron_tip.report.timeline import read_timeline
from megatron_tip.report.tokens import LADDER, Blocks, Detail, RunPacker, quadrants
from megatron_tip.report.visible_text import visible
from tools.synthetic_runs import write_run


def unpacked(text):
    return zlib.decompress(base64.b64decode(text))


def blocks_of(page):
    found = re.findall(r'<script type="application/octet-stream" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>', page)
    return dict(found)


def test_what_has_no_shape_is_given_one():
    assert visible("a\x00b\x1b[31m\x7f") == "a\u2400b\u241b[31m\u2421"
    assert visible("x\u202ey\u200bz\x85\ud800") == "x⟨U+202E⟩y⟨U+200B⟩z⟨U+0085⟩⟨U+D800⟩"
    assert visible("a\n\tb") == "a\n⇥\tb"
    assert visible("a\n", newlines=True) == "a↵\n"
    assert visible("é 数 <b>&") == "é 数 <b>&"


def test_nothing_of_all_unicode_stays_unseen():
    """Alone, or repeated behind a letter or a picture, where a font draws nothing of it."""
    newer_emoji = range(0x1F000, 0x1FB00)
    for code in [*range(0x3400), *range(0xA000, 0x20000), *range(0xE0000, 0xE0200), 0x50000, 0xF0000, 0x10FFFF]:
        character = chr(code)
        kind = unicodedata.category(character)
        is_selector = "VARIATION SELECTOR" in unicodedata.name(character, "")
        if character == "\n" or code in newer_emoji or not (kind[0] == "C" or kind in ("Zl", "Zp") or is_selector):
            continue
        for text in (character, f"a{character}b", f"\N{SNOWMAN}{character}{character}"):
            assert visible(text) != text, hex(code)
    for blank in "\u115f\u1160\u2800\u3164\uffa0\u034f\u17b4":
        assert visible(f"a{blank}b") == f"a⟨U+{ord(blank):04X}⟩b"


def test_a_mark_without_a_letter_gets_one():
    assert visible("\u0301a") == "◌\u0301a"
    assert visible("a\u0301") == "a\u0301"
    assert visible("\u202e\u0301 \n\u0301") == "⟨U+202E⟩◌\u0301 \n◌\u0301"


def test_ordinary_text_and_emoji_stay_as_they_are():
    ordinary = "naïve cafe\u0301 数学 हिन्दी “quoted” ≤ ∫ 3\u00a0% 👩\u200d🚀 👩🏽\u200d🚀 🏳\ufe0f\u200d🌈"
    ordinary += " ❤\ufe0f 1\ufe0f\u20e3 🇩🇪 \U0001fae8"  # the last: newer than the Unicode of Python 3.11
    assert visible(ordinary) == ordinary
    assert visible("a\u200d🚀 👩\u200d👩\u200d") == "a⟨U+200D⟩🚀 👩\u200d👩⟨U+200D⟩"
    assert visible("a\ufe0f ❤\ufe0f\ufe0f") == "a⟨U+FE0F⟩ ❤\ufe0f⟨U+FE0F⟩"


def test_planes_put_the_lowest_bytes_first():
    assert planes(np.array([0x010203, 0x0A0B0C]), 3) == bytes([0x03, 0x0C, 0x02, 0x0B, 0x01, 0x0A])
    assert unpacked(packed(b"abc")) == b"abc"


def test_thousandths_and_bytes_stand_for_their_values():
    values = np.array([0.0, 0.0004, 1.2344, 80.0, np.nan])
    assert thousandths(values).tolist() == [0, 0, 1234, 65534, MISSING]
    assert coarse(np.array([0.0005, np.nan])).tolist() == [0, COARSE_MISSING]
    many = np.exp(np.linspace(np.log(1.1e-3), np.log(60), 500))
    back = 1e-3 * 65534.0 ** ((coarse(many) - 1.0) / (COARSE_MISSING - 2))
    assert np.abs(back / many - 1).max() < 0.023


def test_long_runs_are_means_of_steps_that_have_the_metric():
    records = [{"step": step, "a": float(step), **({"b": 1.0} if step == 3 else {})} for step in range(1, 8)]
    steps, stride, columns = thinned(records, max_steps=4)
    assert (steps, stride) == ([2, 4, 6, 7], 2)
    assert columns == {"a": [1.5, 3.5, 5.5, 7.0], "b": [None, 1.0, None, None]}


def write_trace(folder, steps, phases_a_step=2):
    """Each step: phases of 1 s one after the other, with half a second of nothing between them."""
    folder.mkdir(parents=True)
    lines, now = [], 5e6
    for step in steps:
        for place in range(phases_a_step):
            name = ("rollout", "train")[place % 2]
            lines.append({"name": name, "ph": "X", "ts": now, "dur": 1e6, "pid": 0, "tid": 0})
            now += 1.5e6
        lines.append({"name": f"step {step}", "ph": "i", "s": "p", "ts": now, "pid": 0, "tid": 0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rank_00000.jsonl").write_text(text + '{"name": "rollout", "ph": "X", "ts": 1}\n{"cut o')


def test_timeline_has_the_first_and_last_whole_steps(tmp_path, monkeypatch):
    assert read_timeline(tmp_path / "nothing") == []
    write_trace(tmp_path / "few", range(4))
    few = read_timeline(tmp_path / "few")
    assert [step["step"] for step in few] == ["0", "1", "2", "3"]
    assert few[3] == {"step": "3", "phases": [["rollout", 0.0, 1.0], ["train", 1.5, 1.0]], "left_out": 0}
    write_trace(tmp_path / "many", range(100))
    monkeypatch.setattr(timeline, "_READ_BYTES", 2500)  # both ends in the middle of a step, and of a line
    many = read_timeline(tmp_path / "many")
    assert [step["step"] for step in many] == ["0", "1", "2", "97", "98", "99"]
    assert all(len(step["phases"]) == 2 for step in many)
    monkeypatch.setattr(timeline, "MOST_PHASES", 1)
    assert [(len(step["phases"]), step["left_out"]) for step in read_timeline(tmp_path / "few")] == [(1, 1)] * 4


def test_quadrants_part_above_the_medians():
    entropy, divergence = np.array([2, 2, 1, 1, np.nan]), np.array([2, 1, 2, 1, 2.0])
    assert quadrants(entropy, divergence, (1.0, 1.0)).tolist() == [1, 2, 3, 4, 0]
    assert quadrants(entropy, divergence, None).tolist() == [0] * 5


def test_runs_are_named_by_folder_and_compared_by_key(tmp_path):
    for place, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / place / "run", steps=3, seed=seed)
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.name for run in runs] == ["run", "run (2)"]
    assert differing_keys(runs) == [("run.seed", [1, 2])]


def test_a_block_holds_the_table(tmp_path):
    """Decoded here as page/decode.js does."""
    write_run(tmp_path / "run", steps=3, view_steps=[2], responses=2, tokens=17)
    table = read_token_table(token_table_file(tmp_path / "run" / "views", 2))
    blocks = Blocks()
    manifest = RunPacker([table]).pack(blocks, LADDER[0])
    view = manifest["views"][0]
    vocabulary = json.loads(unpacked(blocks.blocks[manifest["vocabulary"]]))
    data, n = unpacked(blocks.blocks[view["responses"][1]["block"]]), 17

    def take(count, width):
        nonlocal data
        part, data = data[: count * width], data[count * width :]
        parts = np.frombuffer(part, np.uint8).reshape(width, count).astype(int)
        return (parts << (8 * np.arange(width))[:, None]).sum(0)

    rows = table.tokens.slice(17, 17).to_pylist()
    places, flags = take(n, 3), take(n, 1)
    assert [vocabulary["ids"][place] for place in places] == [row["token_id"] for row in rows]
    assert [bool(flag & 1) for flag in flags] == [row["selected"] for row in rows]
    assert [bool(flag & 2) for flag in flags] == [row["valid"] for row in rows]
    for name in view["statistics"]:
        codes = take(n, 2)
        for code, row in zip(codes, rows, strict=True):
            assert (code == MISSING) == (row[name] is None)
            assert row[name] is None or abs(code / 1000 - abs(row[name])) < 6e-4
    counts = [take(n, 1), take(n, 1)]
    total = int(sum(map(sum, counts)))
    codes, shares = take(total, 1), take(total, 2)
    elsewhere = iter(take(int((codes == 255).sum()), 3))
    at, found = 0, {}
    for model in (0, 1):
        for token in range(n):
            for rank in range(counts[model][token]):
                code = codes[at]
                known = places[token] if code == 0 else found.get((0, token, code - 1))
                place = next(elsewhere) if code == 255 else known
                found[model, token, rank] = place
                name = ("student", "teacher")[model]
                assert vocabulary["ids"][place] == rows[token][f"{name}_support_ids"][rank]
                assert abs(shares[at] / 10000 - np.exp(float(rows[token][f"{name}_support_logprobs"][rank]))) < 1e-3
                at += 1
    assert total > 2 * n
    assert not data


def test_a_page_is_kept_to_its_size_with_less_detail_then_fewer_views(tmp_path):
    write_run(tmp_path / "run", steps=4, view_steps=[1, 2, 3, 4], responses=20, tokens=400, vocab_size=5000)

    def page_of(max_bytes):
        target = tmp_path / "report.html"
        written = write_report_page([tmp_path / "run"], target, max_bytes=max_bytes)
        page = target.read_text(encoding="utf-8")
        assert written == len(page.encode()) <= max_bytes
        (run,) = json.loads(unpacked(blocks_of(page)["data"]))["runs"]
        return run, written

    def characters(detail):
        RunPacker(read_runs([tmp_path / "run"])[0].tables).pack(blocks := Blocks(), detail)
        return blocks.num_characters

    whole, size = page_of(10**8)
    assert Detail(**whole["views"][0]["detail"]) == LADDER[0]
    less, _ = page_of(size - characters(LADDER[0]) + characters(LADDER[3]) + 2000)
    assert Detail(**less["views"][0]["detail"]) == LADDER[3]
    assert [view["step"] for view in less["views"]] == [1, 2, 3, 4]
    fewer, _ = page_of(size - characters(LADDER[0]) + characters(LADDER[-1]) - 5000)
    assert ([view["step"] for view in fewer["views"]], fewer["left_out"]) == ([2, 4], 2)
    with pytest.raises(InputError, match="without any view"):
        page_of(1_000_000)


def test_table_without_statistics_or_supports_is_shown_with_its_selection(tmp_path):
    write_run(tmp_path / "run", steps=2, view_steps=[1], tokens=5)
    path = token_table_file(tmp_path / "run" / "views", 1)
    table = read_token_table(path)
    plain = {name: table.tokens.column(name).combine_chunks() for name in SCHEMA.names if name not in VALUES}
    plain = {name: values for name, values in plain.items() if "support" not in name}
    path.write_bytes(encode_token_table(TokenTable.of_columns(table.facts, plain)))
    write_report_page([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (view,) = json.loads(unpacked(blocks_of(page)["data"]))["runs"][0]["views"]
    assert view["statistics"] == []
    assert view["responses"][0]["quadrants"] == [0, 0, 0, 0]


def test_the_report_needs_neither_torch_nor_a_figures_library():
    """Each takes longer to import than three runs to be read."""
    program = "import sys, megatron_tip.report.page; sys.exit(bool({'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_estimate_from_a_sample_is_near(tmp_path):
    write_run(tmp_path / "run", steps=1, view_steps=[1], responses=70, tokens=300, vocab_size=5000)
    packer = RunPacker(read_runs([tmp_path / "run"])[0].tables)
    for detail in LADDER:
        packer.pack(blocks := Blocks(), detail)
        assert packer.estimate(detail) == pytest.approx(blocks.num_characters, rel=0.05)


def test_a_page_that_cannot_be_written_asks_for_another_output(tmp_path):
    write_run(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "x.html", tmp_path / "folder"):
        with pytest.raises(OutputError, match=r"cannot write: .*; free space, or give another --output$"):
            write_report_page([tmp_path / "run"], target)


def test_what_cannot_be_read_is_named_or_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected the folder of a run, with its metrics\.jsonl"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(InputError, match="1 to 6 run folders, got 7"):
        write_report_page([tmp_path] * 7, tmp_path / "report.html")
    write_run(tmp_path / "run", steps=2, view_steps=[1, 2])
    broken = token_table_file(tmp_path / "run" / "views", 1)
    broken.write_bytes(broken.read_bytes()[:-100])
    (tmp_path / "run" / "summary.json").unlink()
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"prompt": "cut o')
    (run,) = read_runs([tmp_path / "run"])
    assert [table.facts.step for table in run.tables] == [2]
    notes = "\n".join(run.notes)
    for expected in ("views/step_000001.parquet: expected a token table", "no summary.json", "samples.jsonl, line 2"):
        assert expected in notes


ODD_EVENTS = """{"name": ["a"], "ph": "X", "ts": "early", "dur": 1}
{"name": "rollout", "ph": "X", "ts": 1, "dur": "long"}
{"name": "rollout", "ph": "X", "ts": NaN}
{"name": 3, "ph": "X", "ts": 5, "dur": 1e6}
{"name": "step 1", "ph": "i", "ts": 9}
"""


def test_a_line_ends_where_the_file_says_so(tmp_path):
    """A student may write U+2028 or U+0085, at which a text's lines would end."""
    write_run(tmp_path / "run", steps=2, sample="one\u2028two\x85three")
    sample = {"prompt": "p", "before": "x", "after": "one\u2028two\x85three"}
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    [run] = read_runs([tmp_path / "run"])
    assert (run.samples, run.notes) == ([sample], [])


@pytest.mark.parametrize("name", ["samples.jsonl", "eval.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_noted(tmp_path, name):
    write_run(tmp_path / "run", steps=2)
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).mkdir()
    [run] = read_runs([tmp_path / "run"])
    assert f"{name} cannot be read: Is a directory" in run.notes


@pytest.mark.parametrize(
    "name, content, note",
    [
        ("summary.json", '{"world": 3}', "summary.json cannot be read: expected an object with objects for world"),
        ("summary.json", "[1]", "summary.json cannot be read"),
        ("eval.jsonl", '{"benchmark": "gsm8k", "protocol": "greedy"}\n', "eval.jsonl, line 1 is broken and left out"),
        ("eval.jsonl", "3\n", "eval.jsonl, line 1 is broken and left out"),
        ("config.toml", "a = " + "[" * 20_000, "config.toml cannot be read"),
        ("config.toml", "selection = 3\n", ""),
        ("summary.json", '{"seconds": {"total": NaN}, "tokens": {"valid": 1e999, "selected": 1, "trained": "x"}}', ""),
        ("summary.json", '{"peak_rss_bytes": 1%s, "tokens": {"valid": 1%s, "selected": 2}}' % ((400 * "0",) * 2), ""),
        ("eval.jsonl", '{"mean": 1%s, "sd": NaN}\n' % (400 * "0"), ""),
        ("metrics.jsonl", '{"step": 1, "train/loss": 1%s, "train/lr": NaN, "a": 1e300}\n' % (400 * "0"), ""),
        ("trace/rank_00000.jsonl", ODD_EVENTS, ""),
    ],
)
def test_files_of_another_shape_are_noted_and_left_out(tmp_path, name, content, note):
    write_run(tmp_path / "run", steps=2)
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text(content)
    write_report_page([tmp_path / "run"], tmp_path / "report.html")
    [run] = read_runs([tmp_path / "run"])
    assert note in "\n".join(run.notes)
