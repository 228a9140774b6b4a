"""Multi-turn rollouts with an environment, on top of any rollout engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from megatron_tip.config import RolloutConfig
from megatron_tip.errors import EngineError, WeightsLostError
from megatron_tip.records import Prompt, Rollout, logprobs, token_ids
from megatron_tip.rollout.engine import EngineWrapper, RolloutEngine, SamplingParams
from megatron_tip.rollout.environments.environment import Environment, EnvironmentFactory, Observation
from megatron_tip.rollout.environments.registry import load_environment
from megatron_tip.rollout.environments.turn_template import TurnTemplate
from megatron_tip.seeds import derive_seed


class MultiTurnEngine(EngineWrapper):
    """A rollout engine whose rollouts are whole episodes: the student's turns and the environment's answers.

    All episodes of a batch go through the engine together, turn by turn. Ids are only ever appended: the student reads
    in its next turn, and the trainer scores, exactly what was sampled. `sampling.max_response_tokens` limits an
    episode's ids after the prompt, including the environment's.

    Args:
        engine: generates the turns; may finish a turn with "stop" or "length".
        make_environment: called once per rollout.
        max_turns: turns of the student per episode; an episode that is not done by then ends with "turns".
    """

    def __init__(
        self, engine: RolloutEngine, make_environment: EnvironmentFactory, template: TurnTemplate, *, max_turns: int
    ) -> None:
        super().__init__(engine)
        self._make_environment = make_environment
        self._template = template
        self._max_turns = max_turns
        self._interrupted: _Batch | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns `samples_per_prompt` episodes per prompt, prompt-major, without those that the engine omitted.

        Raises:
            WeightsLostError: the weights are lost; after `update_weights` the same call continues where it stopped.
            EngineError: the engine failed or returned other rollouts than requested, or an environment raised.
        """
        batch, self._interrupted = self._interrupted, None
        if batch is None or batch.name != sampling.batch_name:
            batch = self._begin(prompts, sampling)
        while active := [episode for episode in batch.episodes if not episode.finish_reason]:
            try:
                parts = self._continuations(batch, active, sampling)
            except WeightsLostError:
                self._interrupted = batch
                raise
            batch.num_calls += 1
            for episode, part in zip(active, parts, strict=True):
                if part is None:
                    batch.episodes.remove(episode)
                else:
                    self._advance(episode, part)
        return [episode.rollout() for episode in batch.episodes]

    def _begin(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> "_Batch":
        """Returns the batch's episodes after their first turn."""
        by_index = {prompt.index: prompt for prompt in prompts}
        longest = max((len(prompt.prompt_ids) for prompt in prompts), default=0) + sampling.max_response_tokens
        batch = _Batch(sampling.batch_name, longest)
        for first_turn in self._engine.generate(prompts, sampling):
            environment = self._make_environment()
            environment.reset(by_index[first_turn.prompt_index])
            episode = _Episode(environment, first_turn, sampling.max_response_tokens)
            self._advance(episode, first_turn)
            batch.episodes.append(episode)
        return batch

    def _continuations(
        self, batch: "_Batch", active: "Sequence[_Episode]", sampling: SamplingParams
    ) -> list[Rollout | None]:
        """Returns the engine's continuation of each `active` episode; None for those that it omitted.

        No sequence becomes longer than the first turn could make it, so that every engine can hold it. An episode that
        is cut off before its budget is used up continues in the next call.
        """
        prompts = [episode.as_prompt() for episode in active]
        room = batch.longest - max(len(prompt.prompt_ids) for prompt in prompts)
        call = batch.num_calls + 1
        asked = replace(
            sampling,
            samples_per_prompt=1,
            max_response_tokens=min(room, max(episode.budget for episode in active)),
            seed=derive_seed(sampling.seed, 3, call),
            batch_name=f"{sampling.batch_name}_call_{call}",
        )
        parts = self._engine.generate(prompts, asked)
        left = list(reversed(parts))
        found: list[Rollout | None] = []
        for prompt in prompts:
            is_next = bool(left) and (left[-1].prompt_index, left[-1].prompt_ids) == (prompt.index, prompt.prompt_ids)
            found.append(left.pop() if is_next else None)
        if left:
            raise EngineError(
                f"multi-turn rollouts: expected at most one continuation of each of {len(prompts)} episodes in their "
                f"order, got {len(parts)} rollouts, {len(left)} of them for other prompts or in another order"
            )
        return found

    def _advance(self, episode: "_Episode", part: Rollout) -> None:
        """Appends the student's text and, if that ends a turn, the environment's answer."""
        episode.append_generated(part)
        if episode.finish_reason or not episode.turn_is_complete:
            return
        observation = self._step(episode)
        if observation.done:
            episode.finish_reason = "stop"
        elif episode.num_turns == self._max_turns:
            episode.finish_reason = "turns"
        else:
            episode.append_observation(self._template.observation_ids(observation.text))

    def _step(self, episode: "_Episode") -> Observation:
        text = self._template.turn_text(episode.turn_ids()[:-1])
        try:
            observation = episode.environment.step(text)
        except Exception as error:
            raise EngineError(
                f"environment {type(episode.environment).__name__}: step failed in turn {episode.num_turns} of sample "
                f"{episode.first_turn.sample_index} of prompt {episode.first_turn.prompt_index}: {error!r}"
            ) from error
        if not isinstance(observation, Observation) or not isinstance(observation.text, str):
            raise EngineError(
                f"environment {type(episode.environment).__name__}: expected step to return an Observation with a "
                f"text, got {observation!r:.100}"
            )
        return observation


@dataclass
class _Batch:
    """A batch in progress. `longest`: maximum tokens of its sequences."""

    name: str
    longest: int
    episodes: "list[_Episode]" = field(default_factory=list)
    num_calls: int = 0


@dataclass(eq=False)
class _Episode:
    """A rollout in progress. `finish_reason` is empty until it ends."""

    environment: Environment
    first_turn: Rollout
    max_response_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str = ""
    turn_is_complete: bool = False
    weight_versions: set[int] = field(default_factory=set)

    @property
    def budget(self) -> int:
        return self.max_response_tokens - len(self.ids)

    @property
    def num_turns(self) -> int:
        return len(self.spans) + 1

    def as_prompt(self) -> Prompt:
        """Returns all that the student reads before it continues."""
        return Prompt(self.first_turn.prompt_index, "", (*self.first_turn.prompt_ids, *self.ids))

    def turn_ids(self) -> list[int]:
        """Returns the ids of the current turn."""
        return self.ids[self.spans[-1][1] if self.spans else 0 :]

    def append_generated(self, part: Rollout) -> None:
        """Appends the sampled ids up to the budget, as if sampling had stopped there."""
        fits = len(part.response_ids) <= self.budget
        self.turn_is_complete = fits and part.finish_reason == "stop"
        generated = part.response_ids[: self.budget]
        self.logprobs += part.rollout_logprobs[: self.budget]
        self.ids += generated
        self.weight_versions.add(part.weight_version)
        if not generated or (not self.turn_is_complete and self.budget == 0):
            self.finish_reason = "length"

    def append_observation(self, ids: tuple[int, ...]) -> None:
        """Appends the environment's ids; an observation that leaves no room for another turn ends the episode."""
        if len(ids) >= self.budget:
            self.finish_reason = "length"
            return
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.turn_is_complete = False

    def rollout(self) -> Rollout:
        length = len(self.ids)
        if self.spans and self.spans[-1][1] == length:  # an observation without an answer
            length = self.spans.pop()[0]
        return replace(
            self.first_turn,
            response_ids=token_ids(self.ids[:length]),
            rollout_logprobs=logprobs(self.logprobs[:length]),
            finish_reason=self.finish_reason,
            weight_version=min(self.weight_versions),
            environment_spans=tuple(self.spans),
        )


def with_environment(
    engine: RolloutEngine, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> RolloutEngine:
    """Returns `engine`, wrapped in a MultiTurnEngine if the configuration names an environment.

    Raises:
        ConfigError: environment, role or chat template are unusable; `check_environment` finds that early.
    """
    if not config.environment:
        return engine
    template = TurnTemplate.of(tokenizer, config.observation_role, stop_token_ids)
    return MultiTurnEngine(engine, load_environment(config.environment), template, max_turns=config.max_turns)


def check_environment(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """Raises ConfigError, before anything starts, if `with_environment` would fail."""
    if config.environment:
        load_environment(config.environment)
        TurnTemplate.of(tokenizer, config.observation_role, stop_token_ids)
