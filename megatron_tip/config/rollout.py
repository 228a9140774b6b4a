"""How the student generates, and how its weights reach the servers."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_tip.config.section import Section


class RolloutConfig(Section):
    """How the student generates."""

    engine: Literal["embedded", "sglang", "replay"] = "embedded"
    """embedded: transformers' generate in the trainer's first process; sglang: SGLang servers, see [sglang] and
    [sync]; replay: the rollouts of an earlier run."""
    replay_folder: Path | None = None
    """With engine = "replay": the `rollouts/` folder of the earlier run."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per training step."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Maximum length; a longer response is cut off, with finish_reason "length"."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1: the whole distribution."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences that the embedded engine generates together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weight type of the embedded engine or of our own servers; auto: the student's."""
    environment: str = ""
    """What answers the student's turns: "calculator", or "package.module:Class"; empty: rollouts have a single turn."""
    max_turns: int = Field(default=8, ge=1)
    """With an environment: the student's turns per rollout; max_response_tokens limits all of them together."""
    observation_role: Literal["tool", "user"] = "tool"
    """With an environment: the chat template's role for its answers to the student."""
    servers: int = Field(default=0, ge=0)
    """With engine = "sglang": how many servers to start if server_urls is empty, on all nodes together. 0: as many as
    fit on sglang.gpus, on the trainer's GPUs (sglang.share_gpus) or on nodes for rollouts; otherwise one."""
    server_urls: tuple[str, ...] = ()
    """With engine = "sglang": running servers to use instead, as "http://host:port"."""
    ahead: int = Field(default=0, ge=0, le=1)
    """1: generate the next step's rollouts while this step trains, with the weights from the start of this step."""
    importance_cap: float = Field(default=0.0, ge=0)
    """For rollouts from older weights: weight each token's loss by min(p_student / p_rollout, this); 0: no weights."""
    attempts: int = Field(default=4, ge=1)
    """With engine = "sglang": a sample that fails this often is set aside in set_aside.jsonl, and counted."""
    on_wrong_version: Literal["regenerate", "drop"] = "regenerate"
    """With engine = "sglang": what to do with a response whose weights are not those of the last sync."""

    @model_validator(mode="after")
    def _ahead_has_servers(self) -> "RolloutConfig":
        if self.ahead and self.engine != "sglang":
            raise ValueError(
                f'rollout.ahead: expected 0 with rollout.engine = "{self.engine}", got {self.ahead}; only servers '
                'generate during training: set rollout.engine = "sglang"'
            )
        return self

    @model_validator(mode="after")
    def _replay_is_complete(self) -> "RolloutConfig":
        if self.engine == "replay" and self.replay_folder is None:
            raise ValueError('rollout.replay_folder: expected a folder with rollout.engine = "replay", got none')
        if self.engine != "replay" and self.replay_folder is not None:
            raise ValueError(
                f'rollout.replay_folder: expected none with rollout.engine = "{self.engine}", got {self.replay_folder}'
            )
        return self


class SGLangConfig(Section):
    """SGLang servers; used with rollout.engine = "sglang"."""

    host: str = "127.0.0.1"
    """Address that our own servers listen on. Beyond loopback they get random passwords, kept only in memory."""
    keys_file: Path | None = None
    """Passwords of given servers: a JSON file {"api": "...", "admin": "..."}; "admin" opens the weight endpoints."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks of each of our own servers. Those of a teacher's servers: teacher.tensor_parallel_size."""
    share_gpus: bool = False
    """true: our own servers use the trainer's GPUs and share their memory. false: they have GPUs of their own, and no
    worker starts on those."""
    gpus: tuple[int, ...] = ()
    """GPUs of our own servers on each node, in this order, tensor_parallel_size for each; some of those in
    CUDA_VISIBLE_DEVICES. None: with share_gpus the trainer's, otherwise the last ones."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per rank of our own servers."""
    memory_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the memory that is free when the server starts, for weights and cache of our own servers; 0: 0.3 beside
    the trainer, otherwise SGLang chooses."""
    release_memory: Literal["auto", "always", "never"] = "auto"
    """Whether servers give back their memory, cache and weights, while the trainer trains; auto: if they share its
    GPUs. Given servers need SGLang's --enable-memory-saver for it. Not with rollout.ahead or sglang.router_url."""
    max_total_tokens: int = Field(default=0, ge=0)
    """Tokens in the cache of each of our own servers; 0: on a GPU SGLang chooses, on a CPU what the batch needs."""
    arguments: tuple[str, ...] = ()
    """Additional command-line arguments of SGLang for our own servers."""
    router_url: str = ""
    """A running sglang-router over all of rollout.server_urls, which then chooses the server for each request; weights
    still go directly to the servers. Empty: the server with the fewest requests in flight."""
    concurrency: int = Field(default=64, ge=1)
    """Maximum of concurrent requests at one server."""
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    """Interval between health checks of each server."""
    silence_seconds: float = Field(default=60.0, gt=0)
    """A request without a sign of life for this long goes to another server."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Time limit for one of our own servers to start."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """How long to wait without any server before the run ends."""


class SyncConfig(Section):
    """How new weights reach the servers; used with rollout.engine = "sglang"."""

    transport: Literal["auto", "ipc", "broadcast", "folder"] = "auto"
    """ipc: servers copy out of the memory of the trainer ranks on their GPUs, or on their host without GPUs; broadcast:
    in a process group of the first rank and the servers (NCCL on GPUs, gloo on CPUs); folder: as files that they read;
    auto: the first of these that the placement allows."""
    folder: Path | None = None
    """With transport = "folder": folder that trainer and servers share; none: weights/ in the run's folder."""
    bucket_bytes: int = Field(default=268_435_456, ge=1)
    """Maximum bytes per bucket or file; a larger tensor goes alone."""
    verify: Literal["always", "first", "never"] = "first"
    """After which syncs to compare the servers' logprobs of a probe sequence with the student's own."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest median difference of the probe's logprobs in nats; 0: 1e-4 if everything is float32, else 8% of their
    spread."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Time limit for a bucket to arrive; after it the sync starts again without the servers that failed."""
