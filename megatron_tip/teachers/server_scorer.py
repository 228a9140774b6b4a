"""The client side of teachers behind SGLang servers: requests for log-probabilities of rollouts. No collectives."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_tip.errors import EngineError, ServerAnswerError, ServerError, ServerMismatchError, ServerRefusedError
from megatron_tip.records import Rollout, TeacherTopK
from megatron_tip.rollout.sglang.answers import LogprobTriple, MetaInfo, checked_logprobs
from megatron_tip.rollout.sglang.client import SGLangClient

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 30.0

# Extra ids to request beyond K if a server's vocabulary is larger than the shared one, as its padding ids are dropped.
_SPARE_IDS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringSettings:
    """Settings for scoring rollouts.

    `vocab_size`: ids that student and teacher share. `support_size`: K. `window_tokens`: response tokens per request
    about the student's top-K; a server takes one list of ids per request, so the answer grows with its square.
    `max_concurrent`: requests in flight. `wait_seconds`: how long to retry while no server answers.
    """

    vocab_size: int
    support_size: int
    window_tokens: int = 16
    max_concurrent: int = 32
    wait_seconds: float = 0.0


class ServerTeacher:
    """One or several teachers, each behind one or several servers that hold the same weights.

    Requests rotate over a teacher's servers; if one fails, the next is tried. SGLang always returns input
    log-probabilities at temperature 1, so a run with such a teacher must use that temperature.

    Args:
        routes: the servers of each teacher, by the teacher's name. A single teacher has the name "".
    """

    def __init__(self, routes: Mapping[str, Sequence[SGLangClient]], settings: ScoringSettings) -> None:
        self._routes = routes
        self._settings = settings
        self._num_asked = dict.fromkeys(routes, settings.support_size)

    def close(self) -> None:
        """Closes all connections."""
        for clients in self._routes.values():
            for client in clients:
                client.close()

    def check(self, *, asks_student_support: bool) -> None:
        """Checks that every server scores the shared vocabulary and, if needed, returns logprobs of given ids.

        Raises:
            ServerMismatchError: not an SGLang server, a vocabulary that is too small, or a missing feature.
            ServerError: a server does not answer.
        """
        for name, clients in self._routes.items():
            spare = [self._check_server(client, asks_student_support) for client in clients]
            self._num_asked[name] += _SPARE_IDS * any(spare)

    def _check_server(self, client: SGLangClient, asks_student_support: bool) -> bool:
        """Checks one server and returns whether its vocabulary is larger than the shared one."""
        vocab_size = self._settings.vocab_size
        body = _scoring_body([0, 0], 0) | {"top_logprobs_num": 1, "token_ids_logprob": [vocab_size - 1]}
        try:
            meta = client.generate_answers(body)[0].meta_info
            _tops(meta, 1, 1, vocab_size=2**31, where=client.url)
            if asks_student_support:
                _table(meta, 1, [vocab_size - 1], where=client.url)
        except (ServerAnswerError, ServerRefusedError) as error:
            if "vocab" in str(error):
                expected = f"a teacher of at least the student's {vocab_size} vocabulary entries"
            else:
                expected = "an SGLang server that gives input_top_logprobs"
                expected += " and input_token_ids_logprobs" if asks_student_support else ""
            remedy = 'or set teacher.student_support = "skip"' if asks_student_support else "see teacher.urls"
            raise ServerMismatchError(f"{client.url}: expected {expected}, got: {error}; {remedy}") from error
        try:
            client.generate_answers(body | {"token_ids_logprob": [vocab_size]})
        except ServerRefusedError:
            return False
        return True

    def top_k(self, rollouts: Sequence[Rollout], teachers: Sequence[str]) -> TeacherTopK:
        """Returns the teachers' log-probabilities for the generated tokens of `rollouts`, in order.

        Args:
            teachers: the name of each rollout's teacher.

        Raises:
            EngineError: no server of a teacher gave a usable answer.
        """
        jobs = [
            (place, rollout, name)
            for place, (rollout, name) in enumerate(zip(rollouts, teachers, strict=True))
            if rollout.num_generated
        ]
        parts = self._in_parallel(lambda job: self._top_k_of(*job), jobs)
        k = self._settings.support_size
        empty = (torch.empty(0), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
        return TeacherTopK(*(torch.cat(columns) for columns in zip(empty, *parts, strict=True)))

    def student_support(
        self, rollouts: Sequence[Rollout], teachers: Sequence[str], student_support_ids: Tensor
    ) -> Tensor:
        """Returns the teachers' logprobs of `student_support_ids` `[n, K]`: `[n, K]` float32, rows in `top_k`'s order.

        Raises:
            EngineError: as in `top_k`.
        """
        rows = student_support_ids.cpu().split([rollout.num_generated for rollout in rollouts])
        jobs = [
            (place, rollout, name, positions, ids)
            for place, (rollout, name, own) in enumerate(zip(rollouts, teachers, rows, strict=True))
            for positions, ids in self._windows(rollout, own)
        ]
        parts = self._in_parallel(lambda job: self._window_logprobs(*job), jobs)
        return torch.cat([torch.empty(0, student_support_ids.shape[1]), *parts])

    def _in_parallel(self, function: Callable[[Any], T], jobs: Sequence[Any]) -> list[T]:
        with ThreadPoolExecutor(max(1, min(self._settings.max_concurrent, len(jobs)))) as pool:
            return list(pool.map(function, jobs))

    def _windows(self, rollout: Rollout, ids: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Yields the generated positions of the response that share a request, and their `[w, K]` ids."""
        places = generated_positions(rollout)
        first = 0
        while first < len(places):
            end = first
            while end < len(places) and places[end] < places[first] + self._settings.window_tokens:
                end += 1
            yield places[first:end], ids[first:end]
            first = end

    def _top_k_of(self, place: int, rollout: Rollout, teacher: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the generated tokens' `[g]` logprobs, and `[g, K]` ids and logprobs of the teacher's top-K."""
        settings, length = self._settings, len(rollout.response_ids)
        asked = self._num_asked[teacher]
        body = _scoring_body([*rollout.prompt_ids, *rollout.response_ids], len(rollout.prompt_ids) - 1)

        def read(meta: MetaInfo, where: str) -> tuple[Tensor, Tensor, Tensor]:
            triples = (meta.input_token_logprobs or [])[1:]  # the first entry is of the last prompt token
            named = _as_named(rollout.response_ids, settings.vocab_size, triples)
            labels = torch.tensor(checked_logprobs(triples, named, where=where))
            ids, logprobs = _tops(meta, length, settings.support_size, vocab_size=settings.vocab_size, where=where)
            places = generated_positions(rollout)
            return labels[places], ids[places], logprobs[places]

        return self._ask(teacher, body | {"top_logprobs_num": asked}, place, read)

    def _window_logprobs(
        self, place: int, rollout: Rollout, teacher: str, positions: Sequence[int], ids: Tensor
    ) -> Tensor:
        """Returns `[w, K]` logprobs of `[w, K]` ids at `positions` of the response."""
        first, end = positions[0], positions[-1] + 1
        union = ids.unique()  # sorted
        prompt_length = len(rollout.prompt_ids)
        body = _scoring_body([*rollout.prompt_ids, *rollout.response_ids[:end]], prompt_length + first - 1)
        wanted = union.tolist()

        def read(meta: MetaInfo, where: str) -> Tensor:
            table = _table(meta, end - first, wanted, where=where)
            return table[[position - first for position in positions]].gather(1, torch.searchsorted(union, ids))

        return self._ask(teacher, body | {"token_ids_logprob": wanted}, place, read)

    def _ask(self, teacher: str, body: Mapping[str, Any], place: int, read: Callable[[MetaInfo, str], T]) -> T:
        """Returns what `read` makes of the first usable answer.

        Retries while no server answers, up to `wait_seconds`; an unusable answer ends the retries.
        """
        clients, name = self._routes[teacher], f"teacher {teacher!r}" if teacher else "teacher"
        deadline, pause = time.monotonic() + self._settings.wait_seconds, 1.0
        while True:
            failures: list[ServerError] = []
            for attempt in range(len(clients)):
                client = clients[(place + attempt) % len(clients)]
                try:
                    return read(client.generate_answers(body)[0].meta_info, f"{client.url}/generate")
                except ServerError as error:
                    failures.append(error)
            is_final = any(isinstance(failure, ServerRefusedError | ServerAnswerError) for failure in failures)
            if is_final or time.monotonic() + pause > deadline:
                raise EngineError(
                    f"{name}: none of its {len(clients)} servers scored a rollout; the last error: {failures[-1]}"
                )
            logger.warning("%s: no server answers (%s); retrying in %.0f s", name, failures[-1], pause)
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)


def generated_positions(rollout: Rollout) -> list[int]:
    """Returns the positions of the response that the student generated."""
    given = {position for start, end in rollout.environment_spans for position in range(start, end)}
    return [position for position in range(len(rollout.response_ids)) if position not in given]


def _as_named(ids: Sequence[int], vocab_size: int, triples: Sequence[LogprobTriple]) -> list[int]:
    """Returns `ids` as SGLang reports them in input_token_logprobs.

    There, the last id of the vocabulary appears as 0, with its own logprob
    (scheduler_components/logprob_result_processor.py of 0.5.23).
    """
    got = [triple[1] for triple in triples] if len(triples) == len(ids) else ids
    return [0 if token == vocab_size - 1 and name == 0 else token for token, name in zip(ids, got, strict=True)]


def _scoring_body(input_ids: Sequence[int], logprob_start: int) -> dict[str, Any]:
    """Returns the body of a request that only scores: logprobs of `input_ids` after index `logprob_start`."""
    return {
        "input_ids": list(input_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": logprob_start,
    }


def _tops(meta: MetaInfo, length: int, k: int, *, vocab_size: int, where: str) -> tuple[Tensor, Tensor]:
    """Returns `[length, k]` ids and logprobs of the server's top-K, descending, without ids of `vocab_size` or above.

    Raises:
        ServerAnswerError: a wrong number of positions, too few ids, a repeated id or an invalid logprob.
    """
    rows = _positions(meta.input_top_logprobs, length, "input_top_logprobs", where)
    kept = [[triple for triple in row if triple[1] < vocab_size][:k] for row in rows]
    for place, row in enumerate(kept):
        ids = [triple[1] for triple in row]
        if len(set(ids)) != k or min(ids) < 0:
            raise ServerAnswerError(
                f"{where}: expected {k} different ids in [0, {vocab_size}) at position {place} of input_top_logprobs, "
                f"got {ids}"
            )
    return torch.tensor([[triple[1] for triple in row] for row in kept]).reshape(length, k), _values(kept, where)


def _table(meta: MetaInfo, length: int, ids: Sequence[int], *, where: str) -> Tensor:
    """Returns `[length, len(ids)]` logprobs of the requested `ids`."""
    rows = _positions(meta.input_token_ids_logprobs, length, "input_token_ids_logprobs", where)
    return torch.tensor([checked_logprobs(row, ids, where=where) for row in rows])


def _positions(
    values: Sequence[list[LogprobTriple] | None] | None, length: int, name: str, where: str
) -> list[list[LogprobTriple]]:
    """Returns the entries of `length` positions, without the first, whose token has no prediction."""
    rows = [row for row in (values or [])[1:] if row is not None]
    if len(rows) != length:
        raise ServerAnswerError(f"{where}: expected {name} of {length} tokens, got {len(rows)}")
    return rows


def _values(rows: Sequence[Sequence[LogprobTriple]], where: str) -> Tensor:
    values = [[triple[0] for triple in row] for row in rows]
    if any(value is None or not math.isfinite(value) or value > 1e-3 for row in values for value in row):
        raise ServerAnswerError(f"{where}: expected finite logprobs <= 0 in input_top_logprobs, got something else")
    return torch.tensor(values, dtype=torch.float32)
