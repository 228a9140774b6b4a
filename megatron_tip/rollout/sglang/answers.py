"""SGLang's answers, typed and checked: nothing from the network is used before it has passed through here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_tip.errors import ServerAnswerError


class Answer(BaseModel):
    """Base of all answers: known fields with their types; fields that a newer server adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ModelInfo(Answer):
    """The answer to GET /model_info."""

    model_path: str
    is_generation: bool
    weight_version: str
    model_type: str | None = None
    architectures: list[str] | None = None


class ServerInfo(Answer):
    """The answer to GET /server_info: the server's layout and how it keeps its weights."""

    version: str
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    quantization: str | None = None
    device: str | None = None
    enable_memory_saver: bool = False


class Outcome(Answer):
    """The answer to a POST to any weight endpoint."""

    success: bool
    message: str = ""


class RankChecksums(Answer):
    """One rank's part of the answer to POST /weights_checker: the checksum of each tensor by name."""

    checksums: dict[str, str]


class WeightChecksums(Outcome):
    """The answer to POST /weights_checker."""

    ranks: list[RankChecksums] = []


class FinishReason(Answer):
    """The reason why a response ended: "stop", "length" or "abort"; `message` explains an abort."""

    type: str
    message: str | None = None


LogprobTriple = tuple[float | None, int, str | None]
"""Natural log probability (null if the server has none, or NaN), token id, text (null)."""


class MetaInfo(Answer):
    """The `meta_info` of /generate. Input logprobs are at temperature 1, whatever the request's temperature."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    weight_version: str
    finish_reason: FinishReason | None = None
    output_token_logprobs: list[LogprobTriple] | None = None
    input_token_logprobs: list[LogprobTriple] | None = None
    input_top_logprobs: list[list[LogprobTriple] | None] | None = None
    input_token_ids_logprobs: list[list[LogprobTriple] | None] | None = None


class GenerateAnswer(Answer):
    """The answer to POST /generate: a complete one, or one chunk of a stream."""

    output_ids: list[int]
    meta_info: MetaInfo


@dataclass(frozen=True)
class Generation:
    """One checked response.

    `logprobs`: natural log of the probability of each response id at the request's temperature. `finish_reason`:
    "stop", "length" or "abort" (`abort_message` says why). `weight_version`: the server's when it ended.
    """

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: str
    abort_message: str = ""


A = TypeVar("A", bound=Answer)


def parse(kind: type[A], content: bytes | str, where: str) -> A:
    """Returns the answer in `content`.

    Raises:
        ServerAnswerError: the content is not JSON of the expected shape; names the first wrong field.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the answer"
        raise ServerAnswerError(
            f"{where}: expected {kind.__name__} as SGLang answers it, got {_shown(content)} ({field}: {first['msg']})"
        ) from None


def checked_generation(
    ids: Sequence[int],
    triples: Sequence[LogprobTriple],
    last: MetaInfo,
    *,
    vocab_size: int,
    max_new_tokens: int,
    where: str,
) -> Generation:
    """Returns the response of `ids` and their logprobs, after checking that they are what was requested.

    Raises:
        ServerAnswerError: ids are missing, extra or out of the vocabulary; logprobs are of other ids, NaN or positive;
            or the response has no end.
    """
    reason = last.finish_reason
    if reason is None:
        raise ServerAnswerError(f"{where}: expected a response to its end, got {len(ids)} ids and no finish_reason")
    if len(ids) != last.completion_tokens or len(ids) > max_new_tokens:
        raise ServerAnswerError(
            f"{where}: expected {last.completion_tokens} response ids, at most {max_new_tokens}, got {len(ids)}"
        )
    if len(triples) != len(ids):
        raise ServerAnswerError(f"{where}: expected one logprob per response id, got {len(triples)} for {len(ids)} ids")
    for place, (token, (logprob, owner, _)) in enumerate(zip(ids, triples, strict=True)):
        if not 0 <= token < vocab_size:
            raise ServerAnswerError(f"{where}: expected ids below {vocab_size}, got {token} at place {place}")
        if owner != token:
            raise ServerAnswerError(f"{where}: expected a logprob of id {token} at place {place}, got one of {owner}")
        if logprob is None or not math.isfinite(logprob) or logprob > 1e-3:  # rounding can give slightly more than 0
            raise ServerAnswerError(f"{where}: expected a finite logprob <= 0 at place {place}, got {logprob}")
    return Generation(
        response_ids=tuple(ids),
        logprobs=tuple(float(triple[0] or 0.0) for triple in triples),
        finish_reason=reason.type,
        weight_version=last.weight_version,
        abort_message=reason.message or "",
    )


def checked_logprobs(triples: Sequence[LogprobTriple] | None, ids: Sequence[int], *, where: str) -> list[float]:
    """Returns the logprobs of `ids`, in order, from the server's triples.

    Raises:
        ServerAnswerError: the triples are of other ids, more or fewer, or not finite.
    """
    got = list(triples or ())
    if [triple[1] for triple in got] != list(ids):
        raise ServerAnswerError(
            f"{where}: expected the logprobs of {len(ids)} ids, got those of {len(got)}: {_shown(str(got))}"
        )
    values = [triple[0] for triple in got]
    if any(value is None or not math.isfinite(value) for value in values):
        raise ServerAnswerError(f"{where}: expected finite logprobs, got {_shown(str(values))}")
    return [float(value or 0.0) for value in values]


def _shown(content: Any, limit: int = 120) -> str:
    text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
