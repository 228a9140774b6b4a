"""A client of one SGLang server over HTTP: checks, generation, scoring and weight endpoints."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_tip.errors import (
    EngineError,
    InputError,
    ServerAnswerError,
    ServerError,
    ServerMismatchError,
    ServerRefusedError,
)
from megatron_tip.rollout.sglang.answers import (
    Answer,
    GenerateAnswer,
    Generation,
    LogprobTriple,
    MetaInfo,
    ModelInfo,
    Outcome,
    ServerInfo,
    WeightChecksums,
    checked_generation,
    parse,
)
from megatron_tip.rollout.sglang.keys import ServerKeys

STREAM_INTERVAL = 64
"""Tokens per chunk of a streamed response: often enough to tell a slow server from a silent one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Timeouts:
    """Time limits of a call, in seconds.

    `connect`: until a connection is established. `silence`: between two signs of life of a generating server, or until
    an answer arrives. `control`: until a weight or control endpoint answers. `retries`: further attempts after a
    transient failure (no connection, HTTP 429, 502, 503, 504), with exponential back-off up to `back_off` seconds.
    """

    connect: float = 5.0
    silence: float = 60.0
    control: float = 300.0
    retries: int = 2
    back_off: float = 4.0


class _TransientError(ServerError):
    """A failure that is worth another attempt at the same server."""


