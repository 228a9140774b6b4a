"""The process of one of our own servers, and the only file that imports sglang.

`python -m megatron_tip.rollout.sglang.main` reads one line of JSON from standard input (SGLang's command-line
arguments, passwords among them) and becomes the server. That keeps passwords out of the process list and the
environment. The input stays open: when it ends, because whoever started the server closed it or was killed, the server
ends with all of its processes. Imports only the standard library at the top: SGLang's other processes import this file
as well.
"""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise


def serve() -> None:
    """Becomes the server that the first line of standard input describes; returns only when it has ended."""
    arguments = json.loads(_first_line())
    _require_port(arguments)
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()
    from megatron_tip.parallel import environment

    host = dict(pairwise(arguments)).get("--host", "127.0.0.1")
    own = environment.nccl_environment(os.environ) | environment.server_network_environment(os.environ, host)
    os.environ.update(own)
    if "--enable-memory-saver" in arguments:
        environment.drop_expandable_segments(os.environ)
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]

    run_server(prepare_server_args(arguments))


def register_cpu_hooks() -> None:
    """Registers the hooks of a server on a CPU.

    It is SGLang's plugin, named by `cpu_shim/sitecustomize.py`, and called in each of the server's processes.

    Matrix products there are the trainer's.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # pyright: ignore[reportMissingImports]

    from megatron_tip.cpu.onednn import use_faster_products
    from megatron_tip.rollout.sglang import cpu_hooks as hooks

    use_faster_products()
    attention = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode"
    HookRegistry.register(attention, hooks.decode_attention, HookType.AROUND)
    batch_info = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
    HookRegistry.register(batch_info, hooks.with_seeds, HookType.AFTER)
    sampler = "sglang.srt.layers.sampler"
    HookRegistry.register(f"{sampler}.sampling_from_probs_torch", hooks.sample_probabilities, HookType.REPLACE)
    HookRegistry.register(f"{sampler}.multinomial_with_seed", hooks.sample_logprobs, HookType.REPLACE)


def _require_port(arguments: Sequence[str]) -> None:
    """Ends this process if its port is not free: SGLang itself notices only after it has loaded the model."""
    given = dict(pairwise(arguments))
    host, port = given.get("--host", "127.0.0.1"), int(given.get("--port", "0"))
    if given.get("--node-rank", "0") != "0":
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        sys.exit(
            f"error: {host}:{port}: expected a free port of this machine ({socket.gethostname()}), got: "
            f"{error.strerror}; `ss -ltnp` shows who has it; set another TIP_SGLANG_PORT"
        )


def _first_line() -> bytes:
    """Reads a line without Python's buffer, whose lock a thread waiting for more would hold when Python exits."""
    line = b""
    while not line.endswith(b"\n") and (read := os.read(0, 1)):
        line += read
    return line


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    serve()
