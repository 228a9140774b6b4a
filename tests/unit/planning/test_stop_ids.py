"""The ids that end a response are those at which transformers' generate stops."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig, LlamaConfig

from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.planning.models import ends_of_the_teacher_alone, shared_tokenizer, stop_ids
from tests.helpers.tiny import make_tokenizer
from tests.helpers.training import Layout, make_config


class NamesOne:
    eos_token_id = 2


class NamesNone:
    eos_token_id = None


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, (2, 5, 7)),
        ({"eos_token_id": None}, {"eos_token_id": [9, 11]}, (2, 9, 11)),
        ({}, {"eos_token_id": 9}, (2, 9)),
        (None, {"eos_token_id": 9}, (2, 9)),
        (None, {}, (2,)),
    ],
)
def test_config_json_speaks_where_generation_config_is_silent(tmp_path: Path, generation, config, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stop_ids(tmp_path, NamesOne()) == expected  # pyright: ignore[reportArgumentType]


def test_transformers_itself_stops_at_the_ids_of_config_json(tmp_path: Path):
    LlamaConfig(eos_token_id=[9, 11]).save_pretrained(tmp_path)
    theirs = GenerationConfig.from_model_config(LlamaConfig.from_pretrained(tmp_path)).eos_token_id
    assert stop_ids(tmp_path, NamesNone()) == tuple(theirs)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("eos", ["</s>", [2, "x"], -1, 2.5, True])
def test_what_is_no_token_id_is_refused(tmp_path: Path, eos):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="expected eos_token_id to be a token id or a list of them"):
        stop_ids(tmp_path, NamesOne())  # pyright: ignore[reportArgumentType]


def test_a_model_that_never_ends_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected an end-of-sequence id in the tokenizer, generation_config"):
        stop_ids(tmp_path, NamesNone())  # pyright: ignore[reportArgumentType]


def test_the_teachers_ends_that_the_student_lacks_are_found(tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    config = make_config(tmp_path, Layout(1))
    assert ends_of_the_teacher_alone(config, (2,)) == {5}
    assert ends_of_the_teacher_alone(config, (2, 5, 6)) == set()


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path, monkeypatch):
    """Transformers would ask on the terminal, where a batch job has none."""
    for name in ("student", "teacher"):
        make_tokenizer(tmp_path / name, vocab_size=300)
    path = tmp_path / "student" / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(described))
    (path.parent / "mine.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="code from model folders is never run"):
        shared_tokenizer(make_config(tmp_path, Layout(1)), Machine(), (300, 300))