class SGLangClient:
    """A client of the server at `url`, safe to use from many threads. A context manager; `close` ends its connections.

    Args:
        url: "http://host:port".
        vocab_size: size of the model's output; larger ids are refused.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        keys: ServerKeys | None = None,
        timeouts: Timeouts | None = None,
        max_connections: int = 512,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.timeouts = timeouts or Timeouts()
        self._keys = keys or ServerKeys()
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(self.timeouts.silence, connect=self.timeouts.connect),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=False,  # the environment's proxy is not for the cluster's servers, and would see the keys
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"SGLangClient({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections; a call in flight fails with ServerError."""
        self._http.close()

    # -- checks

    def check_health(self, *, timeout_seconds: float) -> None:
        """Returns when the server has generated a token; raises ServerError if it has not done so in time.

        Takes at least a second, and a concurrent weight sync waits for it: use it only when a server starts.
        """
        self._request("GET", "/health", timeout_seconds=timeout_seconds, retries=0)

    def check_alive(self, *, timeout_seconds: float) -> None:
        """Returns when the server's scheduler has answered, generating or not; raises ServerError if it does not."""
        self._request("GET", "/server_info", timeout_seconds=timeout_seconds, retries=0)

    def model_info(self) -> ModelInfo:
        """Returns the model that the server holds and its weight version."""
        return self._get(ModelInfo, "/model_info")

    def server_info(self) -> ServerInfo:
        """Returns the server's version and layout."""
        return self._get(ServerInfo, "/server_info")

    def check_model(self, *, model_type: str) -> None:
        """Returns when the server is SGLang with a generating `model_type` of exactly `vocab_size` entries.

        Raises:
            ServerMismatchError: it is something else; waiting does not help.
            ServerError: it does not answer.
        """
        try:
            info = self.model_info()
        except (ServerAnswerError, ServerRefusedError) as error:
            raise ServerMismatchError(f"{self.url}: expected an SGLang server; {error}") from error
        if not info.is_generation or info.model_type != model_type:
            kind = info.model_type if info.is_generation else f"{info.model_type} that does not generate"
            raise ServerMismatchError(
                f"{self.url}: expected a {model_type} model that generates, got a {kind} ({info.model_path}); start "
                "the server with the student's own directory"
            )
        if not self._takes_id(self.vocab_size - 1) or self._takes_id(self.vocab_size):
            raise ServerMismatchError(
                f"{self.url}: expected a vocabulary of exactly {self.vocab_size} entries, got a model with more or "
                f"fewer ({info.model_path}); start the server with the student's own directory"
            )

    def _takes_id(self, token: int) -> bool:
        """Returns whether `token` is in the server's vocabulary: the server refuses others' logprobs with HTTP 400."""
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "token_ids_logprob": [token],
        }
        try:
            self._request("POST", "/generate", body)
        except ServerRefusedError as error:
            if "vocab" not in str(error):
                raise ServerMismatchError(f"{self.url}: expected an SGLang server; {error}") from error
            return False
        return True

    # -- generation

    def generate(
        self,
        input_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
        request_id: str | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Generation:
        """Returns one sampled response to `input_ids`, streamed; `on_tokens` receives the number of ids so far.

        `seed` determines all draws if the server accepts one: ours on a CPU do, others in SGLang's deterministic mode.

        A broken request is not repeated, so that the caller can choose another server. An aborted response returns with
        the ids so far and finish_reason "abort".

        Raises:
            ServerRefusedError: the request is at fault. ServerAnswerError: ids or logprobs are not as requested.
            ServerError: no connection, HTTP 5xx, silence, or a truncated answer.
        """
        self._check_ids(input_ids)
        sampling_params = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(stop_token_ids),
            "stream_interval": STREAM_INTERVAL,
            "sampling_seed": seed,
        }
        body = {"input_ids": list(input_ids), "sampling_params": sampling_params, "return_logprob": True}
        body |= {"stream": True} if request_id is None else {"stream": True, "rid": request_id}
        return self._read_generation(body, max_new_tokens, on_tokens)

    def _read_generation(
        self, body: Mapping[str, Any], max_new_tokens: int, on_tokens: Callable[[int], None] | None
    ) -> Generation:
        """Sends a streaming request and joins the chunks."""
        where = f"{self.url}/generate"
        ids: list[int] = []
        triples: list[LogprobTriple] = []
        last: MetaInfo | None = None
        for answer in self._stream(body, where):
            last = answer.meta_info
            _append(ids, triples, answer, where)
            if on_tokens is not None:
                on_tokens(len(ids))
        if last is None:
            raise ServerAnswerError(f"{where}: expected a response, got an empty stream")
        return checked_generation(
            ids, triples, last, vocab_size=self.vocab_size, max_new_tokens=max_new_tokens, where=where
        )

    def generate_answers(self, body: Mapping[str, Any]) -> list[GenerateAnswer]:
        """Returns the typed answers to a /generate request of any form that does not stream, one per input.

        Their ids and logprobs are typed, but not yet compared with the request: see `checked_logprobs`.
        """
        inputs: list[Any] = body["input_ids"]
        batch = bool(inputs) and not isinstance(inputs[0], int)
        for input_ids in inputs if batch else [inputs]:
            self._check_ids(input_ids)
        content = self._request("POST", "/generate", body)
        where = f"{self.url}/generate"
        if not batch:
            return [parse(GenerateAnswer, content, where)]
        try:
            parts = json.loads(content)
        except ValueError:
            parts = None
        if not isinstance(parts, list) or len(parts) != len(body["input_ids"]):
            raise ServerAnswerError(f"{where}: expected {len(body['input_ids'])} answers, got something else")
        return [parse(GenerateAnswer, json.dumps(part), where) for part in parts]

    def _check_ids(self, input_ids: Sequence[int]) -> None:
        """Refuses ids outside of the vocabulary: one would crash the server with all of its requests."""
        if not input_ids or not all(0 <= token < self.vocab_size for token in input_ids):
            raise InputError(
                f"{self.url}/generate: expected at least one id, all in [0, {self.vocab_size}), got "
                f"{len(input_ids)} ids from {min(input_ids, default=None)} to {max(input_ids, default=None)}"
            )

    def abort(self, request_id: str | None = None) -> None:
        """Ends one request, or all of them; their answers return with finish_reason "abort"."""
        self._control("/abort_request", {"rid": request_id or "", "abort_all": request_id is None})

    # -- weights and control, with the admin key

    def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stops sampling; requests are aborted, put back in the queue, or kept as they are."""
        self._control("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Resumes sampling."""
        self._control("/continue_generation", {})

    def flush_cache(self) -> None:
        """Drops all keys and values of earlier weights."""
        self._control("/flush_cache", {})

    def end_requests(self, *, timeout_seconds: float) -> None:
        """Aborts all requests, waits until none is left and flushes the cache; else raises ServerRefusedError."""
        self.abort()
        self._control(f"/flush_cache?timeout={timeout_seconds:g}", {})

    def move_memory(self, action: Literal["release", "resume"], tags: Sequence[str]) -> None:
        """Gives back the memory with SGLang's `tags`, or takes it back without its content. The server must be idle."""
        self._control(f"/{action}_memory_occupation", {"tags": tags})

    def weights_endpoint(self, name: str, body: Mapping[str, Any] | None = None) -> None:
        """Calls a weight endpoint such as "begin_weight_update"; returns when it reports success.

        Raises:
            ServerRefusedError: the server reports failure. ServerError: it does not answer.
        """
        outcome = parse(Outcome, self._control(f"/{name}", body or {}), f"{self.url}/{name}")
        if not outcome.success:
            raise ServerRefusedError(f"{self.url}/{name}: {outcome.message}")

    def weight_checksums(self, skipped: Sequence[str]) -> list[dict[str, str]]:
        """Returns each tensor's checksum by name, per rank, but for names with one of `skipped`; raises as above."""
        body = {"action": "checksum", "skip_tensor_list": list(skipped), "selector": "target"}
        answer = parse(WeightChecksums, self._control("/weights_checker", body), f"{self.url}/weights_checker")
        if not answer.success:
            raise ServerRefusedError(f"{self.url}/weights_checker: {answer.message}")
        return [rank.checksums for rank in answer.ranks]

    # -- HTTP

    def _control(self, path: str, body: Mapping[str, Any]) -> bytes:
        return self._request("POST", path, body, timeout_seconds=self.timeouts.control, retries=0, admin=True)

    def _get(self, kind: "type[AnswerT]", path: str) -> "AnswerT":
        return parse(kind, self._request("GET", path), f"{self.url}{path}")

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float | None = None,
        retries: int | None = None,
        admin: bool = False,
    ) -> bytes:
        def attempt() -> bytes:
            timeout = httpx.Timeout(timeout_seconds or self.timeouts.silence, connect=self.timeouts.connect)
            try:
                response = self._http.request(method, path, json=body, headers=self._headers(admin), timeout=timeout)
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
                raise _TransientError(_transport_message(f"{self.url}{path}", error)) from error
            _raise_for_status(response.status_code, response.content, f"{self.url}{path}")
            return response.content

        return self._retried(attempt, self.timeouts.retries if retries is None else retries)

    def _retried(self, attempt: Callable[[], T], retries: int) -> T:
        return Retrying(
            stop=stop_after_attempt(1 + retries),
            wait=wait_random_exponential(multiplier=0.5, max=self.timeouts.back_off),
            retry=retry_if_exception_type(_TransientError),
            reraise=True,
        )(attempt)

    def _stream(self, body: Mapping[str, Any], where: str) -> Iterator[GenerateAnswer]:
        """Yields the chunks of a streamed /generate, up to its end mark."""
        try:
            with self._http.stream("POST", "/generate", json=body, headers=self._headers(admin=False)) as response:
                if response.status_code != httpx.codes.OK:
                    _raise_for_status(response.status_code, response.read(), where)
                for line in response.iter_lines():
                    if not line:
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    yield _chunk(data, where)
        except EngineError:
            raise
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:  # RuntimeError: the client was closed
            raise _TransientError(_transport_message(where, error)) from error
        raise ServerAnswerError(f"{where}: expected a stream up to its end mark, got a truncated answer")

    def _headers(self, admin: bool) -> dict[str, str]:
        key = (self._keys.admin or self._keys.api) if admin else self._keys.api
        return {"Authorization": f"Bearer {key}"} if key else {}


