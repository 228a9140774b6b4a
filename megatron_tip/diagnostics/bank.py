"""The context bank: frozen on-policy prefixes of a student, on which any checkpoint can be scored again.

    bank/manifest.json     format, models, tokenizer, sampling, seed, SHA-256 of the contexts
         contexts.parquet  one response a row, with its prompt; every position of it is a context
         scores/NAME.parquet   what `scores` wrote: one row a position

TA-OPD section 3 and appendix C.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tip.diagnostics.parquet import read_table, write_table
from megatron_tip.errors import ConfigError, InputError
from megatron_tip.files import new_folder, write_json
from megatron_tip.records import Rollout
from megatron_tip.rollout.codec import SCHEMA, rollouts_from_table, rollouts_to_table

logger = logging.getLogger(__name__)

FORMAT = "megatron_tip context bank 1"
_MANIFEST, _CONTEXTS = "manifest.json", "contexts.parquet"
GENERATED = "generated"
"""As the source: of answers of the configuration's student."""
_KEYS = {"sha256": str, "tokenizer": str, "vocab_size": int, "source": str, "num_contexts": int, "num_tokens": int}


@dataclass(frozen=True)
class ContextBank:
    """`contexts`: responses with their prompts; every generated position of one is scored for the token there.

    `manifest`: `tokenizer` and `vocab_size`, which a model must share; `source`, "generated" or where the rollouts lay;
    `student`, `sampling` and `seed` that the contexts came from, null where that is not known; `teacher` of the
    configuration that made the bank; `sha256` of the contexts, by which scores know their bank.
    """

    folder: Path
    contexts: Sequence[Rollout]
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        return self.manifest["sha256"]

    @property
    def writer(self) -> str | None:
        """Fingerprint of the student that wrote the contexts; None where nobody knows: they were rollouts of a run."""
        return self.manifest["student"]["fingerprint"] if self.manifest["source"] == GENERATED else None

    @cached_property
    def prompts(self) -> np.ndarray:
        """`[contexts]` int64: contexts of the same prompt have the same number; the clusters of the bootstrap."""
        numbers: dict[tuple[int, ...], int] = {}
        return np.array([numbers.setdefault(context.prompt_ids, len(numbers)) for context in self.contexts])

    @cached_property
    def rows(self) -> np.ndarray:
        """`[tokens, 2]` int64: context and 0-based response position of every generated token, in order."""
        return np.concatenate(
            [
                np.stack([np.full(len(kept), place), kept], axis=1)
                for place, kept in enumerate(map(_generated, self.contexts))
            ]
        )

    def scores_path(self, name: str) -> Path:
        """Raises InputError for a name that is not one of a file."""
        check_scores_name(name)
        return self.folder / "scores" / f"{name}.parquet"


def check_scores_name(name: str) -> None:
    """Raises InputError unless scores of the name stay within the bank's scores/."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name: expected letters, digits, '_', '-' and '.', got {name!r}")


def write_bank(folder: Path, contexts: Sequence[Rollout], manifest: dict[str, Any]) -> ContextBank:
    """Writes a new bank, whole or not at all.

    Raises:
        InputError: there is no context with a token. OutputError: the folder exists or cannot be written.
    """
    contexts = [context for context in contexts if context.num_generated]
    if not contexts:
        raise InputError(f"{folder}: expected responses with at least one token, got none; a bank needs contexts")
    table = rollouts_to_table(contexts)
    with new_folder(folder) as partial:
        sha256 = write_table(partial / _CONTEXTS, table, {"format": FORMAT}, setting="diagnostics.bank")
        manifest = {"format": FORMAT, **manifest, "sha256": sha256}
        manifest |= {"num_contexts": len(contexts), "num_tokens": sum(context.num_generated for context in contexts)}
        write_json(partial / _MANIFEST, manifest)
    return ContextBank(folder, contexts, manifest)


def read_bank(folder: Path) -> ContextBank:
    """The bank in `folder`.

    Raises:
        InputError: there is none, or its files are truncated, changed or of another format.
    """
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        name = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the manifest of a context bank, cannot read it ({type(error).__name__}); make the bank "
            "with `megatron-tip diagnose bank`"
        ) from error
    if name != FORMAT:
        raise InputError(f"{path}: expected the format {FORMAT!r}, got {name!r}; make the bank with this version")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("source") == GENERATED and not isinstance(manifest.get("student"), dict):
        wrong.append("student")
    if wrong:
        raise InputError(
            f"{path}: expected a manifest with {', '.join(_KEYS)}, got {', '.join(wrong)} missing or of another type; "
            "bring the file back as it was, or make the bank again"
        )
    table, _ = read_table(folder / _CONTEXTS, format_name=FORMAT, columns=SCHEMA.names, sha256=manifest["sha256"])
    return ContextBank(folder, rollouts_from_table(table), manifest)


def check_bank(bank: ContextBank, *, tokenizer: str, vocab_size: int) -> None:
    """Refuses a bank whose token ids mean something else to the models.

    Raises:
        ConfigError: another tokenizer, or ids that the models do not have.
    """
    if bank.manifest["tokenizer"] != tokenizer:
        raise ConfigError(
            f"diagnostics.bank: {bank.folder} was made with another tokenizer (fingerprint "
            f"{bank.manifest['tokenizer']:.12}, the models' is {tokenizer:.12}); its ids mean other texts: make a bank "
            "with these models"
        )
    largest = max(max(context.prompt_ids + context.response_ids) for context in bank.contexts)
    if largest >= vocab_size or bank.manifest["vocab_size"] != vocab_size:
        raise ConfigError(
            f"diagnostics.bank: {bank.folder} was made for {bank.manifest['vocab_size']} vocabulary entries shared by "
            f"student and teacher and holds ids up to {largest}, these models share {vocab_size}; make a bank with them"
        )


def strangers(bank: ContextBank, *, student: str, teacher: str) -> list[str]:
    """What is to be said of gains on a bank from a start: a sentence each; none where start and teacher are the bank's.

    Args:
        student, teacher: fingerprints of the start and of the teacher.
    """
    found = []
    if bank.writer is None:
        versions = bank.manifest.get("weight_versions")
        found.append(
            f"the contexts are rollouts of a run ({bank.manifest['source']}, weight versions {versions}): the start is "
            "not known to have written them, gains may be off-policy"
        )
    elif bank.writer != student:
        found.append(
            f"the start (fingerprint {student:.12}) is not known as the student that wrote the contexts "
            f"({bank.writer:.12}): gains are off-policy, unless it is the same one in another format"
        )
    made_for = (bank.manifest.get("teacher") or {}).get("fingerprint", teacher)
    if made_for != teacher:
        found.append(
            f"the teacher (fingerprint {teacher:.12}) is another one than that of the configuration that made the bank "
            f"({made_for:.12})"
        )
    return found


def warn_of_strangers(bank: ContextBank, *, student: str, teacher: str) -> None:
    """Logs what `strangers` finds."""
    for sentence in strangers(bank, student=student, teacher=teacher):
        logger.warning("%s", sentence)


def _generated(context: Rollout) -> np.ndarray:
    """The response positions that the student wrote, not an environment."""
    kept = np.ones(len(context.response_ids), dtype=bool)
    for start, end in context.environment_spans:
        kept[start:end] = False
    return np.flatnonzero(kept)
