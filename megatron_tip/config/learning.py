"""Which tokens are trained, on what and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_tip.config.section import MAX_SUPPORT_SIZE, Section


class SelectionConfig(Section):
    """Which tokens are supervised."""

    rule: str = "ta_opd_teachability"
    """A preset of megatron_tip.selection, an installed package's rule, or "package.module:function" for your own."""
    retention_ratio: float = Field(default=0.05, gt=0, le=1)
    """The share rho of valid response tokens that is kept."""
    scope: Literal["auto", "batch", "rollout", "micro_batch"] = "auto"
    """Over what the budget holds; auto: what the preset's paper says. micro_batch: one pass, no scoring forward."""
    thresholds: Literal["this_step", "last_step"] = "this_step"
    """Whose quantiles and threshold decide; last_step: one pass, the budget met on average, with scope = "batch"."""
    normaliser: Literal["auto", "robust", "clipped_min_max", "min_max", "raw"] = "auto"
    """How statistics are put on one scale before they are scored; auto: what the preset's paper says."""
    tie_break: Literal["token_order", "random"] = "token_order"
    """Which of equal scores are kept: the first in (prompt, rollout, position), or a seeded draw."""
    minimum_per_rollout: int = Field(default=1, ge=0)
    """Tokens kept of a rollout so short that its share rounds down to less; with scope = "rollout"."""
    support_size: int = Field(default=16, ge=1, le=MAX_SUPPORT_SIZE)
    """K of the top-K supports (TA-OPD: 16)."""
    loss_scale: Literal["selected", "valid", "importance"] = "selected"
    """Divide the loss by the number of selected tokens, by that of valid ones, or weight sampled tokens by 1 / p."""
    compare: bool = True
    """Log how far the other rules would have agreed with this one, as far as the statistics allow."""

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of `selection.Selector` but for its seed, which is the run's. It calls "auto" None."""
        return {name: None if value == "auto" else value for name, value in self if name != "support_size"}


class LossConfig(Section):
    """What the selected tokens are trained on."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "topk_reverse_kl"] = "reverse_kl"
    """Over the full vocabulary, exact under tensor parallelism; sampled_token: log p(y) - log q(y) of the label;
    topk_reverse_kl, of a teacher behind servers: ids whose teacher logprob is not known count as one."""
    jsd_beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the generalised Jensen-Shannon divergence, with divergence = "jsd"."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of student and teacher alike, in statistics and loss."""
    chunk_rows: int = Field(default=0, ge=0)
    """Rows of logits alive at once; 0: chosen from the shapes."""
    compile: bool = False
    """Put the arithmetic on logits, of statistics and loss, through torch.compile: one pass over them in place of a
    dozen, after a minute of compiling. Meant for GPUs; no GPU has run it yet: compare a step's metrics with the plain
    ones first."""


class OptimizerConfig(Section):
    """Megatron's AdamW."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; not applied to norms and biases."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm over all parameters; 0: no clipping."""
    distributed: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""


class TrainingConfig(Section):
    """The loop."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Padded tokens that go through the model together; a longer sequence makes a micro-batch of its own."""
