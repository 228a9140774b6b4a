"""The estimate of each phase, against numbers worked out by hand and against the tensors of tiny models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.machine import Machine
from megatron_tip.placement.hosts import Hosts, hosts_elsewhere
from megatron_tip.placement.placement import place
from megatron_tip.planning.dry_run import dry_run
from megatron_tip.planning.memory_estimate import SERVERS, UNCOUNTED, MemoryEstimate, estimate_memory
from megatron_tip.planning.phases import releases_memory
from megatron_tip.planning.plan import outline_run
from megatron_tip.training.checkpoints.student_state import complete_optimizer_state
from tests.helpers.distributed import run_workers
from tests.helpers.tiny import make_experts
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

EXAMPLES = Path(__file__).parents[3] / "examples"
GIB = 2.0**30
H, V, F = 4096, 128_256, 14_336
"""Llama-3.1-8B: 32 layers, 8 key/value heads of 128, an output layer of its own."""
H_TEACHER, F_TEACHER = 8192, 28_672
"""Llama-3.3-70B: 80 layers, 8 key/value heads of 128."""


def llama(*overrides: str) -> Config:
    """The recipe, with half of each GPU for the server on it unless `overrides` say otherwise."""
    path = EXAMPLES / "llama3_70b_to_8b" / "llama3_70b_to_8b.toml"
    return load_config(path, ("sglang.memory_fraction=0.5", *overrides))


def dry(*overrides: str) -> MemoryEstimate:
    """A dry run on one node of eight GPUs of 80 GiB."""
    result = dry_run(llama(*overrides), hosts_elsewhere(8, 8), gpu_memory_gib=80.0)
    result.require_memory()
    return result.memory


def estimate(config: Config, world_size: int) -> MemoryEstimate:
    outline = outline_run(config, world_size, Machine(is_elsewhere=True))
    return estimate_memory(config, outline, gpu_memory_gib=80.0)


def test_seventy_billion_on_one_node_by_hand():
    """8 GPUs: the student tp 4 x dp 2, the teacher tp 8."""
    found = estimate(llama(), 8).phases
    layer = (H * H + 2 * H * 1024 + H * H + 3 * H * F) / 4 + 2 * H
    student = 32 * layer + 2 * V * H / 4 + H
    layer = (H_TEACHER**2 + 2 * H_TEACHER * 1024 + H_TEACHER**2 + 3 * H_TEACHER * F_TEACHER) / 8 + 2 * H_TEACHER
    teacher = 80 * layer + V * H_TEACHER / 8 + H_TEACHER
    rows = 8 * 16 * 8192 * H_TEACHER * 2  # bfloat16
    whole_student = 32 * (2 * H * H + 2 * H * 1024 + 3 * H * F + 2 * H) + 2 * V * H + H
    assert {name: found["ask"][name] for name in found["ask"] if "activations" not in name} == {
        UNCOUNTED: pytest.approx(8 * GIB),
        "student: weights": 2 * student,
        "student: gradients, float32": 4 * student,
        "student: optimizer": 12 * student / 2,
        "teacher: weights": 2 * teacher,
        "teacher: head on the student's ranks": V / 4 * H_TEACHER * 2,
        "teacher: hidden states to send": rows,  # one replica of the teacher serves all
        "teacher: hidden states of a step": rows / 2,
        SERVERS: 0.0,
    }
    assert found["generate"][SERVERS] == 40 * GIB
    assert found["sync"][SERVERS] == found["save"][SERVERS] == 2 * whole_student
    assert found["sync"]["sync: a whole tensor, gathered and merged"] == 2 * V * H * 2
    assert found["sync"]["sync: buckets"] == 2 * 268_435_456
    assert estimate(llama("sync.transport=folder"), 8).parts["sync: buckets"] == 268_435_456
    assert found["save"]["save: a piece of the optimizer"] == 2 * 16 * 2**20
    assert found["train"]["teacher: hidden states of a step, the selected"] == rows / 2  # twice half of them
    assert found["update"]["optimizer: square roots, if AdamW is torch's"] == 4 * student / 2


def test_context_parallelism_divides_activations_and_rows_and_shares_the_optimizer():
    keys = ("sglang.share_gpus=true", "selection.passes=two")
    sizes = ("model.context_parallel_size=4", "teacher.context_parallel_size=2")
    whole, parts = (estimate(llama(*keys, *more), 64).phases for more in ((), sizes))
    for phase, name, divisor in (
        ("train", "student: activations of a micro-batch", 4),
        ("score", "student: a layer's activations", 4),
        ("ask", "teacher: a layer's activations", 2),
        # dp is smaller by cp, so that a rank holds as many rows as before
        ("ask", "teacher: hidden states to send", 1),
        ("ask", "teacher: hidden states of a step", 1),
        ("update", "student: optimizer", 1),
        ("update", "student: weights", 1),
    ):
        assert parts[phase][name] == pytest.approx(whole[phase][name] / divisor), name


def test_one_pass_holds_more_tokens_of_a_replica_whose_sequences_are_in_parts():
    """A rank's share of a replica's tokens is smaller by cp, and the replica has as many times more of the batch."""
    whole, parts = (
        estimate(llama("selection.passes=one", f"model.context_parallel_size={cp_size}"), 64) for cp_size in (1, 2)
    )
    assert parts.held_tokens > 1.9 * whole.held_tokens > 0
    name = "student: activations of a step, held"
    assert parts.phases["train"][name] == pytest.approx(whole.phases["train"][name])


def test_selective_recomputation_leaves_out_the_feed_forward_networks_of_all_layers_but_one():
    name = "student: activations of a micro-batch"
    found = {
        modules: estimate(llama("model.recompute_activations=false", f"model.recompute_modules={modules}"), 8)
        for modules in ("[]", '["mlp"]', '["core_attn"]')
    }
    kept = {modules: one.phases["train"][name] for modules, one in found.items()}
    tokens = llama().training.max_tokens_per_micro_batch
    assert kept["[]"] - kept['["mlp"]'] == pytest.approx(31 * 3 * F / 4 * tokens * 2)
    assert kept["[]"] == kept['["core_attn"]']


def test_a_precision_aware_optimizer_holds_what_its_types_take():
    types = ("main_grads_dtype=bf16", "exp_avg_dtype=fp16", "exp_avg_sq_dtype=fp8")
    keys = [f"optimizer.{key}" for key in ("use_precision_aware_optimizer=true", *types)]
    plain, precise = estimate(llama(), 8).phases["update"], estimate(llama(*keys), 8).phases["update"]
    assert precise["student: gradients, bfloat16"] == plain["student: gradients, float32"] / 2
    assert precise["student: optimizer"] == pytest.approx(plain["student: optimizer"] / 12 * (2 + 2 + 1))


def test_seventy_billion_on_one_node_does_not_pass_unless_it_fits():
    with pytest.raises(ConfigError, match=r'got an estimate of 87.1 GiB in phase "generate"') as caught:
        dry()
    assert "SGLang on the trainer's GPUs (sglang.memory_fraction), " in str(caught.value)
    assert dry("training.offload=all").total_bytes < 80 * GIB
    with pytest.raises(ConfigError, match='in phase "update"'):
        dry("training.offload=optimizer", "sglang.release_memory=never")


def test_what_is_offloaded_is_counted_where_it_is_needed_and_on_the_host():
    plain, moved = estimate(llama(), 8), estimate(llama("training.offload=all"), 8)
    expected = {
        "teacher: weights": {"ask", "measure", "save"},
        "teacher: head on the student's ranks": {"score", "train", "measure", "save"},
        "student: gradients, float32": {"train", "update"},
        "student: optimizer": {"update"},
    }
    for name, phases in expected.items():
        assert {phase for phase, parts in moved.phases.items() if name in parts} == phases, name
        assert {phase for phase, parts in plain.phases.items() if name in parts} == set(plain.phases), name
    on_host = sum(plain.parts[name] for name in expected) - plain.parts["student: gradients, float32"]
    assert moved.host_bytes == on_host
    assert plain.host_bytes == 0
    assert f"host memory for training.offload: {on_host / GIB:.1f} GiB per GPU" in moved.lines()


def test_servers_that_keep_their_memory_count_in_every_phase():
    kept = estimate(llama("sglang.release_memory=never", "sglang.memory_fraction=0.3"), 64)
    assert [parts[SERVERS] for parts in kept.phases.values()] == pytest.approx([24 * GIB] * len(kept.phases))
    ahead = estimate(llama("rollout.ahead=1"), 64)
    assert {parts[SERVERS] for parts in ahead.phases.values()} == {40 * GIB}


def test_the_table_has_a_column_per_phase_and_the_sums():
    lines = estimate(llama("heldout.num_prompts=0"), 8).lines()
    columns = ["generate", "ask", "score", "train", "update", "sync", "save"]
    assert lines[0] == "GiB by phase; the most in generate"
    assert lines[1].split() == columns
    assert max(map(len, lines)) <= 80
    assert any(line.strip() == "(sglang.memory_fraction)" for line in lines)
    sums = lines[-3].split()
    assert sums[-1] == "all"
    assert float(sums[0]) == pytest.approx(87.1, abs=0.05)
    assert lines[-2].startswith("selection.passes: one pass fits for up to ")


APART = ("sglang.share_gpus=false", "sglang.gpus=[7]")
GIVEN = ("sglang.share_gpus=false", 'rollout.server_urls=["http://n7:1"]')


@pytest.mark.parametrize(
    "overrides,gpus,expected",
    [
        ([], range(8), True),
        ([], (), False),
        (["sglang.release_memory=never"], range(8), False),
        (["sglang.release_memory=always"], (), True),
        (["rollout.ahead=1"], range(8), False),
        (["sglang.router_url=http://n7:1"], range(8), False),
        (APART, range(8), False),
        (GIVEN, range(8), False),
        ([*GIVEN, "sglang.release_memory=always"], range(8), True),
        (["rollout.engine=embedded", "sglang.release_memory=always"], range(8), False),
    ],
)
def test_servers_give_back_memory_that_they_share(overrides: Sequence[str], gpus: Sequence[int], expected: bool):
    config = llama(*overrides)
    assert releases_memory(config, place(config, Hosts(4, 4, tuple(gpus)))) == expected


def counted(config: Config) -> dict[str, int]:
    """The bytes of this rank's tensors."""
    run = build_tiny_run(config, make_rollouts([3]))
    complete_optimizer_state(run.student)
    tensors = run.teacher.tensors()
    return {
        "student: weights": sum(parameter.nbytes for parameter in run.student.model.parameters()),
        "student: gradients, float32": sum(it.main_grad.nbytes for it in run.student.model.parameters()),  # type: ignore[attr-defined]
        "student: optimizer": sum(tensor.nbytes for tensor in run.student.optimizer_tensors() if tensor.dim()),
        "teacher: weights": sum(tensor.nbytes for tensor in tensors["teacher"]),
        "teacher: head on the student's ranks": sum(tensor.nbytes for tensor in tensors["head"]),
    }


