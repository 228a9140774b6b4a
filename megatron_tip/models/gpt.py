"""One pipeline stage of a Megatron-Core GPT model, built from a Hugging Face architecture."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_tip.conversion.architecture import ModelArchitecture, RopeScaling
from megatron_tip.cpu.onednn import use_faster_products
from megatron_tip.errors import ConfigError
from megatron_tip.models.layers import local_block
from megatron_tip.models.layout import check_layout
from megatron_tip.models.recompute import keep_only_inputs
from megatron_tip.models.router import forget_probabilities, use_router
from megatron_tip.models.stage_layers import StageLayers
from megatron_tip.models.transformer_engine import has_transformer_engine, transformer_engine_block
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups

TransformerImpl = Literal["auto", "local", "transformer_engine"]
Fp8 = Literal["none", "e4m3", "hybrid"]


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns its final hidden states instead of logits.

    Only selected rows are multiplied with the LM head, outside of the model. The last stage's output is `[s, 1, h]`,
    after the final norm; `[s / tp, 1, h]` with sequence parallelism. With context parallelism `s` is that of a part.
    """

    def _preprocess(self, *arguments: Any, padding_mask: Tensor | None = None, **others: Any) -> tuple[Any, ...]:
        """Returns what Megatron's method does, with this rank's part of the padding mask `[1, s]` on every stage.

        Megatron 0.16's own shards it on the first stage only, and over its global groups, which we do not create.
        """
        prepared = super()._preprocess(*arguments, **others)
        if padding_mask is not None and self.config.sequence_parallel:
            group: Any = self.tp_group
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return (*prepared[:5], padding_mask, *prepared[6:])

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: Any = None,
    ) -> None:
        """Declares the last stage's copy of tied embeddings a replica of the first stage's in a checkpoint.

        Megatron 0.16's own method takes the data-parallel rank from its global groups, which we do not create.
        """
        if self.pre_process or not self.post_process:
            return
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            self.shared_embedding_or_output_weight(),
            first_stage_word_emb_key,
            replica_id=(1, 0, metadata["dp_cp_group"].rank()),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def prepare_megatron() -> None:
    """Sets up the process state that Megatron-Core expects. Further calls do nothing.

    This is a random tracker that forks no CUDA generator (there is no dropout), the buffer of its sequence-parallel
    layers and, without a CUDA device, the CPU in its place, with the processor's faster matrix products.
    """
    if not torch.cuda.is_available():
        from megatron_tip.cpu import cuda_on_cpu, expert_dispatch

        cuda_on_cpu.install()
        expert_dispatch.install()
        use_faster_products()
    initialize_rng_tracker(inference_rng_tracker=True)
    if not moe_utils.HAVE_TE:  # Megatron 0.16's router asks for it even then, without having defined it
        moe_utils.te_general_gemm = None
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def build_gpt(
    architecture: ModelArchitecture,
    groups: ModelGroups,
    *,
    padded_vocab_size: int,
    dtype: torch.dtype,
    transformer_impl: TransformerImpl = "auto",
    sequence_parallel: bool = False,
    recompute: Sequence[str] = (),
    fp8: Fp8 = "none",
    trainable: bool = True,
) -> HiddenStatesModel:
    """Returns this rank's stage with unset weights (`conversion.bridge.load_hf` sets them).

    It is on the current CUDA device, or on the CPU without one. `padded_vocab_size`: a multiple of the tp size, at
    least the architecture's. `recompute`: what runs again in the backward pass (`keep_only_inputs`). `fp8`: of
    Transformer Engine's products. `trainable=False` (the teacher): no gradients, and no LM head on the last stage.

    Collective over the first and last stage if a trainable model's embeddings are tied (Megatron's own collective).

    Raises:
        ConfigError: the layout (`check_layout`) or the padded vocabulary does not fit.
        OptionalDependencyError: Transformer Engine was requested and is not installed.
    """
    _check_sizes(architecture, groups.grid, padded_vocab_size)
    prepare_megatron()
    use_transformer_engine = resolve_transformer_impl(transformer_impl, dtype) == "transformer_engine"
    block = transformer_engine_block if use_transformer_engine else local_block
    layers: Any = block(_num_experts(architecture, groups), qk_norm=architecture.qk_norm)
    use_router(layers)
    model = HiddenStatesModel(
        _transformer_config(
            architecture,
            groups,
            dtype=dtype,
            use_transformer_engine=use_transformer_engine,
            sequence_parallel=sequence_parallel,
            fp8=fp8,
        ),
        layers,
        vocab_size=padded_vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=architecture.tied_embeddings and trainable,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]
        pg_collection=groups.collection,
    )
    _scale_rope(model, architecture.rope_scaling)
    _mark_tensor_parallel(model)
    _mark_experts(model)
    forget_probabilities(model)
    if torch.cuda.is_available():
        model.cuda()  # the routers' weights: Megatron makes them on the host
    keep_only_inputs(model, recompute)
    if not trainable:
        if groups.is_last_stage:
            model.output_layer = None  # pyright: ignore[reportAttributeAccessIssue]
        model.requires_grad_(False).eval()
    return model


