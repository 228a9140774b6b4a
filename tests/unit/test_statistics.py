"""What is declared of a statistic holds in the record and in the documentation."""

from dataclasses import MISSING, fields
from pathlib import Path

from megatron_tip.diagnostics.scores import column_names
from megatron_tip.observability.token_table import SCHEMA
from megatron_tip.statistics import STATISTICS, TokenStatistics
from megatron_tip.training.step_metrics import MEANS

DOCS = Path(__file__).parents[2] / "docs/selection.md"


def test_every_scalar_field_is_declared():
    supports = {f"{model}_support_{what}" for model in ("student", "teacher") for what in ("ids", "logprobs")}
    assert {field.name for field in fields(TokenStatistics)} - supports == set(STATISTICS)


def test_what_a_served_teacher_gives_may_lack_nothing_else():
    """A field that every scoring pass fills but a served teacher cannot is None there, and so must be declared."""
    required = {field.name for field in fields(TokenStatistics) if field.default is MISSING}
    optional = {name for name, one in STATISTICS.items() if one.needs in ("student_top_k", "distribution")}
    assert {name for name in required if "None" in str(TokenStatistics.__annotations__[name])} == required & optional


def test_the_documentation_lists_the_declarations():
    text = DOCS.read_text(encoding="utf-8")
    for name, one in STATISTICS.items():
        what = f"{one.meaning}; {one.equation}" if one.equation else one.meaning
        assert f"| `{name}` | {one.symbol} | {what} | {one.unit} | {one.over} | {one.needs} |\n" in text


def test_files_and_metrics_have_the_columns_that_they_always_had():
    """Files of earlier versions are read by these names, in this order."""
    assert SCHEMA.names[6:17] == [
        "student_entropy", "teacher_entropy", "reverse_kl", "topk_reverse_kl", "forward_kl", "support_divergence",
        "compatibility", "compatibility_lower_bound", "student_logprobs", "teacher_logprobs", "score",
    ]  # fmt: skip
    assert column_names([8]) == [
        "student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "student_logprobs", "teacher_logprobs",
        "support_divergence_k8", "compatibility_k8", "compatibility_lower_bound_k8", "support_overlap_k8",
        "support_jaccard_k8", "shared_teacher_mass_k8", "student_mass_on_teacher_support_k8",
    ]  # fmt: skip
    assert list(MEANS.values()) == [
        "student_entropy", "teacher_entropy", "reverse_kl", "topk_reverse_kl", "forward_kl", "support_divergence",
        "compatibility",
    ]  # fmt: skip
    assert [name.removeprefix("train/") for name in MEANS] == list(MEANS.values())
