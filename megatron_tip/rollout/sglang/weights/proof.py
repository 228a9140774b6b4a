"""The proof that servers hold the weights that they were sent: checksums of a few tensors, after every sync."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tip.errors import ServerError, ServerRefusedError
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.transport import those_that_did

logger = logging.getLogger(__name__)

NUM_LAYERS = 4
"""Layers, spread over the model, of which one tensor is compared."""

SAMPLE_SIZE = 262_144
"""Elements of a sent tensor that are compared with those of the sync before."""

_OTHER_TENSORS = ("qkv_proj", "gate_up_proj", "down_proj", "experts", "norm", "embed_tokens", "lm_head")

Checksums = dict[str, tuple[str, ...]]
"""The checksum of each watched tensor, one per rank of the server."""


@dataclass(frozen=True)
class _Held:
    """Weights that a server was seen to hold: their version, the samples sent, and the server's checksums."""

    version: str
    samples: dict[str, bytes]
    checksums: Checksums


class WeightProof:
    """A comparison of what servers hold with what was sent to them.

    A server computes its checksums by a formula that depends on its device, its data type and its layout, so changes
    are compared, not values. A tensor that has changed since the server's last sync must have another checksum, and a
    server that comes back must have the checksums that it had. Watched is the attention's output projection of a few
    layers: the server keeps it under its Hugging Face name.

    Args:
        num_layers: the model's.
    """

    def __init__(self, num_layers: int) -> None:
        chosen = {place * (num_layers - 1) // (NUM_LAYERS - 1) for place in range(NUM_LAYERS)}
        self._names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in sorted(chosen)]
        others = [f"layers.{layer}." for layer in range(num_layers) if layer not in chosen]
        self._skipped = [*_OTHER_TENSORS, *others]
        self._sent: tuple[str, dict[str, bytes]] = ("", {})
        self._held: dict[PooledServer, _Held] = {}
        self._without: set[PooledServer] = set()

    def watched(self, weights: Iterable[tuple[str, Tensor]], version: str) -> Iterator[tuple[str, Tensor]]:
        """Yields `weights`, and remembers samples of some of them as those of `version`."""
        samples = {}
        for name, tensor in weights:
            if name in self._names:
                samples[name] = _sample(tensor)
            yield name, tensor
        self._sent = (version, samples)

    def confirmed(self, servers: Sequence[PooledServer], version: str) -> list[PooledServer]:
        """Returns those of `servers` that hold the weights of `version`, the last that were sent; logs the others."""
        with ThreadPoolExecutor(max(1, len(servers)), thread_name_prefix="weight-proof") as executor:
            return those_that_did({server: executor.submit(self.confirm, server, version) for server in servers})

    def confirm(self, server: PooledServer, version: str) -> None:
        """Returns if `server` took the weights of `version`, as far as its checksums tell, and remembers them.

        The first weights of a server have nothing that they can be compared with.

        Raises:
            ServerError: it still holds earlier weights, or does not answer.
        """
        checksums = self._checksums_of(server)
        if checksums is None:
            return
        sent, samples = self._sent
        before, samples = self._held.get(server), samples if sent == version else {}
        if before and before.version != version:
            same = [name for name, checksum in checksums.items() if checksum == before.checksums.get(name)]
            known = [name for name in same if name in samples and name in before.samples]
            if stale := [name for name in known if samples[name] != before.samples[name]]:
                raise ServerError(
                    f"{server.url}: it took the weights {version}, but {', '.join(stale)} are still those of "
                    f"{before.version}"
                )
        self._held[server] = _Held(version, samples, checksums)

    def still_holds(self, server: PooledServer, version: str) -> bool:
        """Returns whether `server` has the checksums that it had after the sync of `version`.

        Raises:
            ServerError: it holds other weights under this version, or does not answer.
        """
        before = self._held.get(server)
        if before is None or before.version != version:
            return False
        checksums = self._checksums_of(server)
        if checksums is not None and checksums != before.checksums:
            raise ServerError(f"{server.url}: it says that it holds the weights {version}, and holds others")
        return checksums is not None

    def _checksums_of(self, server: PooledServer) -> Checksums | None:
        """Returns the checksums of the watched tensors; None, with a warning once, from a server that has none."""
        reason = "its weights are quantized" if server.is_quantized else ""
        ranks: list[dict[str, str]] = []
        if not reason:
            try:
                ranks = server.http.weight_checksums(self._skipped)
            except ServerRefusedError as error:
                reason = str(error)
        found = {name: tuple(rank[name] for rank in ranks if name in rank) for name in self._names}
        found = {name: values for name, values in found.items() if values}
        if found:
            return found
        if server not in self._without:
            self._without.add(server)
            logger.warning(
                "%s: it gives no checksums of its weights (%s); that it took them is not checked after each sync",
                *(server.url, reason or "it has no tensors of the expected names"),
            )
        return None


def _sample(tensor: Tensor) -> bytes:
    """Returns a digest of elements spread over `tensor`, in bfloat16.

    The server may hold the weights with fewer bits than the student: a change must be one that it can see.
    """
    flat = tensor.detach().flatten()
    few = flat[:: max(1, flat.numel() // SAMPLE_SIZE)].to(torch.bfloat16).cpu()
    return hashlib.sha256(few.view(torch.uint8).numpy().tobytes()).digest()