AnswerT = TypeVar("AnswerT", bound=Answer)


def _append(ids: list[int], triples: list[LogprobTriple], answer: GenerateAnswer, where: str) -> None:
    """Appends a chunk: servers send either the ids since the last chunk or all of them."""
    total = answer.meta_info.completion_tokens
    if len(answer.output_ids) == total:
        ids.clear()
        triples.clear()
    ids += answer.output_ids
    triples += answer.meta_info.output_token_logprobs or []
    if len(ids) != total:
        raise ServerAnswerError(f"{where}: expected {total} response ids so far, got {len(ids)}")


def _chunk(data: str, where: str) -> GenerateAnswer:
    if '"error"' in data[:16]:
        try:
            error = json.loads(data)["error"]
            code, message = int(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            raise ServerAnswerError(f"{where}: expected a chunk of a response, got {data[:120]!r}") from None
        _raise_for_status(code, message.encode(), where)
    return parse(GenerateAnswer, data, where)


def _raise_for_status(code: int, content: bytes, where: str) -> None:
    if code == httpx.codes.OK:
        return
    message = f"{where}: HTTP {code}: {content[:200].decode(errors='replace')}"
    if code in (429, 502, 503, 504):
        raise _TransientError(message)
    if 400 <= code < 500:
        raise ServerRefusedError(message)
    raise ServerError(message)


def _transport_message(where: str, error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"{where}: no sign of life in time ({type(error).__name__})"
    return f"{where}: {type(error).__name__}: {error}"
