"""Counts of an architecture's parameters and floating-point operations, from its shape."""

from megatron_tip.conversion.architecture import ModelArchitecture


def layer_parameters(architecture: ModelArchitecture) -> int:
    """Returns the number of parameters of one decoder layer."""
    a = architecture
    query, key_value = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (query + 2 * key_value) + query * a.hidden_size
    biases = (query + 2 * key_value) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    feed_forward = 3 * a.hidden_size * a.ffn_hidden_size
    return attention + biases + feed_forward + 2 * a.hidden_size


def num_parameters(architecture: ModelArchitecture) -> int:
    """Returns the number of parameters of the whole model; tied embeddings count once."""
    a = architecture
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    return a.num_layers * layer_parameters(a) + a.hidden_size + embeddings


def forward_flops(architecture: ModelArchitecture, *, num_tokens: float, mean_length: float) -> float:
    """Returns the operations of a forward pass through all layers, without the embedding and the output head.

    A multiply-add counts as two. Causal attention sees half of its sequence on average: 2 x 2 x heads x head_dim x
    length / 2 per token and layer, with `mean_length` in place of each sequence's own length (exact for equal lengths).
    """
    a = architecture
    dense = layer_parameters(a) - 2 * a.hidden_size
    attention = a.num_attention_heads * a.head_dim * mean_length
    return 2.0 * a.num_layers * (dense + attention) * num_tokens


def head_flops(architecture: ModelArchitecture, *, num_rows: float) -> float:
    """Returns the operations of the output head on `num_rows` rows."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size * num_rows
