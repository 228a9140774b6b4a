"""The TensorBoard tracker; the only module that imports tensorboardX."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorboardX
from PIL import Image

from megatron_tip.config import Config
from megatron_tip.observability.metrics_file import RecordedStep
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import TokenTable
from megatron_tip.observability.token_view import quadrant_png


class TensorBoardTracker:
    """Event files in tensorboard/ of the run's folder. A continued run adds a file; TensorBoard joins them."""

    name = "tensorboard"

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str | None:
        """Opens a new event file."""
        self._writer = tensorboardX.SummaryWriter(str(folder.path / "tensorboard"))
        return None

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None:
        """Does nothing: what was flushed is the operating system's to write, and outlives the process."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of `step`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_view(self, step: int, view: TokenTable) -> None:
        """Writes the responses as Markdown with selected tokens in bold, and the scatter plot of quadrants."""
        for place, viewed in enumerate(view.facts.rollouts):
            tokens = view.tokens_of(viewed)
            pairs = zip(*(tokens.column(name).to_pylist() for name in ("text", "selected")), strict=True)
            text = "".join(f"**`{token}`**" if selected else token for token, selected in pairs)
            self._writer.add_text(f"view/response_{place}", text, step)
        if picture := quadrant_png(view):
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            self._writer.add_image("view/quadrants", pixels, step, dataformats="HWC")

    def log_student(self, path: Path) -> None:
        """Does nothing: event files hold no models."""

    def finish(self, *, failed: bool) -> None:
        """Closes the event file."""
        self._writer.close()
