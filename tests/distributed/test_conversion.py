"""Models built from Hugging Face directories, sharded, against transformers; and the ways back.

One world of four ranks runs every layout, with data-parallel replicas where a layout needs fewer ranks.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_tip.conversion.bridge import export_hf, load_hf, load_output_head, local_parameters, save_hf
from megatron_tip.conversion.megatron_checkpoint import (
    MegatronCheckpoint,
    load_megatron_checkpoint,
    save_megatron_checkpoint,
)
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import OutputError, WeightsError
from megatron_tip.models.gpt import HiddenStatesModel, build_gpt, prepare_megatron
from megatron_tip.parallel.grid import ModelGrid
from megatron_tip.parallel.groups import ModelGroups, build_groups
from tests.helpers.distributed import run_workers
from tests.helpers.models import VARIANTS, hf_logits, megatron_logits, packed_forward, write_tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
INPUT_IDS = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(1))
VOCAB_SIZE, PADDED_VOCAB_SIZE = 101, 104


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(root / name, name) for name in VARIANTS}


def test_logits_and_export_of_every_layout(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    expected = {name: hf_logits(folder, INPUT_IDS) for name, folder in tiny_models.items()}
    run_workers(_check_every_layout, 4, tmp_path, tiny_models, expected, timeout_seconds=240)


def _check_every_layout(folders: dict[str, Path], expected: dict[str, Tensor]) -> None:
    prepare_megatron()
    for tp_size, pp_size in LAYOUTS:
        groups = _groups(tp_size, pp_size)
        for name, folder in folders.items() if groups.dp_rank == 0 else ():
            checkpoint = HfCheckpoint(folder)
            model = _build(checkpoint, groups, sequence_parallel=name.endswith("untied"))
            load_hf(model, checkpoint, groups)
            _check_logits(megatron_logits(model, groups, INPUT_IDS), expected[name], groups)
            _check_marks(model, checkpoint, groups)
            _check_export(model, checkpoint, groups)
            teacher = _build(checkpoint, groups, trainable=False)
            load_hf(teacher, checkpoint, groups)
            assert not any("output_layer" in key for key, _ in teacher.named_parameters())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            head = load_output_head(
                checkpoint,
                tp_rank=groups.tp_rank,
                tp_size=tp_size,
                padded_vocab_size=PADDED_VOCAB_SIZE,
                dtype=torch.float32,
            )
            _check_logits(megatron_logits(teacher, groups, INPUT_IDS, head), expected[name], groups)


def _check_logits(logits: Tensor | None, expected: Tensor, groups: ModelGroups) -> None:
    assert (logits is not None) == groups.is_last_stage
    if logits is not None:
        torch.testing.assert_close(logits[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-4)
        assert not logits[..., VOCAB_SIZE:].any(), "padding rows of the head are not zero"


def _check_marks(model: HiddenStatesModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    """What Megatron's gradient norm and sequence parallelism go by."""
    for name, parameter, weight in local_parameters(model, checkpoint.architecture, groups):
        assert getattr(parameter, "tensor_model_parallel", False) == (weight.partition_dim is not None), name
        if weight.partition_dim is not None:
            assert parameter.partition_dim == weight.partition_dim, name
        elif model.config.sequence_parallel:
            assert parameter.sequence_parallel, name


def _check_export(model: HiddenStatesModel, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    exported = {name: tensor.clone() for name, tensor in export_hf(model, checkpoint.architecture, groups)}
    everywhere = export_hf(model, checkpoint.architecture, groups, everywhere=True)
    on_this_rank = {name: tensor.clone() for name, tensor in everywhere}
    original = load_file(checkpoint.folder / "model.safetensors")
    assert exported.keys() == (original.keys() if groups.rank == 0 else set())
    assert on_this_rank.keys() == original.keys()
    for name, tensor in [*exported.items(), *on_this_rank.items()]:
        assert torch.equal(original[name], tensor), name


def test_checkpoints_and_folders(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    names = ("llama_tied_llama3_rope", "qwen2_untied", "qwen3_wide_heads")
    folders = {name: tiny_models[name] for name in names}
    for folder in folders.values():
        (folder / "tokenizer.json").write_text("{}")
    run_workers(_check_checkpoints_and_folders, 4, tmp_path, folders, tmp_path, timeout_seconds=240)
    for name, folder in folders.items():
        saved = tmp_path / name / "hf"
        original = load_file(folder / "model.safetensors")
        written = load_file(saved / "model.safetensors")
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], tensor) for key, tensor in original.items())
        assert (saved / "tokenizer.json").read_text() == "{}"
        torch.testing.assert_close(hf_logits(saved, INPUT_IDS), hf_logits(folder, INPUT_IDS), rtol=0, atol=0)
        assert {path.name for path in saved.parent.iterdir()} == {"hf", "megatron"}


