"""The run from its first file to its last."""

import logging
import os

import torch
import torch.distributed as dist

from megatron_tip.config import Config
from megatron_tip.conversion import save_hf, save_megatron_checkpoint
from megatron_tip.observability.logs import configure_logging
from megatron_tip.observability.memory import peak_rss_bytes
from megatron_tip.observability.metrics import MetricsWriter
from megatron_tip.observability.progress import progress_display
from megatron_tip.observability.report import write_report
from megatron_tip.observability.run_folder import RunFolder, Sample
from megatron_tip.parallel.distributed import Worker, destroy_distributed, init_distributed
from megatron_tip.parallel.environment import available_threads
from megatron_tip.records import Rollout
from megatron_tip.training.heldout import measure_heldout
from megatron_tip.training.plan import RunPlan, plan_run
from megatron_tip.training.run import TrainingRun
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import train_step
from megatron_tip.training.weight_sync import sync_weights

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Runs `config` as one worker of its world. Every rank calls it; rank 0 writes the run's files."""