def _check_sizes(architecture: ModelArchitecture, grid: ModelGrid, padded_vocab_size: int) -> None:
    check_layout(
        architecture,
        tp_size=grid.tp_size,
        pp_size=grid.pp_size,
        owner="model",
        ep_size=grid.ep_size,
        expert_tp_size=grid.expert_tp_size if architecture.experts else 0,
        pipeline_layers=grid.pipeline_layers,
    )
    if padded_vocab_size % grid.tp_size or padded_vocab_size < architecture.vocab_size:
        raise ConfigError(
            f"padded_vocab_size: expected a multiple of tp {grid.tp_size}, at least {architecture.vocab_size}, "
            f"got {padded_vocab_size}"
        )


def resolve_transformer_impl(
    transformer_impl: TransformerImpl, dtype: torch.dtype
) -> Literal["local", "transformer_engine"]:
    """Returns what "auto" stands for: Transformer Engine for bfloat16 on a GPU, if it is installed, else local layers.

    In float32 Transformer Engine has no kernel for packed sequences.
    """
    if transformer_impl != "auto":
        return transformer_impl
    usable = torch.cuda.is_available() and has_transformer_engine() and dtype == torch.bfloat16
    return "transformer_engine" if usable else "local"


def output_head_weight(model: GPTModel) -> torch.nn.Parameter:
    """Returns the LM head `[v / tp, h]`, on the last stage of a student only.

    With tied embeddings it is the embedding itself or, with pp > 1, the last stage's copy, whose gradient Megatron adds
    to the first stage's (`finalize_model_grads`).
    """
    assert model.post_process, "the LM head is on the last stage"
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()  # pyright: ignore[reportReturnType]
    return model.output_layer.weight  # pyright: ignore[reportReturnType]


def _transformer_config(
    architecture: ModelArchitecture,
    groups: ModelGroups,
    *,
    dtype: torch.dtype,
    use_transformer_engine: bool,
    sequence_parallel: bool,
    fp8: Fp8,
) -> TransformerConfig:
    on_gpu = torch.cuda.is_available()
    counts = groups.grid.pipeline_layers
    experts = {}
    if architecture.experts is not None:
        experts = _experts_config(architecture, groups.grid, grouped=use_transformer_engine)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.grid.tp_size,
        pipeline_model_parallel_size=groups.grid.pp_size,
        pipeline_model_parallel_layout=StageLayers(counts, groups.pp_rank) if len(counts) > 1 else None,
        context_parallel_size=groups.grid.cp_size,
        sequence_parallel=sequence_parallel and groups.grid.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=None if fp8 == "none" else fp8,
        fp8_recipe="tensorwise",  # "delayed" would share its history in Megatron's global groups, which do not exist
        variable_seq_lengths=groups.grid.pp_size > 1,
        moe_token_dispatcher_type="alltoall",  # without experts too: the default is refused with variable lengths
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # needs an extension that only a source build of Apex has
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_gpu and use_transformer_engine,
        **experts,
    )


def _experts_config(architecture: ModelArchitecture, grid: ModelGrid, *, grouped: bool) -> dict[str, Any]:
    """Returns Megatron's settings of the experts. `grouped`: with Transformer Engine's grouped products."""
    experts = architecture.experts
    assert experts is not None, "for models with experts"
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(architecture.has_experts(layer)) for layer in range(architecture.num_layers)],
        "moe_router_topk": experts.num_active,
        # The softmax of the chosen logits is the chosen part of the softmax of all, made to sum to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,  # a student may set it: `router.set_auxiliary_loss`
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_ffn_hidden_size > 0,
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
        "expert_model_parallel_size": grid.ep_size,
        "expert_tensor_parallel_size": grid.expert_tp_size,
    }


def _num_experts(architecture: ModelArchitecture, groups: ModelGroups) -> list[int]:
    """Returns the number of experts of each layer of this rank's stage; 0 for a layer without."""
    count = architecture.experts.num_experts if architecture.experts else 0
    stages = groups.grid.layers_of_stages(architecture.num_layers)
    return [count * architecture.has_experts(layer) for layer in stages[groups.pp_rank]]


def _scale_rope(model: GPTModel, scaling: RopeScaling | None) -> None:
    """Scales rotary frequencies after construction: Megatron's constructor only takes llama3's factor."""
    if scaling is None:
        return
    rope: Any = model.rotary_pos_emb
    if scaling.kind == "linear":
        rope.inv_freq = rope.inv_freq / scaling.factor
    else:
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Marks sharded weights, which Megatron does only when it initialises them.

    Unmarked, they would count as replicas, and the gradient norm would omit all ranks but the first.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            stride = 2 if name.endswith("linear_fc1") else 1  # gate and up, stacked
            set_tensor_model_parallel_attributes(module.weight, True, dim, stride)


def _mark_experts(model: GPTModel) -> None:
    """Marks the experts' weights: sharded, and reduced over the experts' own data-parallel ranks.

    Megatron marks the latter only with ep > 1. But with expert tp below tp and ep = 1, too, a weight has its copies on
    tensor-parallel ranks, each of which sees other tokens. And with the same marks in every layout, the optimizer has
    the same two parts in each, so that a checkpoint can be read in any other.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            experts: Any = module.experts
            for key, parameter in experts.named_parameters():
                is_first = ".linear_fc1." in f".{key}"
                if not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, 0 if is_first else 1, 2 if is_first else 1)
                parameter.allreduce = False
