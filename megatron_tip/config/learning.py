"""Which tokens are trained, and how."""

from typing import Any, Literal

from pydantic import Field

from megatron_tip.config.section import MAX_SUPPORT_SIZE, Section


class SelectionConfig(Section):
    """Which tokens are supervised."""

    rule: str = "ta_opd_teachability"
    """One of: full, random; ta_opd_teachability, ta_opd_teachability_lower_bound, ta_opd_entropy, ta_opd_divergence,
    ta_opd_compatibility, ta_opd_soft_or, ta_opd_incompatible, ta_opd_entropy_teachability, ta_opd_q3_only,
    ta_opd_q3_high_compatibility, ta_opd_q3_low_compatibility, ta_opd_q3_high_teachability, ta_opd_q3_low_teachability,
    ta_opd_q3_high_incompatible; tip_entropy, tip_divergence, tip_soft_or, tip_q3_only, each also with _bottom;
    tip_entropy_sampling; with weights or a budget of their own eopd, iw_opd, prefix, first_segment, selectkd, se_kd,
    se_kd_entropy_kl, se_kd_ce_ratio, tsd_kd, fire, sod. Or an installed package's rule, or your own as
    "module:function", from a module that lies beside the run's TOML or can be imported. Equations:
    docs/selection.md."""
    retention_ratio: float = Field(default=0.05, gt=0, le=1)
    """Share rho of the valid response tokens that is kept. Rules that keep all of them (full, eopd, iw_opd and
    others) do not read it."""
    adaptive_ratio: bool = False
    """Let the ratio follow the loss, from retention_ratio on, as AdaKD does."""
    parameters: dict[str, float] = Field(default={})
    """Constants of the preset's weights, in place of the published ones: { tokens = 128 }."""
    scope: Literal["auto", "batch", "rollout", "whole_rollouts"] = "auto"
    """What the budget is a share of; auto: as in the preset's paper; whole_rollouts: rollouts are kept or dropped as a
    whole."""
    passes: Literal["auto", "one", "two"] = "auto"
    """Forward passes of the student per step; both ways train the same tokens with the same gradients. two: score
    without gradient, then train on sequences cut after their last selected token. one: score with gradient, hold the
    activations of all micro-batches and go backward from the selected tokens; needs model.pipeline_parallel_size = 1.
    auto: one where the activations fit into memory and the cut is expected to save less than the second pass costs;
    with model.moe_aux_loss_coeff always two."""
    normaliser: Literal["auto", "robust", "clipped_min_max", "min_max", "raw"] = "auto"
    """How statistics are scaled before they are scored; auto: as in the preset's paper."""
    tie_break: Literal["token_order", "random"] = "token_order"
    """Which of equal scores are kept: the first by (prompt, rollout, position), or a seeded draw."""
    minimum_per_rollout: int = Field(default=1, ge=0)
    """With scope = "rollout": tokens kept of a rollout so short that its share would round down to fewer."""
    support_size: int = Field(default=16, ge=1, le=MAX_SUPPORT_SIZE)
    """K of the top-K supports (TA-OPD: 16)."""
    loss_scale: Literal["selected", "valid", "importance"] = "selected"
    """Divide the loss by the number of selected or of valid tokens, or weight sampled tokens by 1 / p."""
    compare: bool = True
    """Log how far the other rules agree with this one, as far as the statistics allow."""

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of `selection.Selector` except the seed, which is the run's; "auto" becomes None."""
        others = ("support_size", "passes")
        return {name: None if value == "auto" else value for name, value in self if name not in others}


class LossConfig(Section):
    """The loss of the selected tokens."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "topk_reverse_kl"] = "reverse_kl"
    """Over the full vocabulary, exact under tensor parallelism. sampled_token: log p(y) - log q(y) of the label.
    topk_reverse_kl, for a teacher behind servers: all ids with unknown teacher logprob count as one id."""
    jsd_beta: float = Field(default=0.5, ge=0, le=1)
    """With divergence = "jsd": beta of the generalised Jensen-Shannon divergence."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both student and teacher, in statistics and loss."""
    chunk_rows: int = Field(default=0, ge=0)
    """Rows of logits in memory at once; 0: chosen from the shapes and the device."""
    kernels: Literal["auto", "triton", "eager", "compiled"] = "auto"
    """What does the arithmetic on logits, in statistics and loss. triton: one pass over them instead of a dozen; eager:
    plain torch; compiled: torch.compile; auto: triton on a GPU where it works, else eager. No GPU has run triton and
    compiled yet: first compare a step's metrics with those of eager."""


class OptimizerConfig(Section):
    """Megatron's AdamW."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; not applied to norms and biases."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm over all parameters; 0: no clipping."""
    distributed: bool = False
    """Shard the optimizer state over the ranks with the same part of the model, data- and context-parallel."""
    overlap_grad_reduce: bool = False
    """Megatron's: sum gradients over these ranks bucket by bucket while the backward pass still runs."""
    use_precision_aware_optimizer: bool = False
    """Megatron's: Transformer Engine's AdamW, its state of the types below. Needs distributed, bfloat16 and a GPU."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """With use_precision_aware_optimizer: type of the gradients that are summed."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """With use_precision_aware_optimizer: type of the optimizer's own copy of the weights."""
    exp_avg_dtype: Literal["fp32", "fp16", "fp8"] = "fp32"
    """With use_precision_aware_optimizer: type of the first moment."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "fp8"] = "fp32"
    """With use_precision_aware_optimizer: type of the second moment."""


class TrainingConfig(Section):
    """The training loop."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Tokens that go through the model together, packed end to end; a longer sequence gets its own micro-batch."""
    offload: Literal["none", "teacher", "optimizer", "all"] = "none"
    """What waits in pinned host memory while no phase needs it: the teacher, unless it scores; optimizer: its state,
    and the gradients, which are freed, unless the student trains."""
