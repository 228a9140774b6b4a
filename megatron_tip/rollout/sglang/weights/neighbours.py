"""Which trainer rank shares a GPU with each rank of our own servers, for weights by IPC."""

import torch

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.rollout.handover.exchange import HandleExchange


def neighbours_of(config: Config, *, on_gpu: bool, world_size: int) -> list[tuple[int, ...]]:
    """Returns for each of our own servers the trainer rank on the GPU of each of its ranks; rank r has GPU r there.

    Empty tuples on a CPU: rank 0's memory serves all. An empty list with given servers.

    Raises:
        ConfigError: a server's GPU is that of no trainer rank, or it is not known where servers are.
    """
    rollout, sglang = config.rollout, config.sglang
    if not on_gpu:
        return [()] * (0 if rollout.server_urls else rollout.servers)
    if rollout.server_urls:
        raise ConfigError(
            'sync.transport: expected "broadcast" or "folder" with rollout.server_urls on GPUs, got "ipc"; which of '
            "them share a GPU with the trainer is known only of servers that the run starts"
        )
    size = sglang.tensor_parallel_size
    gpus = sglang.gpus or tuple(range(size)) * rollout.servers
    if max(gpus) >= world_size:
        raise ConfigError(
            f'sglang.gpus: expected GPUs of the trainer\'s {world_size} ranks with sync.transport = "ipc", got {gpus}; '
            'set sync.transport = "broadcast" for servers on GPUs of their own'
        )
    return [gpus[index * size : (index + 1) * size] for index in range(rollout.servers)]


def build_exchange(config: Config, device: torch.device, world_size: int) -> HandleExchange | None:
    """Returns this rank's part in syncs by IPC; None if rank 0 needs no other rank for them. Equal on every rank.

    Raises:
        ConfigError: as `neighbours_of`.
    """
    if config.rollout.engine != "sglang" or config.sync.transport != "ipc":
        return None
    neighbours = neighbours_of(config, on_gpu=device.type == "cuda", world_size=world_size)
    others = {rank for ranks in neighbours for rank in ranks} - {0}
    return HandleExchange(config.sync.bucket_bytes, device) if others else None
