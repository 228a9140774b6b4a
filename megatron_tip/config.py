"""The run configuration: typed, frozen, read from TOML; an unknown key or a wrong type is an error.

The text under each field is its reference: `megatron-tip train --help` prints it. Units are in the names.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after validation, field docstrings as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class RunConfig(Section):
    """The run as a whole."""

    folder: Path
    """Where the run leaves its files; created if missing."""
    seed: int = 1
    """Every random choice of the run follows from it: sampling, random selection, prompt order."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of all workers together; 0: as many as this process may use."""


class ModelConfig(Section):
    """The student: trained, generates."""

    path: Path
    """Hugging Face directory (config.json, tokenizer, safetensors)."""
    drop_layers: tuple[int, ...] = ()
    """Decoder layers to leave out on the way in, counted from 0 in the checkpoint: prune and distil."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron's layers; auto: transformer_engine on a GPU where it is installed, local elsewhere."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; divides the attention heads."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the stack of layers; divides the number of layers kept."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""
    recompute_activations: bool = False
    """Recompute every layer in the backward pass instead of keeping its activations."""


class TeacherConfig(Section):
    """The teacher: frozen, forward only. Its layout may differ from the student's; both fill the same ranks."""

    kind: Literal["megatron", "sglang"] = "megatron"
    """megatron: in the trainer's own processes; sglang: behind SGLang servers that are running at `urls`."""
    path: Path
    """Hugging Face directory; its tokenizer must be the student's. With kind = "sglang" no weights are needed."""
    special_tokens: Literal["same", "may_differ"] = "same"
    """may_differ: the teacher's special tokens may have other names and meanings, as long as all text tokens are the
    student's; it reads the student's ids as its own. TA-OPD's pair of DeepSeek-R1-Distill-Qwen and Qwen2.5 needs it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron's layers; as for the student."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer of the teacher."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the teacher's stack of layers."""
    urls: tuple[str, ...] = ()
    """With kind = "sglang": "http://host:port" of each server; "name=http://host:port" with several teachers."""
    student_support: Literal["ask", "skip"] = "ask"
    """With kind = "sglang": ask for logprobs of the student's top-K too, for an exact C and D; skip: lower bounds."""
    window_tokens: int = Field(default=16, ge=1)
    """With kind = "sglang": response tokens that share a request about the student's top-K."""
    max_concurrent: int = Field(default=32, ge=1)
    """With kind = "sglang": scoring requests in flight from each replica."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """With kind = "sglang": how long a server may take for an answer; then another is asked."""
    keys_file: Path | None = None
    """With kind = "sglang": passwords of the servers, as of sglang.keys_file; "admin" is not needed."""

    @model_validator(mode="after")
    def _servers_are_given(self) -> "TeacherConfig":
        if (self.kind == "sglang") != bool(self.urls):
            got = ", ".join(self.urls) or "none"
            raise ValueError(f'teacher.urls: expected URLs with teacher.kind = "sglang" and only then, got {got}')
        names = [name for name, _ in map(split_teacher_url, self.urls)]
        if "" in names and len(set(names)) > 1:
            raise ValueError('teacher.urls: expected all of them as "name=http://host:port", or none')
        return self


class PromptsConfig(Section):
    """Where prompts come from."""

    source: Literal["file", "reasoning_gym"] = "file"
    """A JSONL or Parquet file, or generated reasoning-gym tasks."""
    path: Path | None = None
    """With source = "file": the .jsonl or .parquet file."""
    field: str = "prompt"
    """With source = "file": the field or column that holds the prompt, a text or a list of chat messages."""
    tasks: tuple[str, ...] = ()
    """With source = "reasoning_gym": names of tasks, drawn from in turn."""
    num_prompts: int = Field(default=0, ge=0)
    """With source = "reasoning_gym": how many to generate for training; 0: as many as the run needs."""
    apply_chat_template: bool = True
    """Render a text as a single user message through the tokenizer's chat template; messages always are."""
    system_prompt: str = ""
    """A system message put before each prompt; empty: none."""
    teacher_field: str = ""
    """With several teachers and source = "file": the field that names each prompt's teacher."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """A longer prompt is skipped and counted."""
    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch; false: in the order of the file."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> "PromptsConfig":
        if self.source == "file" and self.path is None:
            raise ValueError('prompts.path: expected a .jsonl or .parquet file with prompts.source = "file", got none')
        if self.source == "reasoning_gym" and not self.tasks:
            raise ValueError('prompts.tasks: expected task names with prompts.source = "reasoning_gym", got none')
        ignored = self.tasks if self.source == "file" else self.path
        if ignored:
            name = "tasks" if self.source == "file" else "path"
            raise ValueError(f'prompts.{name}: expected none with prompts.source = "{self.source}", got {ignored}')
        return self


def split_teacher_url(text: str) -> tuple[str, str]:
    """Name of the teacher, "" for a single one, and URL of one of its servers."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else ("", text)


