"""The context bank: frozen on-policy prefixes of a student, on which any checkpoint can be scored.

    bank/manifest.json     format, models, tokenizer, sampling, seed, SHA-256 of the contexts
         contexts.parquet  one response per row, with its prompt; each of its positions is a context
         scores/NAME.parquet   written by `scores`: one row per position

TA-OPD section 3 and appendix C.
"""

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
from megatron_tip.files import new_folder, parse_json, write_json
from megatron_tip.records import Numbers, Rollout
from megatron_tip.rollout.codec import REQUIRED_COLUMNS, rollouts_from_table, rollouts_to_table

logger = logging.getLogger(__name__)

FORMAT = "megatron_tip context bank 1"
_MANIFEST, _CONTEXTS = "manifest.json", "contexts.parquet"
GENERATED = "generated"
"""The manifest's source of contexts that the configured student generated."""
_KEYS = {"sha256": str, "tokenizer": str, "vocab_size": int, "source": str, "num_contexts": int, "num_tokens": int}


@dataclass(frozen=True)
class ContextBank:
    """A context bank. `contexts`: responses with their prompts; scores are computed at every generated position.

    `manifest`: `tokenizer` and `vocab_size`, which models must share; `source`, "generated" or the path of the
    rollouts; `student`, `sampling` and `seed` that produced the contexts, null if unknown; `teacher` of the
    configuration that created the bank; `sha256` of the contexts, which identifies the bank in scores.
    """

    folder: Path
    contexts: Sequence[Rollout]
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        return self.manifest["sha256"]

    @property
    def writer(self) -> str | None:
        """Fingerprint of the student that wrote the contexts; None if unknown, as for a run's rollouts."""
        return self.manifest["student"]["fingerprint"] if self.manifest["source"] == GENERATED else None

    @cached_property
    def prompts(self) -> np.ndarray:
        """`[contexts]` int64 number of each context's prompt; the clusters of the bootstrap."""
        numbers: dict[Numbers[int], int] = {}
        return np.array([numbers.setdefault(context.prompt_ids, len(numbers)) for context in self.contexts])

    @cached_property
    def rows(self) -> np.ndarray:
        """`[tokens, 2]` int64 context and 0-based response position of every generated token, in order."""
        return np.concatenate(
            [
                np.stack([np.full(len(kept), place), kept], axis=1)
                for place, kept in enumerate(map(_generated, self.contexts))
            ]
        )

    def scores_path(self, name: str) -> Path:
        """Returns the file of the scores called `name`; raises InputError if it is not a valid file name."""
        check_scores_name(name)
        return self.folder / "scores" / f"{name}.parquet"


def check_scores_name(name: str) -> None:
    """Raises InputError if scores called `name` could lie outside the bank's scores/."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"--name: expected letters, digits, '_', '-' and '.', got {name!r}")


def write_bank(folder: Path, contexts: Sequence[Rollout], manifest: dict[str, Any]) -> ContextBank:
    """Writes a new bank atomically.

    Raises:
        InputError: no context has a token. OutputError: the folder exists or is not writable.
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
    """Returns the bank in `folder`.

    Raises:
        InputError: there is no bank, or its files are truncated, changed or of another format.
    """
    path = folder / _MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
        name = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the manifest of a context bank, cannot read it ({type(error).__name__}); create the "
            "bank with `megatron-tip diagnose bank`"
        ) from error
    if name != FORMAT:
        raise InputError(f"{path}: expected the format {FORMAT!r}, got {name!r}; create the bank with this version")
    if wrong := _wrong_parts(manifest):
        raise InputError(
            f"{path}: expected a manifest with {', '.join(_KEYS)}, got {', '.join(wrong)} missing or of another type; "
            "restore the file, or create the bank again"
        )
    table, _ = read_table(folder / _CONTEXTS, format_name=FORMAT, columns=REQUIRED_COLUMNS, sha256=manifest["sha256"])
    return ContextBank(folder, rollouts_from_table(table), manifest)


def _wrong_parts(manifest: dict[str, Any]) -> list[str]:
    """Returns the keys of a manifest whose values are missing or cannot be used."""
    wrong = [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("source") == GENERATED and not _has_fingerprint(manifest.get("student")):
        wrong.append("student")
    if manifest.get("teacher") and not _has_fingerprint(manifest["teacher"]):
        wrong.append("teacher")
    sampling = manifest.get("sampling")
    if sampling and not (isinstance(sampling, dict) and {"temperature", "top_p"} <= sampling.keys()):
        wrong.append("sampling")
    if sampling and "seed" not in manifest:
        wrong.append("seed")
    return wrong


def _has_fingerprint(model: Any) -> bool:
    return isinstance(model, dict) and isinstance(model.get("fingerprint"), str)


def check_bank(bank: ContextBank, *, tokenizer: str, vocab_size: int) -> None:
    """Refuses a bank whose token ids have another meaning for the models.

    Raises:
        ConfigError: the bank has another tokenizer, or ids that the models do not have.
    """
    if bank.manifest["tokenizer"] != tokenizer:
        raise ConfigError(
            f"diagnostics.bank: {bank.folder} was made with another tokenizer (fingerprint "
            f"{bank.manifest['tokenizer']:.12}, the models' is {tokenizer:.12}); its ids mean other texts; create "
            "a bank with these models"
        )
    largest = max(max(*context.prompt_ids, *context.response_ids) for context in bank.contexts)
    if largest >= vocab_size or bank.manifest["vocab_size"] != vocab_size:
        raise ConfigError(
            f"diagnostics.bank: {bank.folder} was made for {bank.manifest['vocab_size']} vocabulary entries shared by "
            f"student and teacher and holds ids up to {largest}, these models share {vocab_size}; create a bank "
            "with them"
        )


def strangers(bank: ContextBank, *, student: str, teacher: str) -> list[str]:
    """Returns caveats, one sentence each, about gains on a bank whose student or teacher may be others.

    Args:
        student, teacher: fingerprints of the start and of the teacher.
    """
    found = []
    if bank.writer is None:
        versions = bank.manifest.get("weight_versions")
        found.append(
            f"the contexts are rollouts of a run ({bank.manifest['source']}, weight versions {versions}): the start "
            "may not have written them, so gains may be off-policy"
        )
    elif bank.writer != student:
        found.append(
            f"the start (fingerprint {student:.12}) differs from the student that wrote the contexts "
            f"({bank.writer:.12}): gains are off-policy, unless it is the same student in another format"
        )
    made_for = (bank.manifest.get("teacher") or {}).get("fingerprint", teacher)
    if made_for != teacher:
        found.append(
            f"the teacher (fingerprint {teacher:.12}) differs from that of the configuration that created the bank "
            f"({made_for:.12})"
        )
    return found


def warn_of_strangers(bank: ContextBank, *, student: str, teacher: str) -> None:
    """Logs the caveats of `strangers`."""
    for sentence in strangers(bank, student=student, teacher=teacher):
        logger.warning("%s", sentence)


def _generated(context: Rollout) -> np.ndarray:
    """Returns the response positions that the student, not an environment, wrote."""
    kept = np.ones(len(context.response_ids), dtype=bool)
    for start, end in context.environment_spans:
        kept[start:end] = False
    return np.flatnonzero(kept)
