"""Which of several teachers scores a rollout: the one that its prompt names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_tip.parallel.collectives import broadcast_json
from megatron_tip.records import Prompt, Rollout


def with_teachers(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
    """Returns `rollouts` with the names of their prompts' teachers."""
    names = {prompt.index: prompt.teacher for prompt in prompts}
    return [replace(rollout, teacher=names.get(rollout.prompt_index) or rollout.teacher) for rollout in rollouts]


def tell_teachers(rollouts: list[Rollout], *, device: torch.device) -> list[Rollout]:
    """Returns `rollouts` with the first process's names of their teachers. Two broadcasts over the world."""
    names = broadcast_json([rollout.teacher for rollout in rollouts], source=0, device=device)
    return [replace(rollout, teacher=name) for rollout, name in zip(rollouts, names, strict=True)]
