"""A check of a model's parallel layout. Free of Megatron, whose import takes seconds."""

import math

from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.errors import ConfigError


def check_layout(architecture: ModelArchitecture, *, tp_size: int, pp_size: int, owner: str) -> None:
    """Refuses a layout that the model cannot take. Needs no process group; the outcome is the same on every rank.

    Megatron-Core 0.16 can shard fewer query groups than tp ranks only with its global groups, which we do not create.

    Raises:
        ConfigError: heads, query groups or feed-forward size not divisible by `tp_size`, or layers by `pp_size`.
            `owner` ("model", "teacher") is the section of the configuration that has the sizes.
    """
    divisible = math.gcd(architecture.num_attention_heads, architecture.num_query_groups, architecture.ffn_hidden_size)
    checks = [
        ("attention heads", architecture.num_attention_heads, "tensor_parallel_size", tp_size),
        ("key/value heads", architecture.num_query_groups, "tensor_parallel_size", tp_size),
        ("feed-forward channels", architecture.ffn_hidden_size, "tensor_parallel_size", tp_size),
        ("layers", architecture.num_layers, "pipeline_parallel_size", pp_size),
    ]
    for what, count, field, size in checks:
        if count % size:
            whole = divisible if field == "tensor_parallel_size" else count
            divisors = [str(divisor) for divisor in range(1, whole + 1) if whole % divisor == 0]
            raise ConfigError(
                f"{owner}.{field}: expected a divisor of its {count} {what}, got {size}; "
                f"choose among {', '.join(divisors[:12])}"
            )
