"""Fingerprints by which a bank recognises models and tokenizers."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_tip.conversion.model_folder import ModelFolder

_BLOCK = 65_536
_WEIGHTS = ("*.safetensors", "weights/*", "shards/*")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a checksum of all tokens with their ids: equal for tokenizers whose ids mean the same."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return _digest(json.dumps(sorted(vocabulary.items()), ensure_ascii=False).encode())


def model_fingerprint(folder: Path, description: ModelFolder | None = None) -> str:
    """Returns a checksum of a model's weights, from the size and three blocks of each file, not from every byte.

    Args:
        folder: of the weights. description: the model as it is used, without its dropped layers.
    """
    parts = [json.dumps(description.config, sort_keys=True).encode()] if description else []
    for pattern in _WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            parts += [path.name.encode(), *_blocks(path)]
    return _digest(*parts)


def _blocks(path: Path) -> Iterator[bytes]:
    """Yields the file's size, its beginning (of safetensors: names and shapes), its middle and its end."""
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _BLOCK)):
            file.seek(start)
            yield file.read(_BLOCK)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
