"""A server that speaks SGLang's HTTP as far as it is used here, and misbehaves on the wire as told."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCAB_SIZE = 307


class FakeSGLang:
    """Answers on `url` from threads of its own until `stop`. A context manager.

    `misbehave(number, request, chunks)` gets every streamed /generate (counted from 0) with the chunks that a good
    server would send, and returns those that this one sends; it may also sleep, or raise one of the two exceptions
    below. `seen`: every (path, body, authorization). `held` are its weights: those of the last version that it took, or
    with `keeps_weights` what it held before, under the new name.
    """

    def __init__(self, *, model_type: str = "llama", vocab_size: int = VOCAB_SIZE, cumulative: bool = False) -> None:
        self.model_type = model_type
        self.vocab_size = vocab_size
        self.cumulative = cumulative
        self.version = "default"
        self.held = "nothing"
        self.keeps_weights = False
        self.gives_checksums = True
        self.misbehave: Callable[[int, dict[str, Any], list[Any]], list[Any]] = lambda number, request, chunks: chunks
        self.layout: dict[str, Any] = {}
        self.released: set[str] = set()
        self.crashes: list[str] = []
        self.statuses: dict[str, list[int]] = {}
        self.seen: list[tuple[str, Any, str | None]] = []
        self.seconds_per_request = 0.0
        self.most_at_once = 0
        self._at_once = 0
        self._number = 0
        self._lock = threading.Lock()
        self._server = self._listen(0)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = _QuietServer(("127.0.0.1", port), _handler_of(self))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def stop(self) -> None:
        """Refuses connections from now on, and cuts those that stand."""
        self._server.shutdown()
        self._server.server_close()

    def come_back(self, *, with_weights: bool = False) -> None:
        """Listens again on the same port; `with_weights`: it had only been cut off, not restarted."""
        if not with_weights:
            self.version, self.held = "default", "nothing"
            self.released = set()
        self._server = self._listen(self.port)

    def __enter__(self) -> "FakeSGLang":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def generations(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.seen if path == "/generate"]

    # -- what it answers

    def respond(self, handler: BaseHTTPRequestHandler, path: str, body: Any) -> None:
        path = path.partition("?")[0]
        if self.statuses.get(path):
            handler.send_error(self.statuses[path].pop(0))
        elif path in ("/health", "/generate") and self.released:
            self.crashes.append(f"{path} without {', '.join(sorted(self.released))}")
            raise CutError([])
        elif path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self.move_memory(path, set(body["tags"]))
            send_json(handler, None)
        elif path == "/health":
            send_json(handler, {})
        elif path == "/model_info":
            send_json(handler, self.model_info())
        elif path == "/server_info":
            info = {"version": "0.5.23", "tp_size": 1, "api_key": "x"}
            send_json(handler, info | self.layout)
        elif path == "/generate":
            self.generate(handler, body)
        elif path == "/update_weight_version":
            self.take(body["new_version"])
            send_json(handler, {"success": True, "message": "", "new_version": self.version})
        elif path == "/update_weights_from_disk":
            self.take(body["weight_version"])
            send_json(handler, {"success": True, "message": ""})
        elif path == "/weights_checker" and self.gives_checksums:
            name = "model.layers.0.self_attn.o_proj.weight"
            ranks = [{"checksums": {name: self.held}, "per_gpu_checksum": "x"}]
            send_json(handler, {"success": True, "message": "Success.", "ranks": ranks})
        else:
            send_json(handler, {"success": True, "message": ""})

    def take(self, version: str) -> None:
        self.version = version
        if not self.keeps_weights:
            self.held = version

    def move_memory(self, path: str, tags: set[str]) -> None:
        """Gives back or takes back; a real server ends if it is busy, or has done so before."""
        is_release = path.startswith("/release")
        if is_release and self._at_once:
            self.crashes.append("released while it generates")
        if tags & self.released if is_release else tags - self.released:
            self.crashes.append(f"{path} of {', '.join(sorted(tags))} again")
        self.released = self.released | tags if is_release else self.released - tags

    def model_info(self) -> dict[str, Any]:
        return {
            "model_path": "/fake",
            "is_generation": True,
            "weight_version": self.version,
            "model_type": self.model_type,
            "architectures": ["FakeForCausalLM"],
        }

    def generate(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        asked = body.get("token_ids_logprob")
        if asked and max(asked) >= self.vocab_size:
            send_json(handler, {"error": {"message": "contains out-of-vocabulary token id"}}, status=400)
            return
        with self._lock:
            number, self._number = self._number, self._number + 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.seconds_per_request)
        with self._lock:
            self._at_once -= 1  # before the answer: who has it may ask again before this thread goes on
        if body.get("stream"):
            send_stream(handler, self.misbehave(number, body, self.chunks(body, number)))
        else:
            send_json(handler, self.whole(body))

    def chunks(self, body: dict[str, Any], number: int) -> list[Any]:
        """Two chunks: the ids 3, 4, ... of the asked number, in two halves."""
        count = body["sampling_params"]["max_new_tokens"]
        ids = [3 + (number + place) % (self.vocab_size - 3) for place in range(count)]
        half = count // 2
        first = self.chunk(ids[:half], total=half, finished=False)
        start = 0 if self.cumulative else half
        return [first, self.chunk(ids[start:], total=count, finished=True), "[DONE]"]

    def chunk(self, ids: list[int], *, total: int, finished: bool) -> dict[str, Any]:
        return {
            "output_ids": ids,
            "meta_info": {
                "id": "x",
                "prompt_tokens": 3,
                "completion_tokens": total,
                "weight_version": self.version,
                "finish_reason": {"type": "length", "length": total} if finished else None,
                "output_token_logprobs": [[-1.5, token, None] for token in ids],
            },
        }

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.chunk([5], total=1, finished=True)
        answer["meta_info"]["input_token_logprobs"] = [
            [None if place == 0 else -2.0, token, None] for place, token in enumerate(body["input_ids"])
        ]
        return answer


class CutError(Exception):
    """Raised by `misbehave`: the connection is cut in the middle of the answer. `chunks` are sent before it."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = chunks


class StatusError(Exception):
    """Raised by `misbehave`: this HTTP status is the answer."""

    def __init__(self, status: int) -> None:
        self.status = status


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, *args: Any) -> None:
        self.sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.sockets.add(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # close alone would leave it to the thread that reads from it

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def _handler_of(fake: FakeSGLang) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            fake.seen.append((self.path, body, self.headers["Authorization"]))
            try:
                fake.respond(self, self.path, body)
            except CutError as cut:
                send_stream(self, cut.chunks, end=False)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            except StatusError as status:
                self.send_error(status.status)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def send_json(handler: BaseHTTPRequestHandler, content: Any, *, status: int = 200) -> None:
    payload = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)


def send_stream(handler: BaseHTTPRequestHandler, chunks: list[Any], *, end: bool = True) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in chunks:
        text = chunk if isinstance(chunk, str) else json.dumps(chunk)
        payload = f"data: {text}\n\n".encode()
        handler.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
    if end:
        handler.wfile.write(b"0\r\n\r\n")
    handler.wfile.flush()
