"""Workers for the conversion commands; together they hold the shards of one model."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from megatron_tip.errors import MegatronTipError
from megatron_tip.parallel.environment import is_worker
from megatron_tip.parallel.launch import run_worker, start_workers

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def run_in_workers(check: Callable[[], Any], work: Callable[[], None], num_workers: int) -> None:
    """Runs `work` in each of `num_workers` processes: starts them here, or joins those of torchrun or srun.

    A worker that is started here runs the same command again, and so reaches this function itself. `check` runs before
    any worker starts. If either fails, the process ends with a message.
    """
    if is_worker(os.environ):
        run_worker(work)
        return
    try:
        check()
        outcome = start_workers([sys.executable, *sys.argv], num_workers)
    except MegatronTipError as error:
        sys.exit(f"error: {error}")
    if outcome.exit_code:
        sys.stderr.write(f"error: {outcome.message}\n")
        sys.exit(outcome.exit_code)


def check_conversion(source, target: Path, tp_size: int, pp_size: int) -> None:
    """Refuses a layout that `source`, a ModelFolder, rules out, and a `target` that exists."""
    from megatron_tip.files import require_new
    from megatron_tip.models.layout import check_layout

    check_layout(source.architecture, tp_size=tp_size, pp_size=pp_size, owner="model")
    require_new(target)


def empty_model(source, tp_size: int, pp_size: int, dtype: Dtype):
    """Returns a model without weights for `source`, a ModelFolder, and the groups. Collective over the world."""
    import torch

    from megatron_tip.models.gpt import build_gpt
    from megatron_tip.parallel.distributed import init_distributed
    from megatron_tip.parallel.grid import ModelGrid
    from megatron_tip.parallel.groups import build_groups
    from megatron_tip.vocab_parallel import padded_vocab_size

    worker = init_distributed()
    groups = build_groups(ModelGrid.over(worker.world_size, tp_size=tp_size, pp_size=pp_size, owner="model"))
    model = build_gpt(
        source.architecture,
        groups,
        padded_vocab_size=padded_vocab_size(source.architecture.vocab_size, tp_size),
        dtype=source.dtype if dtype == "auto" else getattr(torch, dtype),
    )
    return model, groups