def _check_checkpoints_and_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    prepare_megatron()
    layouts = {layout: _groups(*layout) for layout in LAYOUTS}
    for name, folder in folders.items():
        checkpoint = HfCheckpoint(folder)
        groups = layouts[2, 2]
        model = _build(checkpoint, groups)
        load_hf(model, checkpoint, groups)
        save_megatron_checkpoint(model, checkpoint, groups, tmp_path / name / "megatron")
        save_hf(model, checkpoint, groups, tmp_path / name / "hf")
        for groups in layouts.values():
            _check_resharded(MegatronCheckpoint(tmp_path / name / "megatron"), checkpoint, groups)
    _check_failures(model, checkpoint, layouts[2, 2], tmp_path)
    _check_broken_checkpoint(model, tmp_path / name / "megatron", layouts[2, 2])


def _check_resharded(saved: MegatronCheckpoint, checkpoint: HfCheckpoint, groups: ModelGroups) -> None:
    expected, loaded = (_build(checkpoint, groups, padded_vocab_size=112) for _ in range(2))
    load_hf(expected, checkpoint, groups)
    for parameter in loaded.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    load_megatron_checkpoint(loaded, saved, groups)
    for (name, want), got in zip(expected.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert loaded.config.num_layers == saved.architecture.num_layers


def _check_failures(model: HiddenStatesModel, checkpoint: HfCheckpoint, groups: ModelGroups, tmp_path: Path) -> None:
    """One rank alone meets the fault; every rank raises the same error, none hangs, and nothing is left."""
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below", tmp_path):
        for save in (save_hf, save_megatron_checkpoint):
            with pytest.raises(OutputError, match=str(target)):
                save(model, checkpoint, groups, target)
    target = tmp_path / "full"
    for save, full_rank in ((save_hf, 0), (save_megatron_checkpoint, 0), (save_megatron_checkpoint, 3)):
        with _little_space(groups.rank == full_rank), pytest.raises(OutputError, match=f"{target}: cannot be written"):
            save(model, checkpoint, groups, target)
        torch.distributed.barrier()
        leftovers = list(tmp_path.glob("*full*"))
        torch.distributed.barrier()
        assert leftovers == []


@contextmanager
def _little_space(applies: bool) -> Iterator[None]:
    """No file of this process may grow beyond 20 kB: the system refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if applies else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _check_broken_checkpoint(model: HiddenStatesModel, folder: Path, groups: ModelGroups) -> None:
    saved = MegatronCheckpoint(folder)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shard = next(saved.weights.glob("*.distcp"))
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
    torch.distributed.barrier()
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_megatron_checkpoint(model, saved, groups)


def test_gradients_are_those_of_transformers(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    names = ("llama_tied_llama3_rope", "qwen2_untied", "qwen3_wide_heads")
    folders = {name: tiny_models[name] for name in names}
    expected = {name: _hf_gradients(folder) for name, folder in folders.items()}
    run_workers(_check_gradients, 2, tmp_path, folders, expected, timeout_seconds=120)


def _hf_gradients(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = model.model(INPUT_IDS).last_hidden_state
    (hidden * _loss_weights(hidden.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _loss_weights(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _check_gradients(folders: dict[str, Path], expected: dict[str, dict[str, Tensor]]) -> None:
    prepare_megatron()
    groups = _groups(2, 1, world_size=2)
    for name, folder in folders.items():
        checkpoint = HfCheckpoint(folder)
        for sequence_parallel, recompute_activations in ((False, False), (True, False), (False, True)):
            model = _build(
                checkpoint,
                groups,
                sequence_parallel=sequence_parallel,
                recompute=("layer",) if recompute_activations else (),
            )
            load_hf(model, checkpoint, groups)
            attention_calls = []
            for layer in model.decoder.layers:
                attention = layer.self_attention.core_attention
                attention.register_forward_hook(lambda *_, calls=attention_calls: calls.append(None))
            _backward(model, groups)
            assert len(attention_calls) == len(model.decoder.layers) * (2 if recompute_activations else 1)
            for key, tensor in export_hf(model, checkpoint.architecture, groups):
                if key in expected[name]:
                    torch.testing.assert_close(tensor, expected[name][key], rtol=1e-3, atol=1e-3, msg=f"{name} {key}")


def _backward(model: HiddenStatesModel, groups: ModelGroups) -> None:
    """Puts the gradients, reduced by Megatron, in the place of the weights, so that they can be exported."""
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(), model, pg_collection=groups.collection
    )
    hidden = packed_forward(wrapped, INPUT_IDS)
    weights = _loss_weights((*INPUT_IDS.shape, hidden.shape[-1])).view(INPUT_IDS.numel(), 1, -1)
    if model.config.sequence_parallel:
        weights = weights.chunk(groups.grid.tp_size)[groups.tp_rank]
    (hidden * weights).sum().backward()
    finalize_model_grads([wrapped], pg_collection=groups.collection)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)


def _groups(tp_size: int, pp_size: int, world_size: int = 4) -> ModelGroups:
    return build_groups(ModelGrid.over(world_size, tp_size=tp_size, pp_size=pp_size, owner="student"))


def _build(checkpoint: HfCheckpoint, groups: ModelGroups, **options: Any) -> HiddenStatesModel:
    arguments = {"padded_vocab_size": PADDED_VOCAB_SIZE, "dtype": torch.float32, **options}
    return build_gpt(checkpoint.architecture, groups, **arguments)
