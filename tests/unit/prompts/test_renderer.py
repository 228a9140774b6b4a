"""What the teacher reads in place of the student's prompt."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.errors import InputError
from megatron_tip.prompts.source import PromptSource, load_prompts
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if not enable_thinking | default(true) %}none. {% endif %}{% endif %}"
)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, template: str | None = None, **options: Any) -> PromptSource:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    config = PromptsConfig(path=path, **options)
    return load_prompts(config, HeldoutConfig(num_prompts=0), tokenizer, prompts_per_step=1, steps=1, seed=1)


def decoded(ids: tuple[int, ...]) -> str:
    return str(make_tiny_tokenizer().decode(ids))


def test_the_teacher_reads_its_own_field_with_its_own_system_prompt(tmp_path: Path):
    chat = [
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3"},
    ]
    path = write(tmp_path, {"prompt": "3", "hint": "3 = 3"}, {"prompt": "4", "hint": chat})
    options = {
        "system_prompt": "brief",
        "teacher_system_prompt": "exact",
        "teacher_prompt_field": "hint",
        "shuffle": False,
    }
    first, second = load(path, **options).training
    assert first.text == decoded(first.prompt_ids) == "<|bos|>system: brief\nuser: 3\nassistant: "
    assert decoded(first.teacher_prompt_ids) == "<|bos|>system: exact\nuser: 3 = 3\nassistant: "
    assert "user: 2 + 2 =" in decoded(second.teacher_prompt_ids)
    plain = load(path).training[0]
    assert plain.teacher_prompt_ids == ()


def test_a_system_prompt_alone_is_a_prompt_of_its_own(tmp_path: Path):
    (prompt,) = load(write(tmp_path, {"prompt": "3"}), teacher_system_prompt="hint").training
    assert decoded(prompt.teacher_prompt_ids) == "<|bos|>system: hint\nuser: 3\nassistant: "
    assert "hint" not in prompt.text


def test_rows_that_differ_for_the_teacher_alone_are_no_copies(tmp_path: Path):
    path = write(tmp_path, *({"prompt": "3", "hint": hint} for hint in ("a", "b", "a")))
    assert len(load(path, teacher_prompt_field="hint").training) == 2
    one, other = (load(write(tmp_path, {"prompt": "3", "hint": hint}), teacher_prompt_field="hint") for hint in "ab")
    assert one.digest != other.digest


def test_a_row_without_the_teachers_prompt_is_named(tmp_path: Path):
    path = write(tmp_path, {"prompt": "1", "hint": "a"}, {"prompt": "2"})
    with pytest.raises(
        InputError, match=r"prompts.teacher_prompt_field: expected a field of .*prompts.jsonl, line 2, got 'hint'"
    ):
        load(path, teacher_prompt_field="hint")
    pq.write_table(pa.table({"prompt": ["1", "2"], "hint": ["a", None]}), tmp_path / "prompts.parquet")
    with pytest.raises(InputError, match=r"row 2: expected 'hint' to be a text or a list"):
        load(tmp_path / "prompts.parquet", teacher_prompt_field="hint")


def test_too_long_prompts_of_the_teacher_are_skipped_and_counted(tmp_path: Path):
    path = write(tmp_path, {"prompt": "1", "hint": "a"}, {"prompt": "2", "hint": "a b c " * 90})
    source = load(path, teacher_prompt_field="hint", max_teacher_prompt_tokens=100)
    assert [prompt.index for prompt in source.training] == [0]
    assert source.num_skipped == 1
    with pytest.raises(InputError, match=r"prompts.max_teacher_prompt_tokens: all 2 prompts are longer than 2 tokens"):
        load(path, teacher_prompt_field="hint", max_teacher_prompt_tokens=2)
    assert len(load(path, teacher_prompt_field="hint").training) == 2


def test_a_template_that_begins_the_response_otherwise_is_refused_with_its_ids(tmp_path: Path):
    path = write(tmp_path, {"prompt": "1", "hint": "a"})
    silent = {"enable_thinking": False}
    with pytest.raises(
        InputError, match=r"line 1: expected .* begin the response .* ids \[.+\] \('assistant: '\), got \["
    ):
        load(path, TEMPLATE, teacher_prompt_field="hint", teacher_template_arguments=silent)
    (prompt,) = load(path, TEMPLATE, teacher_prompt_field="hint", template_arguments=silent).training
    assert prompt.text.endswith("assistant: none. ")
    assert decoded(prompt.teacher_prompt_ids) == "user: a\nassistant: none. "
