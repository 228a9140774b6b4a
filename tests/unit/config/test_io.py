"""Configurations in and out: overrides, messages, round trip, reference."""

import re

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import dump_config, load_config
from megatron_tip.config.reference import reference
from megatron_tip.errors import ConfigError

MINIMAL = """
[run]
folder = "runs/a"
[model]
path = "models/student"
[teacher]
path = "models/teacher"
[prompts]
path = "prompts.jsonl"
[training]
steps = 3
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def message_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_fill_what_the_file_leaves_out(minimal):
    config = load_config(minimal)
    assert config.training.steps == 3
    assert config.selection.retention_ratio == 0.05
    assert str(config.model.path) == "models/student"


@pytest.mark.parametrize(
    "override,section,key,value",
    [
        ("model.dtype=bfloat16", "model", "dtype", "bfloat16"),
        ('model.dtype="bfloat16"', "model", "dtype", "bfloat16"),
        ("model.drop_layers=[20, 21]", "model", "drop_layers", (20, 21)),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("prompts.shuffle=false", "prompts", "shuffle", False),
        ("prompts.system_prompt=", "prompts", "system_prompt", ""),
        ("prompts.system_prompt=answer = yes", "prompts", "system_prompt", "answer = yes"),
        ("prompts.system_prompt=1\nother = 2", "prompts", "system_prompt", "1\nother = 2"),
    ],
)
def test_override_is_toml_or_else_text(minimal, override, section, key, value):
    got = getattr(getattr(load_config(minimal, [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_later_override_wins_and_may_open_a_section(minimal):
    assert load_config(minimal, ["loss.temperature=2.0", "loss.temperature=3.0"]).loss.temperature == 3.0


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "a.b.c=1", ".steps=1", "training.=1", "=", ""])
def test_malformed_override_is_refused(minimal, override):
    assert "section.key=value" in message_of(minimal, [override])


@pytest.mark.parametrize(
    "override,expected_text",
    [
        ("prompts.answer_field=answer", 'prompts.answer_field: expected prompts.source = "file", got "reasoning_gym"'),
        ("heldout.verify=contains", 'heldout.verify: expected "whole" or "last_number" with prompts.source = '),
    ],
)
def test_generated_prompts_have_verifiers_of_their_own(minimal, override, expected_text):
    prompts = '[prompts]\nsource = "reasoning_gym"\ntasks = ["gcd"]\n'
    minimal.write_text(re.sub(r"\[prompts\]\n(\w.*\n)+", prompts, MINIMAL))
    assert expected_text in message_of(minimal, [override])


@pytest.mark.parametrize(
    "override,expected_text",
    [
        ("model.tensor_paralel_size=3", "model.tensor_paralel_size (on the command line): unknown key"),
        ("model.tensor_paralel_size=3", "did you mean model.tensor_parallel_size?"),
        ("training.lr=0.1", "did you mean optimizer.lr?"),
        ("training.learning_rate=0.1", "did you mean optimizer.lr?"),
        ("model.tp=2", "did you mean model.tensor_parallel_size?"),
        ("data.path=a", "data: unknown section; did you mean prompts?"),
        ("student.path=a", "student: unknown section; did you mean model?"),
        ("unheard.of=1", "unheard: unknown section; see `megatron-tip train --help` for all keys"),
        ("optimzer.lr=0.1", "optimzer: unknown section; did you mean optimizer?"),
        (
            "selection.thresholds=last_step",
            "selection.thresholds (on the command line): unknown key; use selection.passes",
        ),
        (
            "selection.scope=micro_batch",
            'got "micro_batch" (text); use selection.passes = "one", which selects exactly',
        ),
        ("loss.compile=true", 'loss.compile (on the command line): unknown key; use loss.kernels = "compiled"'),
        ("optimizer.optimizer_cpu_offload=true", 'unknown key; use training.offload = "optimizer"'),
        ("model.recompute_granularity=full", "unknown key; use model.recompute_activations for whole layers"),
        ("training.zzzzzzzz=1", "see `megatron-tip train --help`"),
        ("training.steps=many", 'training.steps (on the command line): expected integer >= 1, got "many" (text)'),
        ("model.dtype=bf16", 'got "bf16" (text); did you mean "bfloat16"?'),
        ("model.dtype=FP32", 'got "FP32" (text); did you mean "float32"?'),
        ("rollout.engine=SGLang", 'got "SGLang" (text); did you mean "sglang"?'),
        ("loss.divergence=reverse-kl", 'got "reverse-kl" (text); did you mean "reverse_kl"?'),
        ("prompts.shuffle=False", 'expected boolean, got "False" (text); did you mean false?'),
        ("training.steps=1e3", "got 1000.0 (number); did you mean 1000?"),
        ('training.steps="3"', 'got "3" (text); did you mean 3?'),
        ("optimizer.lr=.5", 'got ".5" (text); did you mean 0.5?'),
        ("sglang.gpus=6,7", 'got "6,7" (text); did you mean [6, 7]?'),
        ("model.drop_layers=3", "got 3 (integer); did you mean [3]?"),
        ("prompts.tasks=basic_arithmetic", 'got "basic_arithmetic" (text); did you mean ["basic_arithmetic"]?'),
        ("training.steps=0", "expected integer >= 1, got 0 (integer)"),
        ("training.steps=3.0", "expected integer >= 1, got 3.0 (number)"),
        ("training.steps=true", "expected integer >= 1, got true (boolean)"),
        ('training.steps="3"', 'expected integer >= 1, got "3" (text)'),
        ("prompts.shuffle=1", "expected boolean, got 1 (integer)"),
        ("model.dtype=fp8", 'expected "auto" | "float32" | "bfloat16", got "fp8" (text)'),
        ("model.drop_layers=[1, x]", "expected list of integers"),
        ('model.drop_layers=[1, "x"]', "model.drop_layers (on the command line), element 1: expected list of integers"),
        (
            'selection.parameters={ tokens = "x" }',
            'selection.parameters (on the command line), element tokens: expected table of numbers, got "x" (text)',
        ),
        ("teacher.update=live", 'teacher.update: expected "frozen" with teacher.kind = "megatron", got "live"'),
        ("selection.retention_ratio=1.5", "expected number > 0 and <= 1, got 1.5 (number)"),
        ("selection.support_size=100000", "expected integer >= 1 and <= 1024, got 100000"),
        ("run.folder=", "run.folder: expected a separate folder for the run, got an empty text"),
        ("optimizer.lr=nan", "optimizer.lr (on the command line): expected number > 0, got NaN"),
        ("optimizer.lr=inf", "expected number > 0, got Infinity"),
        ("rollout.engine=replay", 'rollout.replay_folder: expected a folder with rollout.engine = "replay", got none'),
        (
            "heldout.verify=whole",
            'heldout.verify: expected "no" with prompts.source = "file" and without prompts.answer_field, which names',
        ),
        (
            "prompts.answer_field=answer",
            'prompts.answer_field: expected none with heldout.verify = "no", which compares no answers, got "answer"',
        ),
        (
            "prompts.task_options={ max_terms = 2 }",
            'prompts.task_options: expected none with prompts.source = "file", got',
        ),
    ],
)
def test_message_names_key_expectation_and_value(minimal, override, expected_text):
    message = message_of(minimal, [override])
    assert message.startswith(f"{minimal}: ")
    assert expected_text in message


@pytest.mark.parametrize(
    "override,expected_text",
    [
        ("lr=1e-4", "did you mean optimizer.lr=1e-4?"),
        ("learning_rate=1e-4", "did you mean optimizer.lr=1e-4?"),
        ("dtype=bfloat16", "did you mean model.dtype=bfloat16 or teacher.dtype=bfloat16 or rollout.dtype=bfloat16?"),
        ("optimizer.lr", "did you mean optimizer.lr=VALUE?"),
        ("--optimizer.lr=1e-4", "did you mean optimizer.lr=1e-4? Write it without dashes"),
        ("retention_ration=0.1", "did you mean selection.retention_ratio=0.1?"),
    ],
)
def test_a_malformed_override_is_answered_with_the_likely_one(minimal, override, expected_text):
    assert expected_text in message_of(minimal, [override])


def test_what_nobody_means_gets_no_hint(minimal):
    assert message_of(minimal, ["training.steps=many"]).endswith("(text)")
    assert message_of(minimal, ["zzzzzzzz=1"]).endswith("got 'zzzzzzzz=1'")
    assert message_of(minimal, ["training.steps=1e400"])


def test_all_errors_are_listed_together(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL.replace("steps = 3", "step = 3") + "[loss]\ntemperature = -1\n")
    assert set(message_of(path).splitlines()[1:]) == {
        "  loss.temperature: expected number > 0, got -1 (integer)",
        "  training.steps: expected integer >= 1, got nothing",
        "  training.step: unknown key; did you mean training.steps?",
    }


def test_missing_section_and_value_in_the_place_of_a_section(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = 3\n[run]\nfolder = "a"\n')
    message = message_of(path)
    assert "model: expected section [model], got 3 (integer)" in message
    assert "training: expected section [training], got nothing" in message
    assert "model: expected a section [model], got 3 (integer)" in message_of(path, ["model.path=a"])


@pytest.mark.parametrize(
    "content,expected_text",
    [
        (b"[run\n", "syntax error"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_file_that_is_no_toml_is_refused(tmp_path, content, expected_text):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    message = message_of(path)
    assert str(path) in message
    assert expected_text in message


def test_directory_in_the_place_of_the_file_is_refused(tmp_path):
    assert "cannot read" in message_of(tmp_path)


def test_dump_round_trips(minimal, tmp_path):
    config = load_config(minimal, ["model.drop_layers=[3, 4]", "optimizer.lr=3e-7", 'prompts.system_prompt=é\n"x"'])
    dumped = tmp_path / "dumped.toml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config
    assert "retention_ratio = 0.05" in dumped.read_text()


def test_reference_describes_every_key():
    text = reference()
    for name, field in Config.model_fields.items():
        assert f"[{name}]" in text
        for key, value in field.annotation.model_fields.items():
            assert f"  {key}: " in text
            assert value.description, f"{name}.{key} has no description"
    assert "  retention_ratio: number > 0 and <= 1, default 0.05" in text


def test_reference_fits_80_columns_and_names_the_rules():
    from megatron_tip.selection import RULES

    text = reference()
    assert max(map(len, text.splitlines())) <= 80
    section = " ".join(text[text.index("[selection]") :].split())
    for name in RULES:
        assert f" {name.removesuffix('_bottom')}" in section, name


def test_a_home_folder_is_found(minimal, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(minimal, ["model.path=~/models/student"])
    assert config.model.path == tmp_path / "models" / "student"
    assert "home folder is known" in message_of(minimal, ["model.path=~nobody-of-this-name/x"])


def test_a_byte_order_mark_is_no_part_of_the_file(minimal):
    minimal.write_bytes(b"\xef\xbb\xbf" + minimal.read_bytes())
    assert load_config(minimal).training.steps == 3


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "9" * 5000])
def test_what_toml_cannot_hold_is_named(minimal, value):
    assert "run.seed" in message_of(minimal, [f"run.seed={value}"])
    minimal.write_text(MINIMAL.replace("[run]", f"[run]\nseed = {value}"))
    assert f"{minimal}: expected TOML" in message_of(minimal)


def test_a_value_that_no_type_accepts_is_named_once(minimal):
    (line,) = message_of(minimal, ["prompts.template_arguments={ think = [1] }"]).splitlines()[1:]
    assert line.endswith("element think: expected table of booleans or integers or numbers or texts, got [1] (list)")


@pytest.mark.parametrize("key", ["tensor_parallel_size", "context_parallel_size", "expert_model_parallel_size"])
def test_a_teacher_that_is_the_student_has_its_layout(minimal, key):
    own = ["teacher.kind=self", "teacher.path=models/student"]
    assert getattr(load_config(minimal, [*own, f"model.{key}=2"]).teacher, key) == 2
    assert f"teacher.{key}: expected that of [model], 1" in message_of(minimal, [*own, f"teacher.{key}=2"])
