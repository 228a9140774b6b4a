"""Weights & Biases: the only file that imports wandb."""

import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_tip.config import Config
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable
from megatron_tip.observability.token_view import num_selected, quadrant_png, response_html

# Read at the import: an offline run on a cluster without a way out has nobody to report wandb's own errors to.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
import wandb

logger = logging.getLogger(__name__)

_LOGIN_SECONDS, _START_SECONDS, _FINISH_SECONDS = 10, 60, 60


class WandbTracker:
    """One W&B run a training run, also over restarts: the identity that `start` returns is the W&B run id.

    Online without a network, or without a login, the run is kept offline instead; `wandb sync` uploads it later.
    Steps that a restart repeats are not taken twice: W&B keeps the first.
    """

    name = "wandb"

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        """Begins a W&B run, or goes on with the one of id `identity`; returns its id."""
        self._folder = folder
        self._artifact = config.tracking.wandb_artifact
        try:
            self._run = self._init(config, identity, config.tracking.wandb)
        except wandb.Error as error:
            if config.tracking.wandb != "online":
                raise
            logger.warning("wandb: cannot go online (%s); kept offline: wandb sync %s", error, folder.path / "wandb")
            self._run = self._init(config, identity, "offline")
        return self._run.id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of `step`."""
        self._run.log(dict(metrics), step=step)

    def log_view(self, step: int, view: TokenTable) -> None:
        """Takes a table of responses with the selected tokens coloured, and the scatter of quadrants."""
        table = wandb.Table(columns=["prompt", "response", "num_selected", "num_tokens"])
        for viewed in view.facts.rollouts:
            tokens = view.tokens_of(viewed)
            table.add_data(viewed.prompt, wandb.Html(response_html(tokens)), num_selected(tokens), len(tokens))
        logged: dict[str, Any] = {"view/responses": table}
        if picture := quadrant_png(view):
            logged["view/quadrants"] = wandb.Image(Image.open(io.BytesIO(picture)))
        self._run.log(logged, step=step)

    def log_student(self, path: Path) -> None:
        """Stores the exported student as a model artifact, where the configuration asks for it."""
        if self._artifact:
            artifact = wandb.Artifact(f"student-{self._run.id}", type="model")
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact)

    def finish(self, *, failed: bool) -> None:
        """Closes the run. An upload that does not end is left behind; `wandb sync` takes it up."""
        _bounded(
            lambda: self._run.finish(exit_code=int(failed)), _FINISH_SECONDS, f"wandb sync {self._folder.path}/wandb"
        )

    def _init(self, config: Config, identity: str | None, mode: Any) -> Any:
        tracking = config.tracking
        return wandb.init(
            mode=mode,
            dir=str(self._folder.path),
            project=tracking.wandb_project,
            entity=tracking.wandb_entity or None,
            name=tracking.wandb_name or self._folder.path.name,
            tags=list(tracking.wandb_tags),
            config=config.model_dump(mode="json"),
            id=identity,
            resume="allow" if mode == "online" else None,  # offline files of one id are joined by `wandb sync`
            # The log, the machine and its GPUs are this package's own business.
            settings=wandb.Settings(
                console="off",
                quiet=True,
                init_timeout=_START_SECONDS,
                login_timeout=_LOGIN_SECONDS,
                x_disable_stats=True,
                disable_git=True,
                save_code=False,
            ),
        )


def _bounded(call: Callable[[], None], seconds: float, remedy: str) -> None:
    """Runs `call` in a thread for at most `seconds`; raises what it raised, or TimeoutError."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done after {seconds:.0f} s; {remedy}")
    if failures:
        raise failures[0]
