"""The presets by name: each is one published combination of selection, weights and loss terms."""

import difflib
import importlib
import inspect
import math
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from megatron_tip.errors import ConfigError
from megatron_tip.selection import scores, weights
from megatron_tip.selection.normalise import ABOVE_MEDIAN, BY_MAXIMUM, CLIPPED_MIN_MAX, MIN_MAX, RAW
from megatron_tip.selection.rule import Input, Rule, Term, Weight
from megatron_tip.statistics import STATISTICS

ENTRY_POINTS = "megatron_tip.selection_rules"


_H = Input("student_entropy")
_D = Input("support_divergence")
_C = Input("compatibility")
_C_LOWER_BOUND = Input("compatibility_lower_bound")
_H_HIGH = Input("student_entropy", ABOVE_MEDIAN)
_D_HIGH = Input("support_divergence", ABOVE_MEDIAN)

_TIP_H = Input("student_entropy", CLIPPED_MIN_MAX)
_TIP_DELTA = Input("reverse_kl", MIN_MAX)
_TIP_FORWARD_KL = Input("forward_kl", RAW)

_P_ENTROPY = Input("student_entropy", RAW)
_Q_ENTROPY = Input("teacher_entropy", RAW)
_LOG_P = Input("student_logprobs", RAW)
_LOG_Q = Input("teacher_logprobs", RAW)

_TIP_RANKINGS = (
    Rule("tip_entropy", scores.single, (_TIP_H,), scope="rollout"),
    Rule("tip_divergence", scores.single, (_TIP_DELTA,), scope="rollout"),
    Rule("tip_soft_or", scores.soft_or, (_TIP_H, _TIP_DELTA), scope="rollout"),
    Rule("tip_q3_only", scores.confident_divergence, (_TIP_FORWARD_KL, _TIP_H), scope="rollout"),
)
_ROWS = (
    Rule("full", None, take="all"),
    Rule("random", None, take="sample"),
    Rule("tip_entropy_sampling", scores.single, (Input("student_entropy", RAW),), take="sample", scope="rollout"),
    *_TIP_RANKINGS,
    *(replace(rule, name=f"{rule.name}_bottom", take="bottom") for rule in _TIP_RANKINGS),
    Rule("ta_opd_entropy", scores.single, (_H,)),
    Rule("ta_opd_divergence", scores.single, (_D,)),
    Rule("ta_opd_compatibility", scores.single, (_C,)),
    Rule("ta_opd_soft_or", scores.soft_or, (_H, _D)),
    Rule("ta_opd_teachability", scores.teachability, (_D, _C)),
    Rule("ta_opd_teachability_lower_bound", scores.teachability, (_D, _C_LOWER_BOUND)),
    Rule("ta_opd_incompatible", scores.incompatibility, (_D, _C)),
    Rule("ta_opd_entropy_teachability", scores.entropy_teachability, (_H, _D, _C)),
    Rule("ta_opd_q3_only", scores.q3_divergence, (_H_HIGH, _D_HIGH, _D)),
    Rule("ta_opd_q3_high_compatibility", scores.q3_compatibility, (_H_HIGH, _D_HIGH, _C)),
    Rule("ta_opd_q3_low_compatibility", scores.q3_low_compatibility, (_H_HIGH, _D_HIGH, _C)),
    Rule("ta_opd_q3_high_teachability", scores.q3_teachability, (_H_HIGH, _D_HIGH, _D, _C)),
    Rule("ta_opd_q3_low_teachability", scores.q3_low_teachability, (_H_HIGH, _D_HIGH, _D, _C)),
    Rule("ta_opd_q3_high_incompatible", scores.q3_incompatibility, (_H_HIGH, _D_HIGH, _D, _C)),
)
_LATER_ROWS = (
    Rule(
        "eopd",
        None,
        take="all",
        divergence="reverse_kl",
        terms=(
            Term(
                "forward_kl",
                Weight(weights.teacher_is_uncertain, (_Q_ENTROPY,), {"entropy": 0.8, "coefficient": 1.0}),
            ),
        ),
    ),
    Rule("iw_opd", None, take="all", weight=Weight(weights.undrifted, (_LOG_P, _LOG_Q), {"strength": 0.5})),
    Rule(
        "prefix",
        None,
        take="all",
        weight=Weight(weights.growing_prefix, (), {"start": 0.3, "rest": 0.0}, follows_training=True),
    ),
    Rule("first_segment", None, take="all", weight=Weight(weights.first_segment, (), {"tokens": math.nan})),
    Rule(
        "selectkd",
        None,
        take="all",
        weight=Weight(weights.accepted, (Input("choice_rank", RAW),), {"top": 5, "rejected": 0.01}),
    ),
    Rule("se_kd", scores.single, (_P_ENTROPY,), scope="rollout", rounding="up"),
    Rule(
        "se_kd_entropy_kl",
        scores.total,
        (_P_ENTROPY, Input("forward_kl", RAW)),
        scope="rollout",
        rounding="up",
    ),
    Rule("se_kd_ce_ratio", scores.ratio, (_LOG_P, _LOG_Q), scope="rollout", rounding="up"),
    Rule(
        "tsd_kd",
        None,
        take="all",
        divergence="jsd",
        weight=Weight(weights.student_less_certain, (_P_ENTROPY, _Q_ENTROPY)),
    ),
    Rule(
        "fire",
        scores.single,
        (_LOG_Q,),
        scope="whole_rollouts",
        weight=Weight(
            weights.confident_teacher,
            (Input("teacher_entropy", BY_MAXIMUM), Input("student_entropy", BY_MAXIMUM)),
        ),
    ),
    Rule(
        "sod",
        None,
        take="all",
        weight=Weight(weights.aligned_turn, (_LOG_P, _LOG_Q), {"cap": 1.5, "epsilon": 1e-6}),
    ),
)
PAPERS_RULES = {rule.name: rule for rule in _ROWS}
"""The selections of TIP and TA-OPD, which comparisons and diagnostics go through."""
RULES = PAPERS_RULES | {rule.name: rule for rule in _LATER_ROWS}


