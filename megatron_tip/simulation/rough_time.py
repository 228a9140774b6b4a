"""A step's time by formulas: good enough to say which layouts are worth a simulation, in microseconds each.

Per token and layer it counts matrix products and attention, the bytes of all other operations, and the messages of
tensor and context parallelism and to experts; beside the layers both output heads, the reduction of gradients and the
pipeline's waiting. The engines' time is the plan's own. `training.offload` is not counted: it adds the same to every
layout that needs it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import feed_forward_parameters, forward_flops, head_flops, num_parameters
from megatron_tip.records import Rollout
from megatron_tip.simulation.device import Device
from megatron_tip.simulation.layouts import Layout, Sizes
from megatron_tip.teachers.setup import splits_sequence

_VALUE = 2
"""Bytes of a weight or an activation."""
_GRADIENT = 4
_BACKWARD = 2
"""The cost of a backward pass in forward passes."""
_OPERATIONS = 85
"""Of a layer's forward pass."""
_WHOLE, _SPLIT, _LOGITS = 19, 11, 10
"""Values that all but matrix products read and write, as counted in simulated steps of the 14B recipe.

In a layer, per value of the hidden state (norms, residuals: whole on every tensor-parallel rank unless it splits the
sequence), and per channel of attention and feed-forward network; in a head, per logit.
"""


