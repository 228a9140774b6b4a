"""Checks of the settings in less than 16 bits, which only Transformer Engine on a GPU can run."""

from importlib.util import find_spec

import torch

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine

_STATE_TYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_FIRST_WITH_FP8 = (8, 9)
"""The compute capability of the first GPUs with 8-bit tensor cores, Ada."""
_FP8_CHANNELS = 16
"""Transformer Engine's 8-bit products take rows of a multiple of these channels."""


def check_precision(config: Config, teacher: ModelArchitecture | None, machine: Machine) -> None:
    """Refuses types of the optimizer's state and of the teacher's products that the run's layers cannot take.

    Args:
        teacher: None for one behind servers.

    Raises:
        ConfigError: names the setting.
    """
    _check_optimizer(config)
    _check_teacher(config, teacher)
    if machine.is_elsewhere:
        return
    if config.optimizer.use_precision_aware_optimizer:
        _require_transformer_engine("optimizer.use_precision_aware_optimizer: expected false")
    if config.teacher.fp8 != "none":
        setting = f'teacher.fp8: expected "none", got "{config.teacher.fp8}"'
        _require_transformer_engine(setting)
        if torch.cuda.get_device_capability() < _FIRST_WITH_FP8:
            raise ConfigError(f"{setting}; {torch.cuda.get_device_name()} has no products in 8 bits")


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if not optimizer.use_precision_aware_optimizer:
        for name in _STATE_TYPES:
            if getattr(optimizer, name) != "fp32":
                raise ConfigError(
                    f'optimizer.{name}: expected "fp32" without optimizer.use_precision_aware_optimizer, got '
                    f'"{getattr(optimizer, name)}"; set both'
                )
        return
    if not optimizer.distributed:
        raise ConfigError("optimizer.use_precision_aware_optimizer: expected optimizer.distributed = true; set it")
    if config.model.dtype == "float32":
        raise ConfigError(
            'optimizer.use_precision_aware_optimizer: expected model.dtype = "bfloat16" or "auto", got "float32"; its '
            "weights have no second copy to shrink"
        )


def _check_teacher(config: Config, architecture: ModelArchitecture | None) -> None:
    teacher = config.teacher
    if teacher.fp8 == "none":
        return
    if architecture is None:
        raise ConfigError(
            f'teacher.fp8: expected "none" with teacher.kind = "{teacher.kind}", got "{teacher.fp8}"; the servers '
            "choose the teacher's types"
        )
    if teacher.transformer_impl == "local" or teacher.dtype == "float32":
        raise ConfigError(
            f'teacher.fp8: expected "none" with teacher.transformer_impl = "{teacher.transformer_impl}" and '
            f'teacher.dtype = "{teacher.dtype}", got "{teacher.fp8}"; only Transformer Engine has '
            "products in 8 bits, in layers of bfloat16"
        )
    tp_size = teacher.tensor_parallel_size
    for name, channels in (
        ("hidden channels", architecture.hidden_size),
        ("attention channels per rank", architecture.num_attention_heads * architecture.head_dim // tp_size),
        ("feed-forward channels per rank", architecture.ffn_hidden_size // tp_size),
    ):
        if channels % _FP8_CHANNELS:
            raise ConfigError(
                f'teacher.fp8: expected "none" for a teacher with {channels} {name}, got "{teacher.fp8}"; products in '
                f"8 bits need a multiple of {_FP8_CHANNELS}, so unset it or change teacher.tensor_parallel_size"
            )


def _require_transformer_engine(setting: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting} without a GPU; unset it")
    if find_spec("transformer_engine") is None:
        raise ConfigError(
            f"{setting} without Transformer Engine; install the extra megatron_tip[transformer-engine], or unset it"
        )