def load_rule(name: str) -> Rule:
    """Returns the rule with this name: a published one, one of an installed package, or one at an import path.

    Packages offer rules as entry points of the group "megatron_tip.selection_rules"; an import path is
    "package.module:attribute". Both refer to a `Rule`, or to a score function whose parameters are named after
    statistics; each parameter then receives Norm_B of its statistic.

    Raises:
        ConfigError: no such rule, or it is invalid.
    """
    if name in RULES:
        return RULES[name]
    found = _imported(name) if ":" in name else _installed(name)
    rule = replace(found, name=name) if isinstance(found, Rule) else _rule_of_function(name, found)
    unknown = rule.required_statistics - STATISTICS.keys()
    if unknown:
        close = difflib.get_close_matches(min(unknown), STATISTICS, n=1)
        hint = f"did you mean {close[0]}? Others are" if close else "expected names among"
        raise ConfigError(
            f"rule {name!r}: asks for {sorted(unknown)}, which are not per-token statistics; {hint} "
            f"{sorted(STATISTICS)}; a constant needs a default value"
        )
    _require_scores(rule)
    return rule


def _imported(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        if hasattr(module, attribute) or not close:
            return getattr(module, attribute)
    except Exception as error:  # the module may raise anything while it is imported
        raise ConfigError(
            f"rule: cannot import {path!r} ({type(error).__name__}: {error}); expected 'package.module:attribute', no "
            "path of a file; the module lies beside the run's TOML, is installed, or is on PYTHONPATH"
        ) from error
    raise ConfigError(f"rule: {module_name} has no {attribute!r}; did you mean {module_name}:{close[0]}?")


def _installed(name: str) -> Any:
    """Returns the object that the entry point with this name refers to."""
    offered = entry_points(group=ENTRY_POINTS)
    found = list(offered.select(name=name))
    if len(found) > 1:
        packages = sorted(point.dist.name if point.dist else "?" for point in found)
        raise ConfigError(f"rule {name!r}: expected one package to offer it, got {packages}; use an import path")
    if found:
        return _imported(found[0].value)
    names = [*RULES, *sorted(offered.names)]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"rule: expected the name of a rule or an import path 'package.module:function', got {name!r}; "
        f"the nearest name is {nearest!r}, of {', '.join(names)}"
    )


def _rule_of_function(name: str, function: Any) -> Rule:
    """Returns a rule that passes `function` Norm_B of the statistics named by its parameters.

    Parameters with a default are constants, which `selection.parameters` may set.
    """
    if not inspect.isfunction(function):
        raise ConfigError(f"rule {name!r}: expected a Rule or a score function, got {type(function).__name__}")
    parameters = inspect.signature(function).parameters.values()
    constants = {one.name: one.default for one in parameters if one.default is not one.empty}
    for constant, value in constants.items():
        if not isinstance(value, int | float):
            raise ConfigError(f"rule {name!r}: expected a number as the default of {constant}, got {value!r}")
    inputs = tuple(Input(one.name) for one in parameters if one.name not in constants)
    return Rule(name, function, inputs, constants=constants)


def _require_scores(rule: Rule) -> None:
    """Raises ConfigError unless the rule's function gives one score for each of a few made-up rows."""
    if rule.score is None or any(map(math.isnan, rule.constants.values())):
        return
    rows = torch.full((3,), 0.5, dtype=torch.float64)
    try:
        scores = rule.score(*(rows.clone() for _ in rule.inputs), **rule.constants)
    except Exception as error:  # a function of the user's own may raise anything
        raise ConfigError(
            f"rule {rule.name!r}: its function fails on three rows of 0.5 with {type(error).__name__}: {error}"
        ) from error
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != (3,):
        raise ConfigError(f"rule {rule.name!r}: expected scores of shape (3,) for three rows, one per row, got {shape}")
