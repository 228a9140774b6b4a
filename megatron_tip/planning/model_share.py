"""What a rank holds of a model: its share of the weights, and activations."""

from dataclasses import dataclass
from functools import cached_property

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import feed_forward_parameters, layer_parameters, routing_parameters
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.teachers.setup import splits_sequence


@dataclass(frozen=True)
class ModelShare:
    """One model in its layout, of which a rank has a share.

    `padded_vocab_size`: rows of its embeddings. `has_head`: with its own output layer.
    """

    architecture: ModelArchitecture
    grid: ModelGrid
    bytes_per_value: int
    padded_vocab_size: int
    has_head: bool = True

    @cached_property
    def stages(self) -> list[range]:
        """The layers of each pipeline stage."""
        return self.grid.layers_of_stages(self.architecture.num_layers)

    @cached_property
    def counts(self) -> tuple[float, float]:
        """Parameters on a rank of the fullest stage: outside of the experts, and in them."""
        return max((self._counts(stage) for stage in range(self.grid.pp_size)), key=sum)

    def _counts(self, stage: int) -> tuple[float, float]:
        """Returns the same of one stage: layers, embedding or head or both, and the last norm.

        Every tp rank has the norms, the routers and a shared expert's gate whole.
        """
        a, grid = self.architecture, self.grid
        is_last = stage == grid.pp_size - 1
        outside, in_experts = 0.0, 0.0
        for layer in self.stages[stage]:
            _, experts = feed_forward_parameters(a, layer)
            whole = 2 * a.hidden_size + 2 * a.head_dim * a.qk_norm + routing_parameters(a, layer)
            outside += (layer_parameters(a, layer) - experts - whole) / grid.tp_size + whole
            in_experts += experts / (grid.expert_tp_size * grid.ep_size)
        has_own_matrix = is_last and self.has_head and (stage > 0 or not a.tied_embeddings)
        matrices = (stage == 0) + has_own_matrix
        outside += matrices * self.padded_vocab_size * a.hidden_size / grid.tp_size + is_last * a.hidden_size
        return outside, in_experts

    @property
    def num_parameters(self) -> float:
        """Parameters on a rank of the fullest stage."""
        return sum(self.counts)

    def num_updated(self, *, distributed: bool) -> float:
        """Returns of how many of them the rank has the optimizer's state. `distributed`: the copies share it."""
        if not distributed:
            return self.num_parameters
        outside, in_experts = self.counts
        return outside / (self.grid.dp_size * self.grid.cp_size) + in_experts / self.grid.expert_dp_size

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * self.bytes_per_value


def forward_bytes(config: Config, owner: str, model: ModelShare | None) -> dict[str, float]:
    """Returns the bytes of a forward pass without gradient: one layer's."""
    if model is None:
        return {}
    kinds = {model.architecture.has_experts(layer): layer for layer in range(model.architecture.num_layers)}
    layer = max(_layer_bytes_per_token(config, model, layer, owner) for layer in kinds.values())
    longest = config.longest_teacher_sequence if owner == "teacher" else config.longest_sequence
    return {f"{owner}: a layer's activations": layer * _tokens(config, longest)}


def _layer_bytes_per_token(config: Config, model: ModelShare, layer: int, owner: str) -> float:
    """Returns a rank's activations of one layer, per token of the replica, of which it holds one in cp.

    Fused attention keeps nothing of size length x length. They are the inputs of its two norms and of its four matrix
    products, q, k, v and the products of SwiGLU. With experts: inputs, products and outputs of each expert that a token
    passes through, if all experts get equally many. Not counted: the keys and values that local layers gather under
    context parallelism.
    """
    a, tp = model.architecture, model.grid.tp_size
    heads = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
    split = (heads + a.num_attention_heads * a.head_dim) / tp
    whole = 4 * a.hidden_size / (tp if _is_sequence_parallel(config, model, owner) else 1)
    attention = (split + whole) * model.bytes_per_value / model.grid.cp_size
    return attention + _feed_forward_bytes_per_token(model, layer)


def kept_bytes_per_token(config: Config, student: ModelShare, stage: int = 0) -> float:
    """Returns what a stage keeps for the backward pass.

    With recomputation a layer keeps only its input, or all but what its feed-forward network makes.
    """
    layers, grid = student.stages[stage], student.grid
    if config.model.recompute_activations:
        layer_input = student.architecture.hidden_size * student.bytes_per_value / grid.cp_size
        return len(layers) * layer_input / (grid.tp_size if config.model.sequence_parallel else 1)
    kept = sum(_layer_bytes_per_token(config, student, layer, "student") for layer in layers)
    if "mlp" in config.model.recompute_modules:
        kept -= sum(_feed_forward_bytes_per_token(student, layer) for layer in layers)
    return kept


def _is_sequence_parallel(config: Config, model: ModelShare, owner: str) -> bool:
    return config.model.sequence_parallel if owner == "student" else splits_sequence(config, model.architecture)


def _feed_forward_bytes_per_token(model: ModelShare, layer: int) -> float:
    a, grid = model.architecture, model.grid
    values = 3 * a.ffn_hidden_size
    if a.experts is not None and a.has_experts(layer):
        hidden = 2 * a.hidden_size * grid.expert_tp_size  # each of an expert's ranks has the tokens of all
        values = a.experts.num_active * (hidden + 3 * a.experts.ffn_hidden_size)
        values += 3 * a.experts.shared_ffn_hidden_size
    return values / grid.tp_size * model.bytes_per_value / grid.cp_size


def activation_bytes(config: Config, student: ModelShare) -> float:
    """Returns the bytes kept for the backward pass.

    Up to pp micro-batches are in flight in the first stage, and one fewer in each that follows. With recomputation one
    layer at a time has all of its activations.
    """
    in_flight = range(student.grid.pp_size, 0, -1)
    per_token = max(count * kept_bytes_per_token(config, student, stage) for stage, count in enumerate(in_flight))
    recomputed = sum(forward_bytes(config, "student", student).values()) if config.model.recompute_activations else 0.0
    if "mlp" in config.model.recompute_modules:
        layers = range(student.architecture.num_layers)
        per_token += max(_feed_forward_bytes_per_token(student, layer) for layer in layers)
    return per_token * _tokens(config, config.longest_sequence) + recomputed


def _tokens(config: Config, longest: int) -> int:
    """Returns the tokens of the fullest micro-batch, given those of the longest sequence."""
    return max(config.training.max_tokens_per_micro_batch, longest)
