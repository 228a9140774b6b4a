"""Student and teacher."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_tip.config.section import Section


class ModelConfig(Section):
    """The student: it is trained and generates."""

    path: Path
    """Hugging Face directory (config.json, tokenizer, safetensors)."""
    drop_layers: tuple[int, ...] = ()
    """Decoder layers to drop when loading, counted from 0 in the checkpoint: prune and distil."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of Megatron's layers; auto: transformer_engine for bfloat16 on a GPU if installed, else local."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; must divide the number of attention heads."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the stack of layers; without `pipeline_layers` it must divide the number of layers kept."""
    pipeline_layers: tuple[int, ...] | Literal["auto"] = ()
    """How many of the layers kept each pipeline stage has; auto: balanced, with the work of both output heads and the
    loss on the last stage. Default: equally many."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence: activations of long responses are divided by it."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks over which the experts of a layer are distributed; must divide their number."""
    expert_tensor_parallel_size: int = Field(default=0, ge=0)
    """Ranks that share each expert; 0: tensor_parallel_size, as in Megatron. 1 suits small experts."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss of the experts' routers beside the distillation loss; 0: none. It covers the
    tokens that are trained on: in one pass all of them, in two those that the cut leaves."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence. Experts need it for tensor parallelism."""
    recompute_activations: bool = False
    """Recompute every layer in the backward pass instead of keeping its activations."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ()
    """Megatron's selective recomputation: parts of each layer to recompute instead, without recompute_activations. mlp:
    the feed-forward network, which keeps the most; core_attn: attention, with the keys and values that local layers
    gather under context parallelism."""

    @model_validator(mode="after")
    def _recomputes_in_one_way(self) -> "ModelConfig":
        if self.recompute_activations and self.recompute_modules:
            got = ", ".join(self.recompute_modules)
            raise ValueError(
                f"model.recompute_modules: expected none with model.recompute_activations, which recomputes whole "
                f"layers, got {got}; set one of the two"
            )
        return self

    @property
    def recomputed(self) -> tuple[str, ...]:
        """What the backward pass runs again, as `models.recompute` takes it."""
        return ("layer",) if self.recompute_activations else self.recompute_modules


class TeacherConfig(Section):
    """The teacher: forward passes only. Its layout may differ from the student's; both fill the same ranks."""

    kind: Literal["megatron", "sglang", "self"] = "megatron"
    """megatron: in the trainer's own processes; sglang: behind SGLang servers that run at `urls`; self: the student's
    own weights, with the path, dtype and layout of [model]."""
    path: Path = Field(default=Path(), validate_default=False)
    """Hugging Face directory; its tokenizer must be the student's. With kind = "sglang" no weights are needed.
    Required, except with kind = "self"."""
    update: Literal["frozen", "live", "average"] = "frozen"
    """With kind = "self". frozen: the student as it began; live: as it is, without a second copy; average: a moving
    average of it."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """With update = "average": the share of itself that the average keeps at each step."""
    special_tokens: Literal["same", "may_differ"] = "same"
    """may_differ: the teacher's special tokens may have other names and meanings, as long as all text tokens are the
    same; it reads the student's ids as its own. TA-OPD's pair of DeepSeek-R1-Distill-Qwen and Qwen2.5 needs this."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of Megatron's layers; as for the student."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer of the teacher; also of each server that a SLURM job starts with it."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the teacher's stack of layers."""
    pipeline_layers: tuple[int, ...] | Literal["auto"] = ()
    """How many of the teacher's layers each stage has; auto: as equal as the number allows."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks over which the experts of a teacher's layer are distributed; must divide their number."""
    expert_tensor_parallel_size: int = Field(default=0, ge=0)
    """Ranks that share each expert of the teacher; 0: tensor_parallel_size."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence in the teacher; may differ from the student's."""
    fp8: Literal["none", "e4m3", "hybrid"] = "none"
    """Megatron's: matrix products of Transformer Engine's layers in 8 bits, scaled tensor by tensor. Needs a GPU."""
    urls: tuple[str, ...] = ()
    """With kind = "sglang": "http://host:port" of each server; "name=http://host:port" with several teachers."""
    student_support: Literal["ask", "skip"] = "ask"
    """With kind = "sglang". ask: request logprobs of the student's top-K too, for exact C and D. skip: lower bounds."""
    window_tokens: int = Field(default=16, ge=1)
    """With kind = "sglang": response tokens per request about the student's top-K."""
    max_concurrent: int = Field(default=32, ge=1)
    """With kind = "sglang": maximum of scoring requests in flight from each replica."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """With kind = "sglang": how long to wait for a server's answer before asking another server."""
    wait_seconds: float = Field(default=300.0, ge=0)
    """With kind = "sglang": how long to retry while no server answers, before the run is saved and ends."""
    keys_file: Path | None = None
    """With kind = "sglang": passwords of the servers, as in sglang.keys_file; "admin" is not needed."""

    @model_validator(mode="after")
    def _servers_are_given(self) -> "TeacherConfig":
        if (self.kind == "sglang") != bool(self.urls):
            got = ", ".join(self.urls) or "none"
            raise ValueError(f'teacher.urls: expected URLs with teacher.kind = "sglang" and only then, got {got}')
        if self.kind != "self" and self.path == Path():
            raise ValueError("teacher.path: expected path, got nothing")
        if self.kind != "self" and self.update != "frozen":
            raise ValueError(
                f'teacher.update: expected "frozen" with teacher.kind = "{self.kind}", got "{self.update}"'
            )
        if self.update != "average" and "ema_decay" in self.model_fields_set and self.ema_decay != 0.999:
            raise ValueError(f'teacher.ema_decay: expected teacher.update = "average", got "{self.update}"')
        names = {name for name, _ in self.routes}
        if "" in names and len(names) > 1:
            raise ValueError('teacher.urls: expected all or none of them as "name=http://host:port"')
        return self

    @property
    def routes(self) -> tuple[tuple[str, str], ...]:
        """Each URL with the name of the teacher that it leads to; "" for a single teacher."""
        return tuple(map(_split, self.urls))


def _split(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else ("", text)
