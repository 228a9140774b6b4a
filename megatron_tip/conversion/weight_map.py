"""A table of the Hugging Face tensors that make up each Megatron parameter: names, shapes, sharding.

Megatron's names are those of its checkpoints, where the norm before a projection belongs to the projection
(`self_attention.linear_qkv.layer_norm_weight`). Transformer Engine layers use these names; `checkpoint_name` maps the
names of local layers to them.
"""

from dataclasses import dataclass

from megatron_tip.conversion.architecture import ModelArchitecture


@dataclass(frozen=True)
class WeightMap:
    """One Megatron parameter and its Hugging Face tensors.

    `hf_names`, `hf_shapes`: the tensors, in order. `partition_dim`: the dimension along which the tensor-parallel ranks
    shard it, as Megatron's attribute of that name; None: each rank holds all of it. `num_units`: the tensors are cut
    along dimension 0 into this many equal units each, and unit u of the first is followed by unit u of the second and
    so on (queries, keys and values of each query group); None: one unit per rank (gate and up). `layer`: the decoder
    layer it belongs to; None: before or after the layers.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    partition_dim: int | None = None
    num_units: int | None = None
    layer: int | None = None


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
    hidden, ffn, head_dim = architecture.hidden_size, architecture.ffn_hidden_size, architecture.head_dim
    q_size = architecture.num_attention_heads * head_dim
    kv_size = architecture.num_query_groups * head_dim

    def weight(
        name: str, hf: dict[str, tuple[int, ...]], partition_dim: int | None = None, num_units: int | None = None
    ) -> WeightMap:
        hf_names = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf)
        return WeightMap(
            f"decoder.layers.{layer}.{name}", hf_names, tuple(hf.values()), partition_dim, num_units, layer
        )

    def qkv(kind: str, *columns: int) -> WeightMap:
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        hf = {f"self_attn.{name}.{kind}": (rows, *columns) for name, rows in sizes.items()}
        return weight(f"self_attention.linear_qkv.{kind}", hf, 0, architecture.num_query_groups)

    gate_up = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    weights = [
        weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (hidden,)}),
        qkv("weight", hidden),
        weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, q_size)}, 1),
        weight("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (hidden,)}),
        weight("mlp.linear_fc1.weight", gate_up, 0),
        weight("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, ffn)}, 1),
    ]
    if architecture.qkv_bias:
        weights.append(qkv("bias"))
    if architecture.qk_norm:
        weights.append(weight("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": (head_dim,)}))
        weights.append(weight("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": (head_dim,)}))
    return weights
