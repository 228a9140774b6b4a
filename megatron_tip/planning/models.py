"""The two models of a run, with weights or only by shape, and the tokenizer that they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tip.config import Config
from megatron_tip.conversion.known_models import KnownModel, KnownTokenizer, known_model
from megatron_tip.conversion.model_folder import ModelFolder, read_json
from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.errors import ConfigError, DroppedLayersError, WeightsError
from megatron_tip.machine import Machine
from megatron_tip.teachers.setup import teacher_limits

FoundModel = HfCheckpoint | ModelFolder | KnownModel
"""A model with its weights; for a run elsewhere also only its config.json or its published shape."""


def find_model(section: str, path: Path, machine: Machine, drop_layers: Sequence[int] = ()) -> FoundModel:
    """Returns the model in `path`, with its weights if the run starts here. Errors name the key in `section`.

    Raises:
        WeightsError: the directory is incomplete or not supported.
        ConfigError: there is no directory, and its name is not that of a known model.
    """
    try:
        if machine.is_elsewhere and not _is_described(path):
            known = known_model(path, owner=section, drop_layers=drop_layers)
            machine.note_absent(path, f"{path} is not on this machine; its shape: {known.source}")
            return known
        if machine.is_elsewhere and not any(path.glob("*.safetensors")):
            machine.note_absent(path, f"weights of {path} are not on this machine, only its config.json")
            return ModelFolder(path, drop_layers)
        return HfCheckpoint(path, drop_layers)
    except DroppedLayersError as error:
        raise WeightsError(f"{section}.{error}") from error
    except WeightsError as error:
        raise WeightsError(f"{section}.path: {error}") from error


def served_limits(config: Config, machine: Machine) -> tuple[int, int]:
    """Returns vocabulary and positions of a teacher behind servers, which needs no weights. Raises as `find_model`."""
    path = config.teacher.path
    if machine.is_elsewhere and not _is_described(path):
        return limits(find_model("teacher", path, machine))
    return teacher_limits(path)


def limits(model: FoundModel) -> tuple[int, int]:
    """Returns the model's vocabulary size and number of positions."""
    return model.architecture.vocab_size, model.architecture.max_position_embeddings


def shared_tokenizer(config: Config, machine: Machine, vocab_sizes: Sequence[int]) -> PreTrainedTokenizerBase | None:
    """Returns the student's tokenizer, which must map every token to the same id as the teacher's.

    Returns None if the run is elsewhere and a tokenizer is missing here; known models are still compared.

    Args:
        vocab_sizes: embedding rows of student and teacher.

    Raises:
        ConfigError: a tokenizer cannot be read, the two differ, or embeddings are smaller than the vocabulary.
    """
    paths = (config.model.path, config.teacher.path)
    if not machine.is_elsewhere or all(any(path.glob("tokenizer*")) for path in paths):
        student, teacher = (_tokenizer(path) for path in paths)
        _check_same(config, student, teacher)
        _check_vocabulary(max(student.get_vocab().values()), vocab_sizes)
        return student
    if any(_is_described(path) for path in paths):
        machine.notes.append("whether both models share one tokenizer")
        return None
    known = [known_model(path, owner=owner).tokenizer for owner, path in zip(("model", "teacher"), paths, strict=True)]
    _check_known(config, *known)
    _check_vocabulary(max(tokenizer.largest_id for tokenizer in known), vocab_sizes)
    return None


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that end a response: what transformers' generate stops at, and the tokenizer's own.

    Those of generation_config.json or, if it names none, of config.json.

    Raises:
        ConfigError: there are none, so that no response would ever end; or they are not token ids.
    """
    eos: Any = tokenizer.eos_token_id
    ids = _named_ends(folder) | ({eos} if isinstance(eos, int) else set())
    if not ids:
        raise ConfigError(
            f"{folder}: expected an end-of-sequence id in the tokenizer, generation_config.json or config.json, found "
            "none"
        )
    return tuple(sorted(ids))


def _end_ids(path: Path) -> set[int]:
    try:
        named = read_json(path).get("eos_token_id")
    except WeightsError as error:
        raise ConfigError(str(error)) from error
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"{path}: expected eos_token_id to be a token id or a list of them, got {named!r:.80}")
    return set(ids)


def ends_of_the_teacher_alone(config: Config, stop_token_ids: Sequence[int]) -> set[int]:
    """Returns the ids at which the teacher stops and the student does not: its rollouts then go on after them."""
    return _named_ends(config.teacher.path) - set(stop_token_ids)


def _named_ends(folder: Path) -> set[int]:
    """Returns the ids of generation_config.json or, if it names none, of config.json."""
    named = [_end_ids(path) for name in ("generation_config.json", "config.json") if (path := folder / name).exists()]
    return next((ids for ids in named if ids), set())


def _is_described(path: Path) -> bool:
    return (path / "config.json").exists()


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # Told outright, transformers does not ask on the terminal whether to run the folder's own code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower one for a damaged file
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder}: expected a tokenizer that needs no code of its own, got one with auto_map in "
                "tokenizer_config.json; code from model folders is never run: save the tokenizer in tokenizers' format"
            ) from error
        raise ConfigError(f"{folder}: expected a tokenizer that transformers can load, got: {error}") from error


def _check_same(config: Config, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    own, other = (_compared_tokens(tokenizer, config.teacher.special_tokens) for tokenizer in (student, teacher))
    if own != other:
        different = sorted(set(own.items()) ^ set(other.items()), key=lambda item: item[1])
        example, place = different[0]
        text, other_text = (_compared_tokens(tokenizer, "may_differ") for tokenizer in (student, teacher))
        if text == other_text:
            advice = 'only special tokens differ: teacher.special_tokens = "may_differ" allows that'
        else:
            advice = "distillation compares probabilities id by id, so both models must share one tokenizer"
        raise ConfigError(
            f"teacher.path: expected the student's tokenizer ({config.model.path}), got another one in "
            f"{config.teacher.path}: {len(different)} entries differ, for example {example!r} at id {place}; {advice}"
        )


def _compared_tokens(tokenizer: PreTrainedTokenizerBase, special_tokens: str) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if special_tokens == "same":
        return vocabulary
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return {token: place for token, place in vocabulary.items() if token not in added}


def _check_known(config: Config, student: KnownTokenizer, teacher: KnownTokenizer) -> None:
    same_text = student.text_vocabulary == teacher.text_vocabulary
    if student != teacher and not (same_text and config.teacher.special_tokens == "may_differ"):
        remedy = (
            'set teacher.special_tokens = "may_differ"' if same_text else "choose a teacher of the student's family"
        )
        raise ConfigError(
            f"teacher.path: expected the student's tokenizer ({student.name}), got that of {teacher.name}; {remedy}"
        )


def _check_vocabulary(largest: int, sizes: Sequence[int]) -> None:
    if largest >= min(sizes):
        raise ConfigError(
            f"vocabulary: expected embeddings of {largest + 1} rows or more in both models, because the tokenizer's "
            f"largest id is {largest}, got {sizes[0]} in the student and {sizes[1]} in the teacher; one of them does "
            "not belong to this tokenizer"
        )
