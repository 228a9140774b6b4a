"""Helpers for the scripts in slurm/ that start SGLang servers: passwords, model, arguments, waiting.

    python -m megatron_tip.commands.serving keys FILE
    python -m megatron_tip.commands.serving student CONFIG.toml [section.key=value ...]
    python -m megatron_tip.commands.serving arguments MODEL HOST PORT TP MEMORY_FRACTION KEYS_FILE [ARGUMENT...]
    python -m megatron_tip.commands.serving wait SECONDS URL...

Passwords go to a file that only its owner can read and to the servers' standard input, never to a command line, an
environment or a log. Servers log only warnings, because at the level below they print their arguments.
"""

import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import EngineError, MegatronTipError
from megatron_tip.files import atomic_write_text, parse_json


def write_keys(path: Path) -> None:
    """Writes new random passwords to `path`, as sglang.keys_file reads them; keeps a whole file that exists.

    Only its owner can read the file.

    Raises:
        OutputError: it cannot be written.
    """
    if _are_keys(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {"api": secrets.token_urlsafe(32), "admin": secrets.token_urlsafe(32)}
    atomic_write_text(path, json.dumps(keys), mode=0o600)


def _are_keys(path: Path) -> bool:
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(name), str) for name in ("api", "admin"))


def student_to_serve(config: Config) -> Path:
    """Returns the directory of the student to serve.

    With model.drop_layers, it is a description without weights in the run's folder: the first sync brings all weights.
    """
    if not config.model.drop_layers:
        return config.model.path
    from megatron_tip.conversion.safetensors_io import HfCheckpoint  # late: imports torch
    from megatron_tip.files import new_folder
    from megatron_tip.planning.dtypes import Dtypes

    target = config.run.folder.absolute() / "servers" / "model"
    with new_folder(target, overwrite=True) as folder:
        student = HfCheckpoint(config.model.path, config.model.drop_layers)
        student.write_description(folder, Dtypes.of(config, on_gpu=True).engine)
    return target


def server_arguments(
    model: str, host: str, port: int, tp_size: int, memory_fraction: float, keys: dict[str, str]
) -> list[str]:
    """Returns SGLang's arguments for one server; `megatron_tip.rollout.sglang.main` reads them as JSON.

    Prompts and responses travel as token ids, so the server needs no tokenizer. `model`: a directory; without weights
    the server starts with random ones. `host`: the only address that it listens on.
    """
    has_weights = any(Path(model).glob("*.safetensors"))
    pairs = {
        "--model-path": model,
        "--host": host,
        "--port": str(port),
        "--tp-size": str(tp_size),
        "--mem-fraction-static": f"{memory_fraction:g}",
        "--api-key": keys["api"],
        "--admin-api-key": keys["admin"],
        "--log-level": "warning",
        **({} if has_weights else {"--load-format": "dummy"}),
    }
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output"]
    return [part for pair in pairs.items() for part in pair] + flags


def wait_for_servers(urls: Sequence[str], timeout_seconds: float) -> None:
    """Waits until all servers answer /health.

    Raises:
        EngineError: a server does not answer in time.
    """
    deadline = time.monotonic() + timeout_seconds
    waiting = list(urls)
    while waiting:
        waiting = [url for url in waiting if not _is_healthy(url)]
        if waiting and time.monotonic() > deadline:
            raise EngineError(
                f"{', '.join(waiting)}: expected a healthy server within {timeout_seconds:g} s, got none; see its log "
                "next to the job's"
            )
        time.sleep(0.5 if waiting else 0)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def main(arguments: Sequence[str]) -> None:
    """Runs one of the commands listed above."""
    match arguments:
        case ["keys", path]:
            write_keys(Path(path))
        case ["student", config_path, *overrides]:
            print(student_to_serve(load_config(Path(config_path), overrides)))
        case ["arguments", model, host, port, tp_size, memory_fraction, keys_file, *further]:
            keys = parse_json(Path(keys_file).read_text())
            own = server_arguments(model, host, int(port), int(tp_size), float(memory_fraction), keys)
            print(json.dumps(own + further))
        case ["wait", seconds, *urls]:
            wait_for_servers(urls, float(seconds))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MegatronTipError as error:
        sys.exit(f"error: {error}")
