"""What a machine lacks stops a run that starts there; for a run elsewhere it is a note."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, InputError, MegatronTipError, OptionalDependencyError
from megatron_tip.machine import Machine
from megatron_tip.planning import inputs
from megatron_tip.planning.plan import outline_run, plan_run
from megatron_tip.rollout.sglang import setup as sglang_setup
from tests.helpers.training import Layout, make_config, make_models

SERVED = {"engine": "sglang", "server_urls": ("http://n7:1",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def config_of(models: Path, **sections: Any) -> Config:
    return make_config(models, Layout(1), **sections)


def notes_of(config: Config) -> list[str]:
    machine = Machine(is_elsewhere=True)
    outline_run(config, 1, machine)
    return machine.notes


FILE = {"source": "file", "path": Path("no.jsonl"), "tasks": ()}
TOPK = {"divergence": "topk_reverse_kl"}
TEACHER = {"kind": "sglang", "urls": ("http://n8:1",), "keys_file": Path("no.json")}


@pytest.mark.parametrize(
    "sections,setting",
    [
        ({"prompts": FILE}, "prompts.path"),
        ({"rollout": {"engine": "replay", "replay_folder": Path("no")}}, "rollout.replay_folder"),
        ({"rollout": SERVED, "sglang": {"keys_file": Path("no.json")}}, "sglang.keys_file"),
        ({"teacher": TEACHER, "loss": TOPK}, "teacher.keys_file"),
        ({"diagnostics": {"bank": Path("no"), "every_steps": 1}}, "diagnostics.bank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_file_is_refused_here_and_noted_elsewhere(models: Path, sections: dict[str, Any], setting: str):
    config = config_of(models, **sections)
    with pytest.raises(ConfigError, match=rf"^{setting}: expected an existing path, got no"):
        plan_run(config, 1)
    (note,) = notes_of(config)
    assert note.startswith("no")
    assert note.endswith("is not on this machine")


def test_a_missing_package_is_refused_here_and_noted_elsewhere(models: Path, monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise OptionalDependencyError("rollout.engine: expected SGLang")

    monkeypatch.setattr(sglang_setup, "require_sglang", missing)
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    teacher = {"transformer_impl": "transformer_engine", "dtype": "bfloat16"}
    sections = {"rollout": {"engine": "sglang"}, "teacher": teacher}
    with pytest.raises(OptionalDependencyError, match=r"teacher\.transformer_impl"):
        plan_run(config_of(models, **sections), 1)
    with pytest.raises(OptionalDependencyError, match="expected SGLang"):
        plan_run(config_of(models, rollout={"engine": "sglang"}), 1)
    notes = notes_of(config_of(models, **sections))
    assert [note.split(":")[0] for note in notes] == ["teacher.transformer_impl", "rollout.engine"]
    plan_run(config_of(models, rollout=SERVED), 1)  # servers that run already


@pytest.mark.parametrize("content", ['{"prompt": 3}\n', "no JSON\n"])
def test_files_that_are_here_are_read_for_a_run_elsewhere_too(models: Path, tmp_path: Path, content: str):
    (tmp_path / "prompts.jsonl").write_text(content)
    prompts = FILE | {"path": tmp_path / "prompts.jsonl"}
    known = {"path": Path("Qwen3-1.7B")}
    refused: list[str] = []
    for sections in ({}, {"model": known, "teacher": known}):  # with weights and without
        with pytest.raises(InputError) as caught:
            notes_of(config_of(models, prompts=prompts, **sections))
        refused.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        plan_run(config_of(models, prompts=prompts), 1)
    assert refused == [str(caught.value)] * 2


def test_passwords_that_are_here_are_read_for_a_run_elsewhere_too(models: Path, tmp_path: Path):
    (tmp_path / "keys.json").write_text('["secret"]')
    config = config_of(models, teacher=TEACHER | {"keys_file": tmp_path / "keys.json"}, loss=TOPK)
    for check in (notes_of, lambda config: plan_run(config, 1)):
        with pytest.raises(MegatronTipError, match=r"^teacher\.keys_file: expected") as caught:
            check(config)
        assert "secret" not in str(caught.value)


def test_a_teacher_behind_servers_needs_no_weights_here_or_elsewhere(models: Path, tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    for path in (models / "student").glob("tokenizer*"):
        (tmp_path / "teacher" / path.name).write_bytes(path.read_bytes())
    content = '{"architectures": ["Other"], "vocab_size": 307, "max_position_embeddings": 4096}'
    (tmp_path / "teacher" / "config.json").write_text(content)
    served = {"kind": "sglang", "urls": ("http://n8:1",), "path": tmp_path / "teacher"}
    config = config_of(models, teacher=served, loss=TOPK)
    assert notes_of(config) == []
    assert plan_run(config, 1).teacher is None


def test_a_diagnostic_needs_the_whole_teacher(models: Path):
    teacher = {"kind": "sglang", "urls": ("http://n8:1",)}
    with pytest.raises(ConfigError, match=r'^diagnostics: expected teacher.kind = "megatron"'):
        notes_of(config_of(models, teacher=teacher, loss=TOPK, diagnostics={"bank": Path("no"), "every_steps": 1}))
