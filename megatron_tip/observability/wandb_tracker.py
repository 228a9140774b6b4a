"""The Weights & Biases tracker; the only module that imports wandb."""

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

# wandb reads this on import; a cluster without internet access cannot report wandb's own errors.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
import wandb

logger = logging.getLogger(__name__)

_LOGIN_SECONDS, _START_SECONDS, _FINISH_SECONDS = 10, 60, 60


class WandbTracker:
    """One W&B run per training run, even across restarts: the identity that `start` returns is the W&B run id.

    In online mode without a network or login, the run stays offline; `wandb sync` uploads it later. If a restart
    repeats steps, W&B keeps the first values.
    """

    name = "wandb"

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        """Starts a W&B run, or continues the one with the id `identity`; returns its id."""
        self._folder = folder
        self._artifact = config.tracking.wandb_artifact
        try:
            self._run = self._init(config, identity, config.tracking.wandb)
        except wandb.Error as error:
            if config.tracking.wandb != "online":
                raise
            logger.warning("wandb: cannot go online (%s); stays offline: wandb sync %s", error, folder.path / "wandb")
            self._run = self._init(config, identity, "offline")
        return self._run.id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of `step`."""
        self._run.log(dict(metrics), step=step)

    def log_view(self, step: int, view: TokenTable) -> None:
        """Logs a table of responses with the selected tokens coloured, and the scatter plot of quadrants."""
        table = wandb.Table(columns=["prompt", "response", "num_selected", "num_tokens"])
        for viewed in view.facts.rollouts:
            tokens = view.tokens_of(viewed)
            table.add_data(viewed.prompt, wandb.Html(response_html(tokens)), num_selected(tokens), len(tokens))
        logged: dict[str, Any] = {"view/responses": table}
        if picture := quadrant_png(view):
            logged["view/quadrants"] = wandb.Image(Image.open(io.BytesIO(picture)))
        self._run.log(logged, step=step)

    def log_student(self, path: Path) -> None:
        """Stores the exported student as a model artifact, if configured."""
        if self._artifact:
            artifact = wandb.Artifact(f"student-{self._run.id}", type="model")
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact)

    def finish(self, *, failed: bool) -> None:
        """Closes the run. Abandons an upload that takes too long; `wandb sync` resumes it."""
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
            resume="allow" if mode == "online" else None,  # `wandb sync` joins offline files of one id
            # This package itself records the log, the machine and its GPUs.
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
