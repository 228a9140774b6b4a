"""What a teacher behind servers cannot do is refused by name, from files alone, before anything runs."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import ValidationError

from megatron_tip.config import TeacherConfig
from megatron_tip.errors import ConfigError
from megatron_tip.planning.plan import plan_run
from megatron_tip.selection import RULES, Rule, Term, Weight
from megatron_tip.selection.weights import first_segment
from megatron_tip.teachers.setup import teacher_limits
from tests.helpers.training import Layout, make_config, make_models

SERVED = {"kind": "sglang", "urls": ("http://127.0.0.1:1",)}
SKIPPED = SERVED | {"student_support": "skip"}
NAMED = SERVED | {"urls": ("maths=http://127.0.0.1:1", "code=http://127.0.0.1:2")}
OWN: dict[str, Any] = {"kind": "self", "path": None}
"""To be given the student's path."""
TOPK = {"divergence": "topk_reverse_kl"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    for weights in (folder / "teacher").glob("*.safetensors*"):
        weights.unlink()  # a teacher behind servers needs its config.json and tokenizer alone
    return folder


def planned(models: Path, **sections: dict[str, Any]):
    if sections.get("teacher", {}).get("kind") == "self":
        sections = sections | {"teacher": sections["teacher"] | {"path": models / "student"}}
    return plan_run(make_config(models, Layout(1), **sections), 1)


def test_a_teacher_without_weights_can_be_planned(models: Path):
    plan = planned(models, teacher=SERVED, loss=TOPK)
    assert plan.teacher is None
    assert (plan.vocab_size, plan.padded_vocab_size) == (307, 307)
    planned(models, teacher=SERVED, loss={"divergence": "sampled_token"}, selection={"rule": "ta_opd_q3_only"})
    lower_bound = {"rule": "ta_opd_teachability_lower_bound"}
    planned(models, teacher=SKIPPED, loss=TOPK, selection=lower_bound)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"teacher": SERVED | {"context_parallel_size": 2}, "loss": TOPK},
            r"teacher.context_parallel_size: expected 1 with .* got 2; .*tensor_parallel_size alone",
        ),
        ({"teacher": SERVED}, r'one of topk_reverse_kl, sampled_token .* got "reverse_kl", which needs the teacher'),
        (
            {"teacher": SERVED, "loss": {"divergence": "jsd"}},
            r'got "jsd", which needs the teacher',
        ),
        (
            {"teacher": SERVED, "loss": TOPK | {"temperature": 0.7}},
            r"loss.temperature: expected 1 .* at temperature 1 only",
        ),
        (
            {"teacher": SERVED, "loss": TOPK, "selection": {"rule": "tip_soft_or"}},
            r"rule 'tip_soft_or' needs \['reverse_kl'\], which teacher.kind = .* does not provide; .*teachability",
        ),
        (
            {"teacher": SERVED, "loss": TOPK, "selection": {"rule": "tip_q3_only"}},
            r"rule 'tip_q3_only' needs \['forward_kl'\]",
        ),
        (
            {"teacher": SKIPPED, "loss": TOPK},
            r"'ta_opd_teachability' needs \['compatibility'\], .*.skip. does not provide; .*teachability_lower_bound",
        ),
        (
            {"teacher": SERVED | {"urls": ("localhost:1",)}, "loss": TOPK},
            r'"http://host:port" or .*localhost:1',
        ),
        ({"teacher": NAMED, "loss": TOPK}, r"prompts.teacher_field: expected the field that names"),
        (
            {"teacher": NAMED, "loss": TOPK, "prompts": {"teacher_field": "domain"}},
            r'prompts.teacher_field: expected prompts.source = "file"',
        ),
    ],
)
def test_what_servers_cannot_give_is_refused(models: Path, sections, message: str):
    with pytest.raises(ConfigError, match=message):
        planned(models, **sections)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": TOPK}, r'"topk_reverse_kl": expected teacher.kind = "sglang"'),
        ({"prompts": {"teacher_field": "domain"}}, r"prompts.teacher_field: expected several teachers"),
        (
            {"teacher": OWN | {"update": "live"}},
            r'teacher.update = "live": expected a prompt of the teacher.s own',
        ),
        (
            {"teacher": OWN | {"update": "average"}, "training": {"offload": "all"}},
            r'training.offload: expected "none" or "optimizer"',
        ),
        (
            {"teacher": OWN | {"update": "average"}, "diagnostics": {"bank": Path("bank"), "every_steps": 1}},
            r'a teacher that does not change, got teacher.update = "average"',
        ),
        (
            {"selection": {"rule": "tsd_kd", "retention_ratio": 1.0}},
            r'loss.divergence: expected "jsd" with selection.rule = "tsd_kd", got "reverse_kl"',
        ),
        (
            {"selection": {"rule": "selectkd", "retention_ratio": 1.0, "support_size": 4}},
            r"selection.support_size: expected at least 5 for rule 'selectkd', got 4",
        ),
    ],
)
def test_what_only_servers_have_is_refused_of_the_teacher_at_hand(tmp_path: Path, sections, message: str):
    with pytest.raises(ConfigError, match=message):
        planned(make_models(tmp_path), **sections)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"urls": ()}, "teacher.urls: expected URLs with teacher.kind"),
        ({"kind": "megatron"}, "teacher.urls: expected URLs with teacher.kind"),
        ({"urls": ("a=http://x:1", "http://y:1")}, 'expected all or none of them as "name=http://host:port"'),
    ],
)
def test_urls_that_do_not_fit_are_refused(changes, message: str):
    with pytest.raises(ValidationError, match=message):
        TeacherConfig(**({"path": "x"} | SERVED | changes))


def test_urls_are_split_into_names_and_addresses():
    def routes(*urls: str) -> tuple[tuple[str, str], ...]:
        return TeacherConfig(kind="sglang", path=Path("x"), urls=urls).routes

    assert routes("maths=http://a:1", "code=http://b:1") == (("maths", "http://a:1"), ("code", "http://b:1"))
    assert routes("http://a:1/?b=c") == (("", "http://a:1/?b=c"),)


def test_limits_are_those_of_any_architecture(models: Path, tmp_path: Path):
    assert teacher_limits(models / "teacher") == (307, 4096)
    shutil.copytree(models / "teacher", tmp_path / "other")
    (tmp_path / "other/config.json").write_text('{"text_config": {"vocab_size": 9, "max_position_embeddings": 8}}')
    assert teacher_limits(tmp_path / "other") == (9, 8)
    (tmp_path / "other/config.json").write_text('{"vocab_size": 9}')
    with pytest.raises(ConfigError, match="expected vocab_size and max_position_embeddings"):
        teacher_limits(tmp_path / "other")


@pytest.mark.parametrize(
    "divergence, sections, message",
    [
        ("forward_kl", {"teacher": SERVED, "loss": TOPK}, "expected loss terms among topk_reverse_kl, sampled_token"),
        ("topk_reverse_kl", {"teacher": OWN}, "expected loss terms among reverse_kl, forward_kl, jsd, sampled_token"),
        ("sampled_token", {"rollout": {"top_p": 0.9}}, "with a term sampled_token: expected .* rollout.top_p = 1"),
    ],
)
def test_a_loss_term_that_cannot_be_computed_is_refused(tmp_path: Path, divergence: str, sections, message: str):
    term = Term(divergence, Weight(first_segment, (), {"tokens": 3}))
    termed = Rule("termed", None, take="all", terms=(term,))
    with patch.dict(RULES, termed=termed), pytest.raises(ConfigError, match=message):
        planned(make_models(tmp_path), selection={"rule": "termed"}, **sections)
