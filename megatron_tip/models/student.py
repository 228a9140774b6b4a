"""The student under training: a GPT stage in Megatron's data-parallel wrapper, its head, and its optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_tip import config as configuration
from megatron_tip.errors import NotFiniteError
from megatron_tip.models.gpt import output_head_weight
from megatron_tip.models.hidden_states import masked_rows
from megatron_tip.models.pipeline import LastStage, run_forward, run_forward_backward, token_multiple
from megatron_tip.models.router import set_step_tokens
from megatron_tip.parallel.groups import ModelGroups
from megatron_tip.records import MicroBatch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""Megatron's names of the types of an optimizer's state; 8 bits are held as bytes, with a scale beside them."""


class GradientBuffers:
    """The gradient buffers as a `Movable`: freed and made anew by Megatron, as their content is zeroed before use."""

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._wrapped = wrapped

    def to_host(self) -> int:
        """Frees the buffers, copying nothing; the parameters' views of them stay valid objects."""
        self._wrapped.offload_grad_buffers(synchronize=False, empty_cache=False)
        return 0

    def to_device(self) -> int:
        """Allocates the buffers again, with zeros."""
        self._wrapped.restore_grad_buffers(synchronize=False)
        return 0


@dataclass(frozen=True)
class Student:
    """The student's stage on this rank. `clip_grad`: limit of the gradient norm over all parameters; 0: no clipping."""

    model: GPTModel
    wrapped: DistributedDataParallel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    groups: ModelGroups
    clip_grad: float

    @property
    def output_head(self) -> Tensor:
        """`[V_padded / tp, H]`: this rank's shard of the LM head; on the last stage only."""
        return output_head_weight(self.model)

    @property
    def token_multiple(self) -> int:
        """Divisor of a micro-batch's tokens."""
        return token_multiple(self.model)

    def rows(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Returns the last stage's output where `mask` `[s]` holds, `[n, H]`."""
        sequence_parallel = get_model_config(self.model).sequence_parallel
        return masked_rows(hidden_states, mask, tp_group=self.groups.tp_group, sequence_parallel=sequence_parallel)

    def forward(
        self, micro_batches: Sequence[MicroBatch], on_hidden_states: LastStage, *, held: list[Tensor] | None = None
    ) -> None:
        """Runs the micro-batches forward, without gradient unless `held` takes the outputs; see `run_forward`."""
        if held is not None:  # the auxiliary loss of experts is part of the graph that is held
            set_step_tokens(self.model, micro_batches, self.groups.dp_cp_group)
        run_forward(self.wrapped, self.groups, micro_batches, on_hidden_states, held=held)

    def accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], loss_of: LastStage, *, held: list[Tensor] | None = None
    ) -> None:
        """Zeroes the gradients, then accumulates and reduces the summed loss's; see `run_forward_backward`."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        if held is None:
            set_step_tokens(self.model, micro_batches, self.groups.dp_cp_group)
        run_forward_backward(self.wrapped, self.groups, micro_batches, loss_of, held=held)

    def optimizer_tensors(self) -> list[Tensor]:
        """Returns the tensors that only the optimizer needs: moments, and float32 copies of reduced weights.

        Weights that the optimizer updates in place, which are the model's, are left out.
        """
        model = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        found: list[Tensor] = []
        for part in self.optimizer.chained_optimizers:
            inner: Any = part.optimizer
            found += [parameter for group in inner.param_groups for parameter in group["params"]]
            found += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        return [tensor for tensor in found if tensor.untyped_storage().data_ptr() not in model]

    def apply_gradients(self, step: int) -> dict[str, float]:
        """Clips gradients, steps optimizer and schedule; returns gradient norm and learning rate.

        These are the stages of Megatron's ChainedOptimizer.step, with a check between norm and update.

        Raises:
            NotFiniteError: on all ranks; the gradient is not finite. Weights, optimizer and schedule are unchanged.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise NotFiniteError(f"step {step}: expected a finite gradient norm, got {grad_norm}; nothing was updated")
        if self.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                parameters: list[Tensor] = [*part.get_parameters()]
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=self.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return {"train/grad_norm": grad_norm, "train/lr": lr}


def build_student(
    model: GPTModel, groups: ModelGroups, settings: configuration.OptimizerConfig, *, num_steps: int
) -> Student:
    """Wraps a loaded stage for training: gradient buffers, AdamW, warm-up and cosine decay over `num_steps`."""
    wrapped = _wrapped(model, groups, settings)
    optimizer = get_megatron_optimizer(
        _optimizer_config(get_model_config(model).params_dtype, settings),
        [wrapped],
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        # Starts warm-up one increment above zero: a first step at zero would change nothing.
        init_lr=settings.lr / (settings.warmup_steps + 1),
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        # The run's settings win over a checkpoint's: `same_run` lets only the number of steps change.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    assert isinstance(optimizer, ChainedOptimizer), "Megatron chains the optimizers of its parameter kinds"
    return Student(model, wrapped, optimizer, scheduler, groups, settings.clip_grad)


def _wrapped(model: GPTModel, groups: ModelGroups, settings: configuration.OptimizerConfig) -> DistributedDataParallel:
    """Returns the stage with its gradient buffers, which the schedule reduces over the dp x cp ranks."""
    model_config = get_model_config(model)
    model_config.finalize_model_grads_func = _finalize_gradients
    wrapped = DistributedDataParallel(
        model_config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=settings.main_grads_dtype == "fp32",
            use_distributed_optimizer=settings.distributed,
            overlap_grad_reduce=settings.overlap_grad_reduce,
        ),
        model,
        pg_collection=groups.collection,
    )
    if settings.overlap_grad_reduce:  # only the last micro-batch's gradients are complete
        model_config.no_sync_func = wrapped.no_sync
    return wrapped


def _optimizer_config(params_dtype: torch.dtype, settings: configuration.OptimizerConfig) -> OptimizerConfig:
    """Returns Megatron's settings of AdamW for weights of `params_dtype`."""
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=settings.distributed,
        use_precision_aware_optimizer=settings.use_precision_aware_optimizer,
        main_grads_dtype=_DTYPES[settings.main_grads_dtype],
        main_params_dtype=_DTYPES[settings.main_params_dtype],
        exp_avg_dtype=_DTYPES[settings.exp_avg_dtype],
        exp_avg_sq_dtype=_DTYPES[settings.exp_avg_sq_dtype],
    )


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **arguments: Any) -> None:
    """Runs Megatron's reduction of gradients over dp x cp, tied embeddings over pp and norms over tp, undivided.

    The loss's row weights already include the division by the global count.
    """
    finalize_model_grads(model, None, **arguments)
