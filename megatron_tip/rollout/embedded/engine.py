"""The rollout engine in the trainer's first process: transformers' `generate` on a copy of the student."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_tip.conversion.experts import split_experts
from megatron_tip.errors import EngineError
from megatron_tip.records import Prompt, Rollout, logprobs, token_ids
from megatron_tip.rollout.embedded.grouped_attention import register_grouped_attention
from megatron_tip.rollout.embedded.sampling import TokenSampler
from megatron_tip.rollout.embedded.token_counter import TokenCounter
from megatron_tip.rollout.engine import EngineNeeds, RolloutEngine, SamplingParams
from megatron_tip.rollout.progress_clock import ProgressClock, Show, show_nothing
from megatron_tip.seeds import derive_seed


class EmbeddedEngine(RolloutEngine):
    """An engine around a transformers model; all weights, even the first, arrive through `update_weights`.

    Weights, prompt, its position in the list and the sampling parameters determine a rollout. `batch_size` matters only
    through rounding, and no global random generator matters.

    Args:
        hf_config: the student's as trained, without its dropped layers.
        dtype: of the engine's weights and activations; `rollout_logprobs` are computed in float32.
        batch_size: sequences to generate together.
        num_threads: CPU threads while generating; the previous number is restored afterwards.
        vocab_size: ids from here on, which the teacher does not know, are never sampled; None: no limit.
        show: shows the progress of a batch.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        num_threads: int = 1,
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
        show: Show = show_nothing,
    ) -> None:
        self._show = show
        self._vocab_size = vocab_size
        self._model = _build_model(hf_config, dtype, device)
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._weight_version: int | None = None

    def health(self) -> None:
        """Raises EngineError unless the model holds one complete set of weights."""
        if self._weight_version is None:
            raise EngineError(
                "embedded engine: expected complete weights, got none or only some; call update_weights first, and "
                "again if it failed"
            )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Copies `weights` into the model in place. The stream may omit a tied output head.

        Raises:
            EngineError: a tensor is missing, unknown or of the wrong shape; the engine does not generate until an
                update succeeds.
        """
        self._weight_version = None
        parameters = _by_saved_name(self._model.named_parameters(remove_duplicate=False))
        missing = _by_saved_name(self._model.named_parameters())
        refused: list[str] = []
        for name, tensor in weights:
            parameter = parameters.get(name)
            if parameter is None:
                refused.append(f"{name}: no such parameter")
            elif parameter.shape != tensor.shape:
                refused.append(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
            else:
                parameter.copy_(tensor)
                missing.pop(name, None)
        refused += [f"{name}: missing" for name in missing]
        if refused:
            raise EngineError(
                f"embedded engine: weights of version {weight_version} do not fit its {type(self._model).__name__}: "
                f"{'; '.join(refused[:8])}{f' and {len(refused) - 8} more' if len(refused) > 8 else ''}"
            )
        self._weight_version = weight_version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` rollouts per prompt, prompt-major.

        Raises:
            EngineError: the weights are incomplete or NaN, or a prompt and its response exceed the model's positions.
        """
        self.health()
        self._check_lengths(prompts, sampling)
        # Prompts of similar length share a batch: less padding.
        jobs = [(place, sample) for place in range(len(prompts)) for sample in range(sampling.samples_per_prompt)]
        jobs.sort(key=lambda job: len(prompts[job[0]].prompt_ids))
        rollouts: dict[tuple[int, int], Rollout] = {}
        clock = ProgressClock(len(jobs), self._show)
        with torch.inference_mode(), _threads(self._num_threads):
            for first in range(0, len(jobs), self._batch_size):
                batch = jobs[first : first + self._batch_size]
                counter = TokenCounter(clock, first, len(batch), sampling.stop_token_ids, self._device)
                rollouts.update(zip(batch, self._generate_batch(prompts, batch, sampling, counter), strict=True))
        return [rollouts[job] for job in sorted(rollouts)]

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        longest = max((len(prompt.prompt_ids) for prompt in prompts), default=0)
        limit = self._model.config.max_position_embeddings
        if longest + sampling.max_response_tokens > limit:
            raise EngineError(
                f"embedded engine: expected prompt + response <= {limit} tokens (max_position_embeddings), got "
                f"{longest} + {sampling.max_response_tokens}; lower prompts.max_prompt_tokens or "
                "rollout.max_response_tokens"
            )

    def _generate_batch(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[tuple[int, int]],
        sampling: SamplingParams,
        counter: TokenCounter,
    ) -> Iterator[Rollout]:
        input_ids, attention_mask = self._left_padded([prompts[place].prompt_ids for place, _ in jobs])
        sampler = TokenSampler(
            [derive_seed(sampling.seed, place, sample) for place, sample in jobs],
            sampling.max_response_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            device=self._device,
            vocab_size=self._vocab_size,
            on_tokens=counter.count,
        )
        sequences = self._model.generate(
            input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler draws
                max_new_tokens=sampling.max_response_tokens,
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=0,
            ),
        )
        responses = sequences[:, input_ids.shape[1] :].tolist()
        sampled = sampler.sampled_logprobs()
        if not sampled.isfinite().all():
            raise EngineError(f"embedded engine: the weights of version {self._weight_version} produce NaN logits")
        for (place, sample), response, response_logprobs in zip(jobs, responses, sampled.tolist(), strict=True):
            length = _length_to_stop(response, sampling.stop_token_ids)
            assert self._weight_version is not None, "health() has passed"
            yield Rollout(
                prompt_index=prompts[place].index,
                sample_index=sample,
                prompt_ids=token_ids(prompts[place].prompt_ids),
                response_ids=token_ids(response[:length]),
                rollout_logprobs=logprobs(response_logprobs[:length]),
                finish_reason="stop" if response[length - 1] in sampling.stop_token_ids else "length",
                weight_version=self._weight_version,
            )

    def _left_padded(self, prompt_ids: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in prompt_ids)
        padding = [width - len(ids) for ids in prompt_ids]
        input_ids = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(padding, prompt_ids, strict=True)])
        attention_mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        return input_ids.to(self._device), attention_mask.long().to(self._device)


def build_embedded_engine(needs: EngineNeeds) -> EmbeddedEngine:
    """Returns the engine of a student, without weights."""
    return EmbeddedEngine(
        AutoConfig.for_model(**needs.student.config),
        dtype=needs.dtype,
        device=needs.device,
        batch_size=needs.config.rollout.batch_size,
        num_threads=needs.num_threads,
        vocab_size=needs.vocab_size,
        show=needs.show,
    )


def _build_model(hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Returns a frozen model with uninitialised weights, without random draws; transformers' types are unreliable."""
    attention = register_grouped_attention()
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    model.generation_config = GenerationConfig()  # keeps the checkpoint's defaults out of sampling
    # After the prompt the head gets a non-contiguous slice, [b, 1, h]; for bfloat16 on a CPU torch would multiply it by
    # b copies of the head's weight.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.to(device).eval().requires_grad_(False)


def _by_saved_name(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the parameters under the names of Hugging Face's files: of a layer's experts, each one's part."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters:
        found |= split_experts(name, parameter) or {name: parameter}
    return found


def _length_to_stop(response: Sequence[int], stop_token_ids: Sequence[int]) -> int:
    """Returns the number of tokens up to and including the first stop id; all of them without one."""
    return next((place + 1 for place, token in enumerate(response) if token in stop_token_ids), len(response))


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