@pytest.mark.parametrize(
    "layout,dtype,distributed",
    [
        (Layout(1), "bfloat16", False),
        (Layout(2, student=(2, 1)), "float32", False),
        (Layout(2, student=(1, 2)), "bfloat16", False),
        (Layout(2), "bfloat16", True),
        (Layout(2), "float32", True),
    ],
    ids=str,
)
def test_the_sums_are_those_of_the_tensors(tmp_path: Path, layout: Layout, dtype: str, distributed: bool):
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "teacher": {"dtype": dtype},
        "optimizer": {"distributed": distributed},
    }
    check_sums(make_config(make_models(tmp_path), layout, **sections), layout, tmp_path)


@pytest.mark.parametrize(
    "layout,experts,distributed",
    [
        (Layout(2), {"expert_model_parallel_size": 2}, True),
        (Layout(2), {}, True),
        (Layout(2, student=(2, 1), sequence_parallel=True), {"expert_tensor_parallel_size": 1}, False),
        (Layout(2, student=(1, 2)), {}, False),
        (Layout(2, cp=(2, 2)), {"expert_model_parallel_size": 2}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("shared_size", [0, 16])
def test_the_sums_of_experts_are_those_of_the_tensors(
    tmp_path: Path, layout: Layout, experts: dict[str, int], distributed: bool, shared_size: int
):
    make_experts(tmp_path / "student", seed=1, mlp_only_layers=[0], shared_size=shared_size)
    make_experts(tmp_path / "teacher", seed=2, tie_word_embeddings=False)
    optimizer = {"distributed": distributed}
    config = make_config(tmp_path, layout, model=experts, teacher=experts, optimizer=optimizer)
    check_sums(config, layout, tmp_path)


def check_sums(config: Config, layout: Layout, tmp_path: Path) -> None:
    ranks = run_workers(counted, layout.world_size, tmp_path, config, timeout_seconds=300.0)
    expected = estimate(config, layout.world_size).parts
    for name in ranks[0]:
        values = [rank[name] for rank in ranks]
        # Replicas share the optimizer's values, not always in equal parts.
        shared = config.optimizer.distributed and name == "student: optimizer"
        assert (sum(values) / len(values) if shared else max(values)) == expected[name], name


def own_bytes(config: Config) -> int:
    """The bytes that this rank holds for the teacher and not for the student."""
    run = build_tiny_run(config, make_rollouts([3]))
    held = [*run.teacher.model.parameters(), *getattr(run.teacher, "averages", {}).values()]  # type: ignore[attr-defined]
    students = {parameter.data_ptr() for parameter in run.student.model.parameters()}
    return sum({one.data_ptr(): one.nbytes for one in held if one.data_ptr() not in students}.values())


@pytest.mark.parametrize("update", ["live", "average"])
@pytest.mark.parametrize("layout,dtype", [(Layout(1), "float32"), (Layout(2, student=(2, 1)), "bfloat16")], ids=str)
def test_a_teacher_that_is_the_student_counts_what_it_adds(tmp_path: Path, layout: Layout, dtype: str, update: str):
    models = make_models(tmp_path)
    config = make_config(
        models,
        layout,
        model={"dtype": dtype},
        teacher={"kind": "self", "path": models / "student", "update": update, "dtype": dtype},
        prompts={"teacher_system_prompt": "hint", "max_teacher_prompt_tokens": 400},
    )
    found = estimate(config, layout.world_size)
    expected = run_workers(own_bytes, layout.world_size, tmp_path, config, timeout_seconds=300.0)
    assert max(expected) == found.parts.get("teacher: weights", 0.0)
    assert "teacher: head on the student's ranks" not in found.parts
    row = 48 * (4 if dtype == "float32" else 2)
    assert found.parts["teacher: hidden states of a step"] == 64 * row
    activations = found.phases["ask"]
    assert activations["teacher: a layer's activations"] / (400 + 64) == pytest.approx(
        found.phases["score"]["student: a layer's activations"] / (64 + 64)
    )
