"""A table of the Hugging Face tensors that make up each Megatron parameter: names, shapes, sharding.

Megatron's names are those of its checkpoints, where the norm before a projection belongs to the projection
(`self_attention.linear_qkv.layer_norm_weight`). Transformer Engine layers use these names; `checkpoint_name` maps the
names of local layers to them. An expert is named by its number in the whole layer, as in Megatron's checkpoints of
single experts.
"""

from dataclasses import dataclass
from functools import partial

from megatron_tip.conversion.architecture import ModelArchitecture


@dataclass(frozen=True)
class WeightMap:
    """One Megatron parameter and its Hugging Face tensors.

    `hf_names`, `hf_shapes`: the tensors, in order. `partition_dim`: the dimension along which the tensor-parallel ranks
    shard it, as Megatron's attribute of that name; None: each rank holds all of it. `num_units`: the tensors are cut
    along dimension 0 into this many equal units each, and unit u of the first is followed by unit u of the second and
    so on (queries, keys and values of each query group); None: one unit per rank (gate and up). `layer`: the decoder
    layer it belongs to; None: before or after the layers. `expert`: the expert of that layer, whose shards lie on the
    experts' own ranks; None: not an expert's.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    partition_dim: int | None = None
    num_units: int | None = None
    layer: int | None = None
    expert: int | None = None


def checkpoint_name(name: str) -> str:
    """Returns Megatron's checkpoint name of a parameter of local or Transformer Engine layers."""
    for local, fused in _FUSED_NORMS.items():
        name = name.replace(local, fused)
    return name


_FUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


def output_head(architecture: ModelArchitecture) -> WeightMap:
    """Returns the weight that turns hidden states into logits: its own, or the word embeddings if they are tied."""
    name = "model.embed_tokens.weight" if architecture.tied_embeddings else "lm_head.weight"
    shape = (architecture.vocab_size, architecture.hidden_size)
    return WeightMap("output_layer.weight", (name,), (shape,), partition_dim=0)


def weight_maps(architecture: ModelArchitecture) -> list[WeightMap]:
    """Returns every parameter of the model once, from the embeddings to the head, without a tied head."""
    shape = (architecture.vocab_size, architecture.hidden_size)
    embedding = WeightMap("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (shape,), partition_dim=0)
    final_norm = WeightMap("decoder.final_layernorm.weight", ("model.norm.weight",), ((architecture.hidden_size,),))
    layers = [weight for layer in range(architecture.num_layers) for weight in _layer(architecture, layer)]
    head = [] if architecture.tied_embeddings else [output_head(architecture)]
    return [embedding, *layers, final_norm, *head]


def hf_shapes(architecture: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every Hugging Face tensor of the model, in the order of `weight_maps`."""
    return {
        name: shape
        for weight in weight_maps(architecture)
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    }


def _layer(architecture: ModelArchitecture, layer: int) -> list[WeightMap]:
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    weight = partial(_weight, layer)
    q_size = architecture.num_attention_heads * head_dim
    kv_size = architecture.num_query_groups * head_dim

    def qkv(kind: str, *columns: int) -> WeightMap:
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        hf = {f"self_attn.{name}.{kind}": (rows, *columns) for name, rows in sizes.items()}
        return weight(f"self_attention.linear_qkv.{kind}", hf, 0, architecture.num_query_groups)

    weights = [
        weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (hidden,)}),
        qkv("weight", hidden),
        weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, q_size)}, 1),
        *_feed_forward(architecture, layer),
    ]
    if architecture.qkv_bias:
        weights.append(qkv("bias"))
    if architecture.qk_norm:
        weights.append(weight("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": (head_dim,)}))
        weights.append(weight("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": (head_dim,)}))
    return weights


def _feed_forward(architecture: ModelArchitecture, layer: int) -> list[WeightMap]:
    """Returns the norm and the matrices after a layer's attention: one set of matrices, or the router and experts."""
    hidden, experts = architecture.hidden_size, architecture.experts
    norm = {"post_attention_layernorm.weight": (hidden,)}
    if experts is None or not architecture.has_experts(layer):
        fused_norm = _weight(layer, "mlp.linear_fc1.layer_norm_weight", norm)
        return [fused_norm, *_matrices(layer, "mlp", hidden, architecture.ffn_hidden_size)]
    router = {"mlp.gate.weight": (experts.num_experts, hidden)}
    weights = [_weight(layer, "pre_mlp_layernorm.weight", norm), _weight(layer, "mlp.router.weight", router)]
    for expert in range(experts.num_experts):
        weights += _matrices(layer, f"mlp.experts.{expert}", hidden, experts.ffn_hidden_size, expert=expert)
    if experts.shared_ffn_hidden_size:
        gate = {"mlp.shared_expert_gate.weight": (1, hidden)}
        weights += [
            *_matrices(layer, "mlp.shared_experts", hidden, experts.shared_ffn_hidden_size, "mlp.shared_expert"),
            _weight(layer, "mlp.shared_experts.gate_weight", gate),
        ]
    return weights


def _matrices(
    layer: int, name: str, hidden: int, ffn: int, hf_name: str = "", expert: int | None = None
) -> list[WeightMap]:
    """Returns the two matrices of Megatron's `name`, which `hf_name`, or `name` too, has as three."""
    hf_name = hf_name or name
    gate_up = {f"{hf_name}.gate_proj.weight": (ffn, hidden), f"{hf_name}.up_proj.weight": (ffn, hidden)}
    return [
        _weight(layer, f"{name}.linear_fc1.weight", gate_up, 0, expert=expert),
        _weight(layer, f"{name}.linear_fc2.weight", {f"{hf_name}.down_proj.weight": (hidden, ffn)}, 1, expert=expert),
    ]


def _weight(
    layer: int,
    name: str,
    hf: dict[str, tuple[int, ...]],
    partition_dim: int | None = None,
    num_units: int | None = None,
    expert: int | None = None,
) -> WeightMap:
    hf_names = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf)
    name = f"decoder.layers.{layer}.{name}"
    return WeightMap(name, hf_names, tuple(hf.values()), partition_dim, num_units, layer, expert)