@dataclass(frozen=True)
class RoughTime:
    """The time of a step of `rollouts` in any layout of a world of `world_size` ranks.

    `known`: times that were asked for, by what they depend on.
    """

    config: Config
    student: ModelArchitecture
    teacher: ModelArchitecture
    device: Device
    world_size: int
    workers_per_node: int
    rollouts: Sequence[Rollout]
    known: dict[Hashable, float] = field(default_factory=dict)

    @cached_property
    def num_tokens(self) -> int:
        return sum(one.num_tokens for one in self.rollouts)

    @cached_property
    def num_rows(self) -> int:
        return sum(len(one.response_ids) for one in self.rollouts)

    @cached_property
    def mean_length(self) -> float:
        """The mean length of a token's sequence."""
        return sum(one.num_tokens**2 for one in self.rollouts) / self.num_tokens

    def step_seconds(self, layout: Layout, *, takes_one_pass: bool) -> float:
        """Returns the time of a step without generation and offload."""
        taught, trained = (
            (layout.teacher, layout.max_tokens),
            (layout.student, layout.max_tokens, layout.recomputed, takes_one_pass),
        )
        if taught not in self.known:
            self.known[taught] = self._teacher_seconds(*taught)
        if trained not in self.known:
            self.known[trained] = self._student_seconds(layout, takes_one_pass=takes_one_pass)
        return self.known[taught] + self.known[trained]

    def _teacher_seconds(self, sizes: Sizes, max_tokens: int) -> float:
        """Returns the time of the teacher's forward pass."""
        is_split = splits_sequence(self.config, self.teacher)
        values = _layer_values(self.teacher, sizes.tp, sizes.tp if is_split else 1)
        return self._passes("teacher", sizes, max_tokens, values, forward=1.0, backward=0.0)

    def _student_seconds(self, layout: Layout, *, takes_one_pass: bool) -> float:
        """Returns the time of scoring, training and update."""
        sizes, again = layout.student, {"layer": 1.0, "mlp": 0.5}
        repeated = sum(again.get(name, 0.0) for name in layout.recomputed)
        forward = (1.0 if takes_one_pass else 2.0) + repeated
        values = _layer_values(self.student, sizes.tp, sizes.tp if layout.sequence_parallel(self.config) else 1)
        layers = self._passes("model", sizes, layout.max_tokens, values, forward=forward, backward=_BACKWARD)
        return layers + self._heads(sizes) + self._gradients(sizes)

    def _passes(
        self, section: str, sizes: Sizes, max_tokens: int, values: float, *, forward: float, backward: float
    ) -> float:
        """Returns the time of so many passes through a model's layers, in units of a forward pass.

        Args:
            section: of the configuration, which names the model.
            values: of a layer's forward pass per token, that all but matrix products read and write.
        """
        model = self.student if section == "model" else self.teacher
        device, of_replica = self.device, self.num_tokens / self._replicas(sizes)
        tokens, layers = of_replica / sizes.cp, model.num_layers / sizes.pp
        count = max(1.0, of_replica / max(max_tokens, self.mean_length))
        flops = forward_flops(model, num_tokens=tokens, mean_length=self.mean_length) / (sizes.tp * sizes.pp)
        matrix = flops / (device.tflops * 1e12 * device.matrix_share)
        memory = layers * tokens * values * _VALUE / (device.memory_tb_per_s * 1e12 * device.memory_share)
        starting = count * layers * _OPERATIONS * device.launch_us * 1e-6
        busy = (forward + backward) * max(matrix + memory, starting)
        hidden = tokens * model.hidden_size * _VALUE
        # Two all-reduces, or pairs of their halves, in a layer's forward pass and two in its backward pass.
        each = self._ring(sizes.tp, 1, hidden, times=2.0) + count * self._latency(sizes.tp)
        busy += 2 * layers * (forward + backward / 2) * each
        # The keys and values of all parts are gathered, and their gradients are scattered.
        keys = of_replica * 2 * model.num_query_groups * model.head_dim / sizes.tp * _VALUE
        each = self._ring(sizes.cp, sizes.tp, keys, times=1.0) + count * self._latency(sizes.cp)
        busy += layers * (forward + backward / 2) * (each + self._sending(section, sizes, tokens / sizes.tp))
        if sizes.pp > 1:
            link = device.network_gb_per_s if self.world_size > self.workers_per_node else device.link_gb_per_s
            busy += (forward + backward / 2) * hidden / (link * 1e9 * device.link_share)
        return busy * (count + sizes.pp - 1) / count

    def _heads(self, sizes: Sizes) -> float:
        """Returns the time of both output heads: of all rows once, of the selected ones three times and once."""
        share, device = self.config.selection.retention_ratio, self.device
        rows = self.num_rows / (self._replicas(sizes) * sizes.cp)
        flops = (1 + 3 * share) * head_flops(self.student, num_rows=rows)
        flops += (1 + share) * head_flops(self.teacher, num_rows=rows)
        logits = 2 * (1 + share) * rows * self.student.vocab_size * _LOGITS * _VALUE
        matrix = flops / (device.tflops * 1e12 * device.matrix_share)
        return (matrix + logits / (device.memory_tb_per_s * 1e12 * device.memory_share)) / sizes.tp

    def _gradients(self, sizes: Sizes) -> float:
        """Returns the time in which replicas add up gradients and, with a distributed optimizer, gather weights."""
        model = self.student
        in_experts = sum(feed_forward_parameters(model, layer)[1] for layer in range(model.num_layers))
        weights = (num_parameters(model) - in_experts) / (sizes.tp * sizes.pp)
        weights += in_experts / (self._expert_ranks("model", sizes) * sizes.pp)
        replicas = self._replicas(sizes) * sizes.cp
        if self.config.optimizer.distributed:
            return self._ring(replicas, sizes.tp, weights * (_GRADIENT + _VALUE), times=1.0)
        return self._ring(replicas, sizes.tp, weights * _GRADIENT, times=2.0)

    def _replicas(self, sizes: Sizes) -> int:
        return max(1, self.world_size // sizes.replica)

    def _ring(self, size: int, stride: int, num_bytes: float, *, times: float) -> float:
        """Returns the time of so many passes around `size` ranks, every `stride`-th of the world."""
        device = self.device
        bandwidth = device.link_gb_per_s if size * stride <= self.workers_per_node else device.network_gb_per_s
        return times * (size - 1) / size * num_bytes / (bandwidth * 1e9 * device.link_share)

    def _sending(self, section: str, sizes: Sizes, tokens: float) -> float:
        """Returns the time of sending a layer's tokens to their experts and back."""
        model = self.student if section == "model" else self.teacher
        if model.experts is None:
            return 0.0
        num_bytes = tokens * model.experts.num_active * model.hidden_size * _VALUE
        return self._ring(self._expert_ranks(section, sizes), 1, num_bytes, times=2.0)

    def _expert_ranks(self, section: str, sizes: Sizes) -> int:
        """Returns the number of ranks that share the experts of a stage."""
        model = self.config.model if section == "model" else self.config.teacher
        return model.expert_model_parallel_size * (model.expert_tensor_parallel_size or sizes.tp)

    def _latency(self, size: int) -> float:
        if size == 1:
            return 0.0
        device = self.device
        return (device.link_latency_us if size <= self.workers_per_node else device.network_latency_us) * 1e-6


def _layer_values(model: ModelArchitecture, tp: int, sequence_parts: int) -> float:
    """Returns the values per token that all but matrix products of a layer's forward pass read and write."""
    heads = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    experts = model.experts
    channels = model.ffn_hidden_size if experts is None else experts.num_active * experts.ffn_hidden_size
    return _WHOLE * model.hidden_size / sequence_parts + _SPLIT * (heads + channels) / tp
