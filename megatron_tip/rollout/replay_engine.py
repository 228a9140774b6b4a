"""The rollout engine that replays an earlier run: the same tokens under any layout or loss."""

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, EngineError
from megatron_tip.machine import Machine
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.engine import EngineNeeds, RolloutEngine, SamplingParams
from megatron_tip.rollout.storage import read_rollouts, rollout_file


class ReplayEngine(RolloutEngine):
    """An engine that reads each batch's rollouts from `folder`, the `rollouts/` of an earlier run.

    Rollouts keep the weight version that generated them; new weights are accepted and ignored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def health(self) -> None:
        """Raises EngineError if the folder is missing or has no rollouts."""
        if not any(self._folder.glob("*.jsonl")):
            raise EngineError(
                f"rollout.replay_folder: expected the rollouts/ folder of an earlier run, found no .jsonl file in "
                f"{self._folder}"
            )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Consumes the stream, because other ranks take part in its collectives, and keeps nothing."""
        for _ in weights:
            pass

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Returns the recorded rollouts of the batch `sampling.batch_name`.

        Raises:
            EngineError: the earlier run has no such batch, or generated it for other prompts.
            InputError: a line is broken.
        """
        path = rollout_file(self._folder, sampling.batch_name)
        if not path.exists():
            self.health()
            raise EngineError(
                f"replay: {path} does not exist; the earlier run had fewer steps or another held-out schedule; "
                "lower training.steps or use its heldout settings"
            )
        rollouts = read_rollouts(path)
        expected = [
            (prompt.index, sample, prompt.prompt_ids)
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]
        if len(rollouts) != len(expected):
            raise EngineError(
                f"replay: {path}: expected {len(prompts)} prompts x {sampling.samples_per_prompt} samples, got "
                f"{len(rollouts)} rollouts; use the earlier run's prompts, rollout.prompts_per_step, "
                "rollout.samples_per_prompt and heldout.num_prompts"
            )
        for number, (rollout, wanted) in enumerate(zip(rollouts, expected, strict=True), start=1):
            got = (rollout.prompt_index, rollout.sample_index, rollout.prompt_ids)
            if got != wanted:
                raise EngineError(
                    f"replay: {path}, line {number}: expected sample {wanted[1]} of prompt {wanted[0]}, got sample "
                    f"{got[1]} of prompt {got[0]}{'' if got[:2] != wanted[:2] else ' with other token ids'}; use the "
                    "earlier run's prompts, heldout.num_prompts, seed and tokenizer"
                )
        return rollouts


def check_replay(config: Config, vocab_sizes: Sequence[int], machine: Machine) -> None:
    """Checks that the rollouts to replay exist and are not the run's own; see `EngineKind.check`.

    Raises:
        ConfigError: the folder is missing, or within run.folder. EngineError: the folder has no rollouts.
    """
    folder = config.rollout.replay_folder
    assert folder is not None, "checked by the configuration"
    if folder.resolve().is_relative_to(config.run.folder.resolve()):
        raise ConfigError(
            f"rollout.replay_folder: expected a folder of another run, got {folder} within run.folder, where this "
            "run's own rollouts go; choose another run.folder"
        )
    if machine.has(folder, "rollout.replay_folder"):
        ReplayEngine(folder).health()


def check_same_batches(config: Config, machine: Machine) -> None:
    """Refuses settings that give the steps other prompts than the rollouts to replay were generated for.

    Compares with the earlier run's config.toml beside the rollouts or, without one, with the number of held-out
    responses. A folder that is elsewhere is not checked; each batch is compared with its prompts when it is replayed.

    Raises:
        ConfigError: names the first key that differs.
    """
    folder = config.rollout.replay_folder
    assert folder is not None, "checked by the configuration"
    if machine.is_elsewhere and not folder.exists():
        return
    values = config.model_dump(mode="json")
    for key, earlier, where in [*_earlier_settings(config, folder)] or _recorded_settings(folder):
        section, name = key.split(".")
        if (now := values[section][name]) != earlier:
            raise ConfigError(
                f"{key}: expected {earlier!r}, the value of the run whose rollouts are replayed ({where}), got "
                f"{now!r}; the steps would have other prompts: set {key} to that value"
            )


def _earlier_settings(config: Config, folder: Path) -> Iterator[tuple[str, Any, Path]]:
    """Yields the keys that decide a batch's prompts, with the earlier run's values and where they stand."""
    path = RunFolder(folder.parent).config
    try:
        earlier = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # without it the recorded numbers remain
        return
    keys = ["heldout.num_prompts", "rollout.prompts_per_step", "rollout.samples_per_prompt", "run.seed"]
    keys += ["prompts.num_prompts", "prompts.shuffle", "prompts.max_prompt_tokens", "prompts.system_prompt"]
    keys += ["prompts.apply_chat_template", "prompts.template_arguments"]
    if config.prompts.source == "reasoning_gym" and not config.prompts.num_prompts:
        keys.append("training.steps")  # as many prompts are generated and shuffled as the run has steps for
    for key in keys:
        section, name = key.split(".")
        if isinstance(values := earlier.get(section), dict) and name in values:
            yield key, values[name], path


def _recorded_settings(folder: Path) -> list[tuple[str, Any, Path]]:
    """Returns the number of held-out prompts that the first held-out responses imply, in the same form."""
    heldout = rollout_file(folder, "heldout_000000")
    if heldout.exists():
        return [("heldout.num_prompts", len(read_rollouts(heldout)), heldout)]
    started = rollout_file(folder, "step_000001").exists()
    return [("heldout.num_prompts", 0, folder)] if started else []


def build_replay_engine(needs: EngineNeeds) -> ReplayEngine:
    """Returns the engine for the configured folder; raises EngineError if it has no rollouts."""
    assert needs.config.rollout.replay_folder is not None, "checked by the configuration"
    engine = ReplayEngine(needs.config.rollout.replay_folder)
    engine.health()
    return engine
