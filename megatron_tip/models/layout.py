"""A check of a model's parallel layout. Free of Megatron, whose import takes seconds."""

import math

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.experts import Experts
from megatron_tip.errors import ConfigError


def check_layout(
    architecture: ModelArchitecture,
    *,
    tp_size: int,
    pp_size: int,
    owner: str,
    ep_size: int = 1,
    expert_tp_size: int = 0,
    pipeline_layers: tuple[int, ...] = (),
) -> None:
    """Refuses a layout that the model cannot take. Needs no process group; the outcome is the same on every rank.

    Args:
        owner: "model" or "teacher", the section of the configuration that has the sizes.
        expert_tp_size: 0: `tp_size`.
        pipeline_layers: the number of layers of each stage; empty: equally many.

    Raises:
        ConfigError: heads, query groups or feed-forward size not divisible by `tp_size`, experts by `ep_size` or their
            feed-forward size by `expert_tp_size`; sizes for experts of a model without any; or layers that are not
            divisible by `pp_size`, or not those of `pipeline_layers`.
    """
    _check_experts(architecture.experts, ep_size=ep_size, expert_tp_size=expert_tp_size, tp_size=tp_size, owner=owner)
    divisible = math.gcd(architecture.num_attention_heads, architecture.num_query_groups, architecture.ffn_hidden_size)
    checks = [
        ("attention heads", architecture.num_attention_heads, "tensor_parallel_size", tp_size),
        ("key/value heads", architecture.num_query_groups, "tensor_parallel_size", tp_size),
        ("feed-forward channels", architecture.ffn_hidden_size, "tensor_parallel_size", tp_size),
    ]
    if not pipeline_layers:
        checks.append(("layers", architecture.num_layers, "pipeline_parallel_size", pp_size))
    elif len(pipeline_layers) != pp_size or sum(pipeline_layers) != architecture.num_layers or min(pipeline_layers) < 1:
        raise ConfigError(
            f"{owner}.pipeline_layers: expected {pp_size} numbers above 0 (pipeline_parallel_size) that add up to the "
            f"{architecture.num_layers} layers, got {list(pipeline_layers)}"
        )
    for what, count, field, size in checks:
        whole = divisible if field == "tensor_parallel_size" else count
        _check_divides(what, count, f"{owner}.{field}", size, whole, note=_NOTES.get(what, ""))


_NOTES = {
    "key/value heads": "; Megatron-Core 0.16.1 gives several ranks one of these heads only within its global groups",
    "layers": ", or say with pipeline_layers how many each stage has",
}
"""What a message adds about one of the counts."""


def _check_experts(experts: Experts | None, *, ep_size: int, expert_tp_size: int, tp_size: int, owner: str) -> None:
    if experts is None:
        for field, size in (("expert_model_parallel_size", ep_size), ("expert_tensor_parallel_size", expert_tp_size)):
            if size > 1:
                raise ConfigError(
                    f"{owner}.{field}: expected a model with experts, got {size} for one without; unset it"
                )
        return
    name = f"{owner}.expert_tensor_parallel_size"
    if not expert_tp_size and experts.ffn_hidden_size % tp_size:
        name += " = 0 (tensor_parallel_size)"
    _check_divides("experts", experts.num_experts, f"{owner}.expert_model_parallel_size", ep_size, experts.num_experts)
    shared, field = experts.shared_ffn_hidden_size, f"{owner}.tensor_parallel_size"
    _check_divides("feed-forward channels of the shared expert", shared, field, tp_size, shared)
    channels = experts.ffn_hidden_size
    _check_divides("feed-forward channels of an expert", channels, name, expert_tp_size or tp_size, channels)


def _check_divides(what: str, count: int, name: str, size: int, whole: int, note: str = "") -> None:
    """Refuses a size that does not divide `count`; the message names divisors of `whole`."""
    if count % size:
        divisors = [str(divisor) for divisor in range(1, whole + 1) if whole % divisor == 0]
        raise ConfigError(
            f"{name}: expected a divisor of its {count} {what}, got {size}; "
            f"choose among {', '.join(divisors[:12])}{note}"
        )
