"""Weight transfer through a folder that trainer and servers share: safetensors, written atomically."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_tip.conversion.model_folder import ModelFolder
from megatron_tip.conversion.safetensors_io import write_safetensors
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import ServerError
from megatron_tip.files import new_folder
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.transport import start_on_all, that_report, those_that_did, without_heartbeats


class FolderTransport:
    """A transport that writes the weights once into `folder`, in files of at most `bucket_bytes`, for servers to read.

    The last version stays, so that a returning server gets it at once. Older ones are removed; so are, at the first
    sync, those that a killed process of the same `owner` left.

    Args:
        owner: distinguishes this run's weights in `folder` from other runs'; the same when the run is continued.
    """

    def __init__(
        self, folder: Path, source: ModelFolder, *, dtype: torch.dtype, bucket_bytes: int, owner: str = "weights"
    ) -> None:
        self.num_bytes = 0
        self._folder = folder.absolute()
        self._owner = owner
        self._source = source
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._latest: tuple[Path, str] | None = None
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="weight-sync")

    def check(self, server: PooledServer) -> None:
        """Accepts every server: any layout can read files."""

    def send(
        self, servers: Sequence[PooledServer], weights: Iterable[tuple[str, Tensor]], version: str
    ) -> list[PooledServer]:
        """Raises OutputError if the folder cannot be written; the previous version stays intact."""
        target = self._folder / f"{self._owner}_{version.replace('/', '_')}"
        if self._latest is None:
            for left in self._folder.glob(f"{self._owner}_*"):
                shutil.rmtree(left, ignore_errors=True)
        with new_folder(target, overwrite=True) as partial:
            self._source.write_description(partial, self._dtype)
            shapes = hf_shapes(self._source.architecture)
            write_safetensors(partial, weights, shapes, self._dtype, max_file_bytes=self._bucket_bytes)
        self.num_bytes = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        old, self._latest = self._latest, (target, version)
        if old and old[0] != target:
            shutil.rmtree(old[0], ignore_errors=True)
        with without_heartbeats(servers):
            calls = start_on_all(self._executor, servers, lambda client: _load(client, target, version))
            return that_report(those_that_did(calls), version)

    def refresh(self, server: PooledServer) -> str | None:
        """Makes `server` read the last version; returns None if there is none yet, or the server fails."""
        if self._latest is None:
            return None
        folder, version = self._latest
        with without_heartbeats([server]):
            try:
                _load(server.http, folder, version)
            except ServerError:
                return None
        return version

    def close(self) -> None:
        """Removes the written weights."""
        self._executor.shutdown(wait=False)
        if self._latest:
            shutil.rmtree(self._latest[0], ignore_errors=True)


def _load(client: SGLangClient, folder: Path, version: str) -> None:
    client.pause("abort")
    body = {
        "model_path": str(folder),
        "load_format": "auto",
        "weight_version": version,
        "abort_all_requests": True,
        "flush_cache": True,
    }
    client.weights_endpoint("update_weights_from_disk", body)
    client.resume()
