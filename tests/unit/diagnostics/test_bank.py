"""A bank comes back as it was written, and nothing that is damaged or foreign is taken for one."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_tip.diagnostics.bank import check_bank, check_scores_name, read_bank, strangers, write_bank
from megatron_tip.diagnostics.freeze import cut_contexts, distinct
from megatron_tip.diagnostics.scores import read_scores, write_scores
from megatron_tip.errors import ConfigError, InputError, OutputError
from megatron_tip.records import Prompt
from tests.helpers.diagnostics import MANIFEST, make_bank, make_contexts, make_scores


def test_contexts_and_manifest_come_back(tmp_path):
    context = replace(make_contexts(1)[0], environment_spans=((2, 5), (9, 10)), rollout_logprobs=(-0.1,) * 20)
    written = write_bank(tmp_path / "bank", [context, *make_contexts(3)[1:]], MANIFEST)
    bank = read_bank(tmp_path / "bank")

    assert list(bank.contexts) == list(written.contexts)
    assert bank.manifest == written.manifest
    assert bank.manifest["num_tokens"] == 20 * 3 - 4
    assert bank.rows[:4].tolist() == [[0, 0], [0, 1], [0, 5], [0, 6]]


def test_contexts_of_one_prompt_are_one_cluster(tmp_path):
    bank = write_bank(tmp_path / "bank", make_contexts(6, num_prompts=4), MANIFEST)
    assert bank.prompts.tolist() == [0, 1, 2, 3, 0, 1]


def test_an_existing_folder_and_a_bank_without_tokens_are_refused(tmp_path):
    make_bank(tmp_path / "bank")
    with pytest.raises(OutputError, match="exists"):
        make_bank(tmp_path / "bank")
    with pytest.raises(InputError, match="at least one token"):
        write_bank(tmp_path / "empty", [replace(make_contexts(1)[0], response_ids=(), rollout_logprobs=())], MANIFEST)
    assert not (tmp_path / "empty").exists()


def test_truncated_and_changed_contexts_are_refused(tmp_path):
    make_bank(tmp_path / "bank")
    path = tmp_path / "bank" / "contexts.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"contexts\.parquet: expected the file with SHA-256 .* make it again"):
        read_bank(tmp_path / "bank")
    make_bank(tmp_path / "other", num_contexts=61)
    path.write_bytes((tmp_path / "other" / "contexts.parquet").read_bytes())
    with pytest.raises(InputError, match="changed or damaged"):
        read_bank(tmp_path / "bank")


def test_no_bank_and_a_foreign_format_are_refused(tmp_path):
    with pytest.raises(InputError, match="diagnose bank"):
        read_bank(tmp_path)
    make_bank(tmp_path / "bank")
    path = tmp_path / "bank" / "manifest.json"
    path.write_text(path.read_text().replace("context bank 1", "context bank 9"))
    with pytest.raises(InputError, match="context bank 9"):
        read_bank(tmp_path / "bank")


def test_a_bank_of_another_tokenizer_or_vocabulary_is_refused(tmp_path):
    bank = make_bank(tmp_path / "bank")
    check_bank(bank, tokenizer="words", vocab_size=300)
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_bank(bank, tokenizer="others", vocab_size=300)
    with pytest.raises(ConfigError, match="300 vocabulary entries"):
        check_bank(bank, tokenizer="words", vocab_size=20)


def test_scores_come_back_and_belong_to_their_bank(tmp_path):
    bank, other = make_bank(tmp_path / "bank"), make_bank(tmp_path / "other", num_contexts=61)
    scores = make_scores(bank)
    write_scores(bank.scores_path("start"), scores)
    found = read_scores(bank.scores_path("start"), bank)

    assert found.about == {**scores.about, "format": found.about["format"]}
    for name, values in scores.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)
    with pytest.raises(InputError, match="those of another one"):
        read_scores(bank.scores_path("start"), other)
    bank.scores_path("start").write_bytes(bank.scores_path("start").read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_scores(bank.scores_path("start"), bank)


def test_scores_that_are_not_there_are_answered_with_those_that_are(tmp_path):
    bank = make_bank(tmp_path / "bank")
    with pytest.raises(InputError, match="got 'ende'; existing: none;"):
        read_scores(bank.scores_path("ende"), bank)
    for name in ("start", "end"):
        write_scores(bank.scores_path(name), make_scores(bank))
    with pytest.raises(InputError, match="expected the name of scores in the bank, got 'ende'; existing: end, start;"):
        read_scores(bank.scores_path("ende"), bank)


@pytest.mark.parametrize("key", ["sha256", "tokenizer", "vocab_size", "source", "num_tokens"])
def test_a_manifest_without_a_key_is_refused_by_name(tmp_path, key):
    make_bank(tmp_path / "bank")
    path = tmp_path / "bank" / "manifest.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(InputError, match=rf"manifest\.json: expected .* got {key} missing"):
        read_bank(tmp_path / "bank")


def test_a_bank_of_a_runs_rollouts_may_not_know_its_student(tmp_path):
    student = {"path": "models/student", "drop_layers": [], "fingerprint": None}
    bank = make_bank(tmp_path / "bank", source="run/rollouts", student=student)
    assert read_bank(bank.folder).manifest["student"] == student


@pytest.mark.parametrize(
    "key,value", [("teacher", 1.5), ("student", {}), ("sampling", [1]), ("sampling", {"top_p": 1})]
)
def test_a_part_of_a_manifest_of_another_type_is_refused_by_name(tmp_path, key, value):
    make_bank(tmp_path / "bank")
    path = tmp_path / "bank" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"manifest\.json: expected .* got {key} missing or of another type"):
        read_bank(tmp_path / "bank")


@pytest.mark.parametrize("values", [["x"], [None]], ids=["text", "nothing"])
def test_scores_with_values_that_are_no_numbers_are_refused_by_column(tmp_path, values):
    bank = make_bank(tmp_path / "bank")
    path = bank.scores_path("start")
    write_scores(path, make_scores(bank))
    table = parquet.read_table(path)
    place = table.column_names.index("reverse_kl")
    odd = pa.array([*values, *table.column(place).to_pylist()[1:]] if values == [None] else values * len(table))
    parquet.write_table(table.set_column(place, "reverse_kl", odd), path)
    with pytest.raises(InputError, match=r"start\.parquet: expected numbers in every row, got others in reverse_kl"):
        read_scores(path, bank)


def test_a_start_that_did_not_write_the_contexts_is_named(tmp_path):
    own = make_bank(tmp_path / "own")
    assert strangers(own, student="s", teacher="t") == []
    (sentence,) = strangers(own, student="another", teacher="t")
    assert "differs from the student that wrote the contexts" in sentence
    (sentence,) = strangers(own, student="s", teacher="another")
    assert "the teacher (fingerprint another) differs from" in sentence


@pytest.mark.parametrize("student", [None, MANIFEST["student"]])
def test_nobody_is_taken_for_the_writer_of_a_runs_rollouts(tmp_path, student):
    """Nor is the configuration's student, with which older versions stamped such banks."""
    bank = make_bank(tmp_path / "bank", source="run/rollouts", weight_versions=[0, 3], student=student)
    (sentence,) = strangers(read_bank(bank.folder), student="s", teacher="t")
    assert "rollouts of a run (run/rollouts, weight versions [0, 3])" in sentence


