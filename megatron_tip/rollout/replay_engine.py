"""The rollout engine that replays an earlier run: the same tokens under any layout or loss."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, EngineError
from megatron_tip.machine import Machine
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
                f"{len(rollouts)} rollouts; use the earlier run's prompts and samples_per_prompt"
            )
        for number, (rollout, wanted) in enumerate(zip(rollouts, expected, strict=True), start=1):
            got = (rollout.prompt_index, rollout.sample_index, rollout.prompt_ids)
            if got != wanted:
                raise EngineError(
                    f"replay: {path}, line {number}: expected sample {wanted[1]} of prompt {wanted[0]}, got sample "
                    f"{got[1]} of prompt {got[0]}{'' if got[:2] != wanted[:2] else ' with other token ids'}; use the "
                    "earlier run's prompts, seed and tokenizer"
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


def build_replay_engine(needs: EngineNeeds) -> ReplayEngine:
    """Returns the engine for the configured folder; raises EngineError if it has no rollouts."""
    assert needs.config.rollout.replay_folder is not None, "checked by the configuration"
    engine = ReplayEngine(needs.config.rollout.replay_folder)
    engine.health()
    return engine
