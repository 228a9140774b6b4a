"""Counts of an architecture's parameters and floating-point operations, from its shape."""

from megatron_tip.conversion.architecture import ModelArchitecture


def layer_parameters(architecture: ModelArchitecture, layer: int = 0, *, active: bool = False) -> int:
    """Returns the number of parameters of one decoder layer.

    Args:
        layer: matters only where some layers have experts and others do not.
        active: counts only as many experts as a token passes through.
    """
    a = architecture
    query, key_value = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (query + 2 * key_value) + query * a.hidden_size
    biases = (query + 2 * key_value) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    return attention + biases + sum(feed_forward_parameters(a, layer, active=active)) + 2 * a.hidden_size


def feed_forward_parameters(architecture: ModelArchitecture, layer: int, *, active: bool = False) -> tuple[int, int]:
    """Returns the parameters after a layer's attention, without the norm: those outside of its experts, and theirs.

    Outside are the router and a shared expert, or in a layer without experts all of them. `active`: as in
    `layer_parameters`.
    """
    a = architecture
    if a.experts is None or not a.has_experts(layer):
        return 3 * a.hidden_size * a.ffn_hidden_size, 0
    count = a.experts.num_active if active else a.experts.num_experts
    outside = routing_parameters(a, layer) + 3 * a.hidden_size * a.experts.shared_ffn_hidden_size
    return outside, count * 3 * a.hidden_size * a.experts.ffn_hidden_size


def routing_parameters(architecture: ModelArchitecture, layer: int) -> int:
    """Returns the parameters of a layer's router, and of a shared expert's gate, which every rank has whole."""
    experts = architecture.experts
    if experts is None or not architecture.has_experts(layer):
        return 0
    return (experts.num_experts + (experts.shared_ffn_hidden_size > 0)) * architecture.hidden_size


def num_parameters(architecture: ModelArchitecture, *, active: bool = False) -> int:
    """Returns the number of parameters of the whole model; tied embeddings count once.

    `active`: counts only as many experts of each layer as a token passes through.
    """
    a = architecture
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    layers = sum(layer_parameters(a, layer, active=active) for layer in range(a.num_layers))
    return layers + a.hidden_size + embeddings


def forward_flops(architecture: ModelArchitecture, *, num_tokens: float, mean_length: float) -> float:
    """Returns the operations of a forward pass through all layers, without the embedding and the output head.

    A multiply-add counts as two. Causal attention sees half of its sequence on average: 2 x 2 x heads x head_dim x
    length / 2 per token and layer, with `mean_length` in place of each sequence's own length (exact for equal lengths).
    Of the experts, those count that a token passes through.
    """
    a = architecture
    matrices = sum(layer_parameters(a, layer, active=True) - 2 * a.hidden_size for layer in range(a.num_layers))
    attention = a.num_layers * a.num_attention_heads * a.head_dim * mean_length
    return 2.0 * (matrices + attention) * num_tokens


def head_flops(architecture: ModelArchitecture, *, num_rows: float) -> float:
    """Returns the operations of the output head on `num_rows` rows."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size * num_rows
