"""How the student generates, and how its weights get to the servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_tip.config.section import Section


class RolloutConfig(Section):
    """How the student generates."""

    engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """embedded: transformers' own generate in the trainer's first process; sglang: SGLang servers, see [sglang] and
    [sync]; replay: the rollouts that a run wrote."""
    replay_folder: Path | None = None
    """With engine = "replay": the `rollouts/` folder of the earlier run."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts of one training step."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt."""
    max_response_tokens: int = Field(default=512, ge=1)
    """A response is cut off there; its finish_reason is "length"."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1: the whole distribution."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences that the embedded engine generates together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights of the embedded engine or of our own servers; auto: the student's."""
    environment: str = ""
    """What answers the student's turns: "calculator", or "package.module:Class"; empty: rollouts of a single turn."""
    max_turns: int = Field(default=8, ge=1)
    """With an environment: turns of the student in a rollout; max_response_tokens bounds all of them together."""
    observation_role: Literal["tool", "user"] = "tool"
    """With an environment: the role under which the chat template shows its answers to the student."""
    servers: int = Field(default=1, ge=1)
    """With engine = "sglang": how many servers to start, where server_urls names none."""
    server_urls: tuple[str, ...] = ()
    """With engine = "sglang": running servers to use instead, as "http://host:port"."""
    ahead: int = Field(default=0, ge=0, le=1)
    """1: generate the next step's rollouts, with the weights of this step's beginning, while this step trains."""
    importance_cap: float = Field(default=0.0, ge=0)
    """Weigh each token's loss by min(p_student / p_rollout, this), for rollouts of older weights; 0: no weights."""
    attempts: int = Field(default=4, ge=1)
    """With engine = "sglang": a sample that failed so often is set aside in set_aside.jsonl, and counted."""
    on_wrong_version: Literal["regenerate", "drop"] = "regenerate"
    """With engine = "sglang": what to do with a response that was generated with other weights than the last sync's."""

    @model_validator(mode="after")
    def _ahead_has_servers(self) -> RolloutConfig:
        if self.ahead and self.engine != "sglang":
            raise ValueError(
                f'rollout.ahead: expected 0 with rollout.engine = "{self.engine}", got {self.ahead}; servers alone '
                'generate beside the training: set rollout.engine = "sglang"'
            )
        return self

    @model_validator(mode="after")
    def _replay_is_complete(self) -> RolloutConfig:
        if self.engine == "replay" and self.replay_folder is None:
            raise ValueError('rollout.replay_folder: expected a folder with rollout.engine = "replay", got none')
        if self.engine != "replay" and self.replay_folder is not None:
            raise ValueError(
                f'rollout.replay_folder: expected none with rollout.engine = "{self.engine}", got {self.replay_folder}'
            )
        return self


class SGLangConfig(Section):
    """SGLang servers; read with rollout.engine = "sglang"."""

    host: str = "127.0.0.1"
    """Address that our own servers listen on. Beyond loopback they get random passwords, kept in memory alone."""
    keys_file: Path | None = None
    """Passwords of given servers: a JSON file {"api": "...", "admin": "..."}; "admin" opens the weight endpoints."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks of each of our own servers."""
    gpus: tuple[int, ...] = ()
    """GPUs of our own servers, tensor_parallel_size each in this order; none: they see those of the first process."""
    threads: int = Field(default=1, ge=1)
    """CPU threads a rank of our own servers."""
    memory_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the memory for weights and cache of our own servers; 0: SGLang's choice on a GPU."""
    max_total_tokens: int = Field(default=0, ge=0)
    """Tokens in the cache of each of our own servers; 0: SGLang's choice on a GPU, what the batch needs on a CPU."""
    arguments: tuple[str, ...] = ()
    """Further arguments of SGLang's command line for our own servers."""
    router_url: str = ""
    """A running sglang-router over all of rollout.server_urls, which then chooses who generates; weights go to the
    servers themselves all the same. Empty: the server with the fewest requests under way."""
    concurrency: int = Field(default=64, ge=1)
    """Requests at one server at once."""
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    """How often each server is looked at."""
    silence_seconds: float = Field(default=60.0, gt=0)
    """A request without a sign of life for so long is given to another server."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Until one of our own servers must have started."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """How long to go on without any server before the run ends."""


class SyncConfig(Section):
    """How new weights get to the servers; read with rollout.engine = "sglang"."""

    transport: Literal["broadcast", "folder"] = "broadcast"
    """broadcast: in a process group with the servers (NCCL on GPUs, gloo on CPUs); folder: by files that they read."""
    folder: Path | None = None
    """With transport = "folder": a folder that trainer and servers share; none: weights/ in the run's folder."""
    bucket_bytes: int = Field(default=268_435_456, ge=1)
    """Bytes that travel together, or that a file has at most; a larger tensor goes alone."""
    verify: Literal["always", "first", "never"] = "first"
    """After which syncs the servers' logprobs of a probe sequence are compared with the student's own."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest mean difference of the probe's logprobs in nats; 0: 1e-4 where all is float32, 0.05 elsewhere."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Until a bucket must have arrived; what takes longer is begun anew without the servers that failed."""
