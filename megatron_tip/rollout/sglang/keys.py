"""The passwords of SGLang servers."""

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tip.errors import ConfigError
from megatron_tip.parallel.environment import LOOPBACK


@dataclass(frozen=True)
class ServerKeys:
    """The passwords of a server, kept out of every repr: `api` for generation, `admin` for weights and control."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)


def new_keys(host: str) -> ServerKeys:
    """Returns random passwords for a server that other machines can reach; none for one on loopback."""
    if host in LOOPBACK:
        return ServerKeys()
    return ServerKeys(api=secrets.token_urlsafe(32), admin=secrets.token_urlsafe(32))


def read_keys(path: Path | None, *, setting: str = "sglang.keys_file") -> ServerKeys:
    """Returns the passwords in `path`, the value of `setting`; none without a path.

    Raises:
        ConfigError: the file is unreadable or has the wrong content. The message reveals nothing of the content.
    """
    if path is None:
        return ServerKeys()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: cannot read {path}: {type(error).__name__}") from None
    valid = isinstance(content, dict) and content.keys() <= {"api", "admin"}
    if not valid or not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f'{setting}: expected {{"api": "...", "admin": "..."}} in {path}, got something else')
    return ServerKeys(**content)