class HeldoutConfig(Section):
    """Prompts never trained on, on which KL(student || teacher) is measured on the student's own responses.

    At loss.temperature. With rollout.engine = "replay" the responses are those that the earlier run recorded.
    """

    num_prompts: int = Field(default=16, ge=0)
    """Taken from the end of the prompt source, or generated with another seed; 0: no held-out measurement."""
    every_steps: int = Field(default=0, ge=0)
    """Measure every so many steps too; 0: only before the first and after the last."""
    num_samples: int = Field(default=4, ge=0)
    """Responses written to samples.jsonl, before and after."""


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
    def _ahead_has_servers(self) -> "RolloutConfig":
        if self.ahead and self.engine != "sglang":
            raise ValueError(
                f'rollout.ahead: expected 0 with rollout.engine = "{self.engine}", got {self.ahead}; servers alone '
                'generate beside the training: set rollout.engine = "sglang"'
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


class SelectionConfig(Section):
    """Which tokens are supervised."""

    rule: str = "ta_opd_teachability"
    """A preset of megatron_tip.selection, an installed package's rule, or "package.module:function" for your own."""
    retention_ratio: float = Field(default=0.05, gt=0, le=1)
    """The share rho of valid response tokens that is kept."""
    scope: Literal["auto", "batch", "rollout", "micro_batch"] = "auto"
    """Over what the budget holds; auto: what the preset's paper says. micro_batch: one pass, no scoring forward."""
    thresholds: Literal["this_step", "last_step"] = "this_step"
    """Whose quantiles and threshold decide; last_step: one pass, the budget met on average, with scope = "batch"."""
    normaliser: Literal["auto", "robust", "clipped_min_max", "min_max", "raw"] = "auto"
    """How statistics are put on one scale before they are scored; auto: what the preset's paper says."""
    tie_break: Literal["token_order", "random"] = "token_order"
    """Which of equal scores are kept: the first in (prompt, rollout, position), or a seeded draw."""
    minimum_per_rollout: int = Field(default=1, ge=0)
    """Tokens kept of a rollout so short that its share rounds down to less; with scope = "rollout"."""
    support_size: int = Field(default=16, ge=1)
    """K of the top-K supports (TA-OPD: 16)."""
    loss_scale: Literal["selected", "valid", "importance"] = "selected"
    """Divide the loss by the number of selected tokens, by that of valid ones, or weight sampled tokens by 1 / p."""
    compare: bool = True
    """Log how far the other rules would have agreed with this one, as far as the statistics allow."""


class LossConfig(Section):
    """What the selected tokens are trained on."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "topk_reverse_kl"] = "reverse_kl"
    """Over the full vocabulary, exact under tensor parallelism; sampled_token: log p(y) - log q(y) of the label;
    topk_reverse_kl, of a teacher behind servers: ids whose teacher logprob is not known count as one."""
    jsd_beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the generalised Jensen-Shannon divergence, with divergence = "jsd"."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of student and teacher alike, in statistics and loss."""
    chunk_rows: int = Field(default=0, ge=0)
    """Rows of logits alive at once; 0: chosen from the shapes."""


class OptimizerConfig(Section):
    """Megatron's AdamW."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; not applied to norms and biases."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm over all parameters; 0: no clipping."""
    distributed: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""


class TrainingConfig(Section):
    """The loop."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Padded tokens that go through the model together; a longer sequence makes a micro-batch of its own."""


class CheckpointConfig(Section):
    """What an interrupted run continues from, in checkpoints/: everything that the next step depends on."""

    every_steps: int = Field(default=20, ge=0)
    """Save after so many steps; 0: not for that reason."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Save after the step that ends so long after the last save; 0: not for that reason."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are removed once a newer one is whole."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Those of steps divisible by it are kept as well; 0: none."""
    in_background: bool = True
    """Copy what is saved to host memory and write it while training goes on; false: wait for the disk."""


class FaultConfig(Section):
    """What happens when something goes wrong."""

    step_timeout_seconds: float = Field(default=1800.0, ge=0)
    """A rank that finishes no step for so long writes its stacks to stacks/ and ends the run; 0: waits for ever."""
    grace_seconds: float = Field(default=120.0, ge=0)
    """Told to stop, `megatron-tip train` gives its workers so long to save before it ends them."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """Steps in a row whose loss or gradient is not finite are skipped; after so many the run saves and ends."""


class OutputConfig(Section):
    """What the run leaves besides metrics, samples and rollouts."""

    save_checkpoint: bool = True
    """Write Megatron's sharded checkpoint to checkpoint/ at the end."""
    export_hf: bool = True
    """Write the student as a Hugging Face directory to hf/ at the end."""
    save_rollouts: bool = True
    """Write each step's rollouts to rollouts/, readable by the replay engine."""


class TrackingConfig(Section):
    """Where the run's numbers go besides metrics.jsonl, which is always written. No tracker's failure ends a run."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline: files under wandb/ in the run's folder, which `wandb sync` uploads later."""
    wandb_project: str = "megatron-tip"
    """Project of the run."""
    wandb_entity: str = ""
    """User or team; empty: the account's default."""
    wandb_name: str = ""
    """Name of the run; empty: that of the run's folder."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_artifact: bool = False
    """Store the exported student (hf/) as an artifact at the end."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run's folder."""
    view_every_steps: int = Field(default=0, ge=0)
    """Every so many steps, show responses with the selected tokens coloured and the tokens' quadrants, in views/ of the
    run's folder and in every tracker; 0: never."""
    view_samples: int = Field(default=4, ge=1)
    """Responses in such a view."""
    view_points: int = Field(default=2000, ge=1)
    """Tokens in such a view's scatter of quadrants."""


class MonitoringConfig(Section):
    """What is measured of the machine."""

    every_seconds: float = Field(default=5.0, ge=0)
    """Sample GPU and host so often, in a thread; each step is given at least one sample. 0: no monitoring."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Dense bfloat16 TFLOP/s of one worker's device, for model FLOPs utilisation; 0: known by the GPU's name, else
    utilisation is left out."""
    trace: bool = False
    """Write trace.json, a time line of every worker's phases for Perfetto (ui.perfetto.dev)."""


class Config(Section):
    """A complete run."""

    run: RunConfig
    model: ModelConfig
    teacher: TeacherConfig
    prompts: PromptsConfig
    heldout: HeldoutConfig = HeldoutConfig()
    rollout: RolloutConfig = RolloutConfig()
    sglang: SGLangConfig = SGLangConfig()
    sync: SyncConfig = SyncConfig()
    selection: SelectionConfig = SelectionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault: FaultConfig = FaultConfig()
    output: OutputConfig = OutputConfig()
    tracking: TrackingConfig = TrackingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
