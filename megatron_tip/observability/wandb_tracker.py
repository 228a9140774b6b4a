"""The Weights & Biases tracker; the only module that imports wandb."""

import io
import logging
import os
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_tip.config import Config
from megatron_tip.errors import InputError
from megatron_tip.observability.metrics_file import RecordedStep
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable, read_token_table, token_table_file
from megatron_tip.observability.token_view import num_selected, quadrant_png, response_html

# wandb reads this on import; a cluster without internet access cannot report wandb's own errors.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
import wandb

logger = logging.getLogger(__name__)

_LOGIN_SECONDS, _START_SECONDS, _FINISH_SECONDS = 10, 60, 60


class WandbTracker:
    """One W&B run per training run, even across restarts: the identity that `start` returns is the W&B run id.

    In online mode without a network or login, the run stays offline; `wandb sync --append` uploads it later.

    W&B wants a run's steps in order and once, across all of its files. A killed process loses up to 32 KB of an offline
    file, and what was not yet sent online. Therefore a continued run first logs the steps that W&B lacks, and does not
    log again those that it has.
    """

    name = "wandb"

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        """Starts a W&B run, or continues the one with the id `identity`; returns its id."""
        self._folder = folder
        recorded = _steps_in_files(folder.path / "wandb", identity) if identity else set()
        self._fills_gaps = recorded is not None
        self._recorded: Container[int] = recorded or ()
        self._artifact = config.tracking.wandb_artifact
        try:
            self._run = self._init(config, identity, config.tracking.wandb)
        except wandb.Error as error:
            if config.tracking.wandb != "online":
                raise
            logger.warning(
                "wandb: cannot go online (%s); stays offline: %s", error, self._sync_command("offline-run-*")
            )
            self._run = self._init(config, identity, "offline")
        if not self._run.offline:
            self._recorded, self._fills_gaps = range(self._run.starting_step), True  # what the server has
        return self._run.id

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None:
        """Logs those of `steps` that W&B lacks, with their views if views/ has them."""
        if not self._fills_gaps:
            return
        lacking = [(step, metrics) for step, metrics in steps if step not in self._recorded]
        for step, metrics in lacking:
            self.log_metrics(step, metrics)
            view = token_table_file(self._folder.views, step)
            if view.exists():
                with suppress(InputError):  # a broken view is lost, not the steps after it
                    self.log_view(step, read_token_table(view))
        if lacking:
            logger.info("wandb: %d steps that an earlier start recorded and W&B lost are logged again", len(lacking))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of `step`, unless an earlier start of the run did."""
        if step not in self._recorded:
            self._run.log(dict(metrics), step=step)

    def log_view(self, step: int, view: TokenTable) -> None:
        """Logs a table of responses with the selected tokens coloured, and the scatter plot of quadrants."""
        if step in self._recorded:
            return
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
        """Closes the run. Abandons an upload that takes too long; `wandb sync --append` resumes it."""
        folders = "offline-run-*" if self._run.offline else "latest-run"
        _bounded(lambda: self._run.finish(exit_code=int(failed)), _FINISH_SECONDS, self._sync_command(folders))

    def _sync_command(self, folders: str) -> str:
        """Returns the command that uploads `folders` in their order, each after the steps of the one before."""
        return f"wandb sync --append {self._folder.path / 'wandb'}/{folders}"

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
            resume="allow" if mode == "online" else None,  # `wandb sync --append` joins offline files of one id
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


def _steps_in_files(folder: Path, identity: str) -> set[int] | None:
    """Returns the steps that W&B's files of the run `identity` hold, online ones included; None if it has no reader."""
    try:  # private modules, which another version may not have
        from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]
        from wandb.sdk.internal.datastore import DataStore
    except ImportError as error:
        logger.warning("wandb: cannot read its own files (%s); steps that a killed run lost stay lost", error)
        return None
    steps: set[int] = set()
    for path in folder.glob(f"*run-*/run-{identity}.wandb"):
        with suppress(Exception):  # a killed process's file ends anywhere; W&B's reader has no error of its own
            store = DataStore()
            store.open_for_scan(str(path))
            while (data := store.scan_data()) is not None:
                record = Record.FromString(data)
                if record.WhichOneof("record_type") == "history":
                    steps.add(record.history.step.num)
    return steps


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
