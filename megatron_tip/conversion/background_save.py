"""Megatron's sharded checkpoints, written by this process: at once, or by a thread while training continues.

Megatron's own strategy splits a save into a collective plan, writing that needs no other rank, and a collective end. We
use its plan as it is. But it forks writer processes out of a process that runs threads, and leaves a manager process
behind; and when a save fails, only rank 0 learns why, and the others hang if rank 0 cannot write the metadata.
Megatron-Core 0.19 also puts the common state, a pickle, among the shards. Here it is a file of its own, which can be
read without unpickling (see `tensor_load`), and by every version.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, CheckpointException, _wrap_exception
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper, _get_failure_dict


class ShardedSave:
    """A save in progress: its files count once `finish` has returned on all ranks."""

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        *,
        copies: bool,
        sharers: dist.ProcessGroup | None = None,
    ) -> None:
        """Plans the save of `state` into the empty `folder`. Collective over the world.

        Args:
            state: a nested dict of ShardedTensor and ShardedObject; whatever else it holds is the common state, plain
                values that are the same on all ranks.
            copies: `write` writes copies in host memory; otherwise the shards must not change until it is done.
            sharers: ranks that share the writing of what they all hold.
        """
        sharded: Any
        sharded, common = save_preprocess(state)
        self._common = io.BytesIO()  # as it is now: a schedule's dict is the live one
        torch.save(common, self._common)
        if sharers is not None and sharers.size() > 1:
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
            FullyParallelSaveStrategyWrapper(strategy, sharers).apply_saving_parallelization(sharded)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        writer: Any = _StagedWriter(folder, copies=copies)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned: Any = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(flat, False), writer, None, 0, planner=planner
        )
        self._folder = folder
        self._writer, self._metadata, self._ranks = planned[0]

    def write(self) -> None:
        """Writes and syncs this rank's shards, from any thread; no collective, and `finish` raises what failed."""
        self._writer.write_staged()

    def finish(self) -> None:
        """Writes index, common state and format on rank 0 if every rank has written its file.

        Collective over the world: a gather and a broadcast of small objects.

        Raises:
            CheckpointException: on every rank, with the failures of all.
        """
        ranks: _DistWrapper = self._ranks
        results: Any = ranks.gather_object(self._writer.retrieve_write_results())
        failures: dict[int, WRAPPED_EXCEPTION] = {}
        if ranks.is_coordinator:
            failures = _get_failure_dict(results)
            if not failures:
                try:
                    (self._folder / COMMON_STATE_FNAME).write_bytes(self._common.getvalue())
                    self._writer.finish(self._metadata, results)
                    save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
                except Exception as error:
                    failures[ranks.rank] = _wrap_exception(system_error_behind(error))
        failures = ranks.broadcast_object(failures)
        if failures:
            raise CheckpointException("write", failures)


class _StagedWriter(FileSystemWriter):
    """torch's writer of checkpoint files, with the methods that Megatron's plan and end call."""

    can_run_decentralized_global_plan = True

    def __init__(self, path: str | Path, *, copies: bool) -> None:
        super().__init__(path)
        self._copies = copies

    def storage_meta(self) -> None:
        """Returns nothing: torch's would put this machine's path into the checkpoint."""

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        """Returns the plan with the rank in the file's name, as a central plan would have it."""
        return replace(local_plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Resolves this rank's part of `plan`, and copies it if copies are wanted."""
        self._plan, self._staged = plan, _Staged(plan, planner, copies=self._copies)
        self._results: list[WriteResult] | WRAPPED_EXCEPTION = []

    def write_staged(self) -> None:
        """Writes and syncs this rank's file, then drops the data; no collective, no exception."""
        try:
            if self._plan.items:
                self._results = super().write_data(self._plan, self._staged).value()  # pyright: ignore[reportArgumentType]
        except Exception as error:
            self._results = _wrap_exception(system_error_behind(error))
        finally:
            self._staged.items.clear()

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        return self._results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        if hasattr(metadata, "all_local_plans"):
            del metadata.all_local_plans  # pyright: ignore[reportAttributeAccessIssue]: Megatron adds them; they double the file
        super().finish(metadata, results)


class _Staged:
    """The part of a planner that torch's writer calls: an item's data."""

    def __init__(self, plan: SavePlan, planner: SavePlanner, *, copies: bool) -> None:
        found = {item.index: planner.resolve_data(item) for item in plan.items}
        self.items = {index: _copied(data) for index, data in found.items()} if copies else found

    def resolve_data(self, item: WriteItem) -> Any:
        return self.items[item.index]


def system_error_behind(error: BaseException) -> BaseException:
    """Returns the OSError that caused `error`, else `error`: on a full disk torch's writer fails an assertion."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _copied(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data
