"""Sampling of the next token, with its logprob, from our own random numbers; the global generator is not used."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class TokenSampler(LogitsProcessor):
    """A sampler of each sequence's next token within transformers' `generate`, which keeps only its logprob.

    It is passed to a *greedy* `generate` as the only logits processor. It leaves one finite score per sequence, the
    sampled token's, which the argmax then picks. Nothing of size steps x vocabulary is kept.

    A sequence's uniform numbers follow from its own seed, so its draws do not depend on the rest of the batch. Its
    logprob is that of the sampled distribution, after temperature and top-p. With `top_p` 1 it is the log-softmax of
    logits / temperature.

    Args:
        seeds: `b` integers >= 0, one per sequence.
        num_steps: the most tokens that can be drawn.
        vocab_size: ids from here on are never drawn; None: no limit.
        on_tokens: receives the sampled tokens of each step, `[b, 1]`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        num_steps: int,
        *,
        temperature: float,
        top_p: float,
        device: torch.device,
        vocab_size: int | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> None:
        uniforms = np.stack([np.random.default_rng(seed).random(num_steps) for seed in seeds], axis=1)
        self._uniforms = torch.from_numpy(uniforms).to(device)  # [num_steps, b] float64 in [0, 1)
        self._temperature = temperature
        self._top_p = top_p
        self._vocab_size = vocab_size
        self._on_tokens = on_tokens
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Returns `[b, V]` float32, -inf except at the sampled token. `scores`: `[b, V]` logits."""
        if self._vocab_size is not None and self._vocab_size < scores.shape[1]:
            scores[:, self._vocab_size :] = -torch.inf
        logprobs = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        if self._top_p < 1:
            logprobs = keep_nucleus(logprobs, self._top_p)
        token = sample_by_inverse_cdf(logprobs, self._uniforms[len(self._logprobs)])
        self._logprobs.append(logprobs.gather(1, token))
        if self._on_tokens:
            self._on_tokens(token)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def sampled_logprobs(self) -> Tensor:
        """Returns the sampled tokens' logprobs, `[b, steps so far]` float32."""
        return torch.cat(self._logprobs, dim=1)


def sample_by_inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Returns one token id per row, `[b, 1]` int64: the first whose cumulative probability exceeds the uniform number.

    A token of probability 0 is never drawn. A row with NaN gives an arbitrary token of the vocabulary. `logprobs`:
    `[b, V]`; `uniforms`: `[b]` float64 in [0, 1).
    """
    return sample_from_probabilities(logprobs.exp(), uniforms)


def sample_from_probabilities(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Samples as `sample_by_inverse_cdf`, from `[b, V]` probabilities that need not add up to 1."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]  # the sum is 1 only up to rounding
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=probabilities.shape[-1] - 1)


def keep_nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Returns `[b, V]` logprobs renormalised over the fewest most probable tokens that hold `top_p`; -inf elsewhere.

    Source: Holtzman et al. (arXiv:1904.09751), section 3.1.
    """
    descending, order = logprobs.sort(dim=-1, descending=True, stable=True)
    mass_before = descending.exp().cumsum(dim=-1) - descending.exp()
    nucleus = descending.masked_fill(mass_before >= top_p, -torch.inf)
    return torch.empty_like(logprobs).scatter_(1, order, torch.log_softmax(nucleus, dim=-1))
