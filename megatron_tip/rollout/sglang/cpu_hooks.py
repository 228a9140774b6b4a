"""Hooks by which our own CPU servers differ from SGLang 0.5.23: batched decoding, and sampling by requests' seeds.

`main.register_cpu_hooks` installs these functions through SGLang's plugin framework, only in those processes. Needs
torch and numpy; SGLang itself is not imported.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_tip.rollout.embedded.sampling import sample_from_probabilities


def decode_attention(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Computes attention for one new position per request; writes and returns `output`.

    SGLang's torch_native backend loops over the requests, which costs more than the rest of a small model. It still
    handles sliding windows and encoders. Arguments as for `attend_at_once`.
    """
    tensors = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
    if encoder_lens is not None or others.get("sliding_window_size") is not None or query.dtype != k_cache.dtype:
        return original(backend, *tensors, encoder_lens, **others)
    return attend_at_once(*tensors, scaling=others.get("scaling"))


def attend_at_once(
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    scaling: float | None,
) -> Tensor:
    """Computes the attention of all `b` requests in one call; writes and returns `output`.

    Args:
        query, output: `[b, heads, d]`. k_cache, v_cache: `[tokens of the pool, kv_heads, d]`.
        req_to_token: `[requests of the pool, positions]`, places in the cache. req_pool_indices: `[b]`, its rows.
        seq_lens: `[b]`, the new position included.
    """
    b, _, d = query.shape
    width = int(seq_lens.max())
    is_within = torch.arange(width) < seq_lens[:, None]
    places = req_to_token[req_pool_indices, :width]
    # Beyond a request's end the cache holds old values, possibly NaN; the request's first token is always finite.
    places = torch.where(is_within, places, places[:, :1]).flatten()
    keys, values = (
        cache.index_select(0, places).view(b, width, *cache.shape[1:]).transpose(1, 2) for cache in (k_cache, v_cache)
    )
    # Queries that share a key/value head take the place of query positions, as in grouped_attention.py.
    grouped = query.view(b, k_cache.shape[1], -1, d)
    found = scaled_dot_product_attention(grouped, keys, values, attn_mask=is_within[:, None, None], scale=scaling)
    output.copy_(found.reshape(output.shape))
    return output


def with_seeds(sampling_info: Any, _: type, batch: Any, *__: Any) -> Any:
    """Returns `sampling_info` with every request's own seed, or a random one if it has none.

    SGLang accepts seeds only in its deterministic mode, whose kernels need a GPU.
    """
    asked = [request.sampling_params.sampling_seed for request in batch.reqs]
    seeds = [secrets.randbits(32) if seed is None else seed for seed in asked]
    sampling_info.sampling_seed = torch.tensor(seeds, dtype=torch.int64)
    return sampling_info


def sample_probabilities(
    probabilities: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Returns one token for each row of `[b, V]` probabilities, `[b]` int32, by its request's seed and position."""
    assert sampling_seed is not None and positions is not None, "every batch has seeds here"  # noqa: PT018
    uniforms = uniforms_of(sampling_seed.tolist(), positions.tolist())
    return sample_from_probabilities(probabilities, uniforms).flatten().to(torch.int32)


def sample_logprobs(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """Returns tokens as `sample_probabilities` does, `[b, 1]` int64, from logprobs that need not be normalised."""
    return sample_from_probabilities(logprobs.exp(), uniforms_of(seed.tolist(), positions.tolist()))


def uniforms_of(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Returns one number for each seed and position, `[b]` float64 in [0, 1), unrelated to any other."""
    generators = [
        np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