def test_scores_with_a_changed_page_are_refused(tmp_path):
    bank = make_bank(tmp_path / "bank")
    path = bank.scores_path("start")
    write_scores(path, make_scores(bank))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"start\.parquet: expected a whole Parquet file"):
        read_scores(path, bank)


def replaced(path, *, metadata: bytes | None = None, without: str = "", rows: int | None = None) -> None:
    """Writes the table in `path` anew without a column, with other metadata, or with fewer rows."""
    table = parquet.read_table(path).slice(0, rows)
    about = table.schema.metadata if metadata is None else {b"megatron_tip": metadata}
    table = table.select([name for name in table.column_names if name != without])
    parquet.write_table(table.replace_schema_metadata(about), path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metadata": b""}, "expected a JSON object in the file's metadata"),
        ({"metadata": b"[1]"}, "expected a JSON object in the file's metadata"),
        ({"metadata": b'{"format": "megatron_tip bank scores 1", "bank": "x"}'}, "without .*metadata teacher"),
        ({"without": "position"}, "without column position"),
        ({"without": "compatibility_k16"}, r"K = \[8, 16\], got 1200 rows without \['compatibility_k16'\]"),
        ({"rows": 1199}, "expected 1200 rows, .* got 1199 rows"),
    ],
)
def test_scores_that_lack_a_part_are_refused_by_name(tmp_path, change, message):
    bank = make_bank(tmp_path / "bank")
    path = bank.scores_path("start")
    write_scores(path, make_scores(bank))
    replaced(path, **change)
    with pytest.raises(InputError, match=rf"start\.parquet: .*{message}"):
        read_scores(path, bank)


def test_contexts_are_cut_after_a_token_of_the_student(tmp_path):
    context = replace(make_contexts(1)[0], environment_spans=((3, 6), (12, 14)))
    (cut,) = cut_contexts([context], 1, 13)
    assert (len(cut.response_ids), cut.environment_spans, cut.finish_reason) == (12, ((3, 6),), "length")
    (whole,) = cut_contexts([context], 1, 20)
    assert whole == context
    assert len(cut_contexts(make_contexts(5), 3, 20)) == 3


def test_prompts_of_one_text_are_taken_once():
    prompts = [Prompt(0, "a", (1, 2)), Prompt(1, "b", (3,)), Prompt(2, "a", (1, 2))]
    assert [prompt.index for prompt in distinct(prompts)] == [0, 1]


@pytest.mark.parametrize("name", ["../contexts", "a/b", "", ".hidden"])
def test_scores_stay_in_their_folder(name):
    with pytest.raises(InputError, match="--name"):
        check_scores_name(name)
    check_scores_name("step_000010.v2-a")
