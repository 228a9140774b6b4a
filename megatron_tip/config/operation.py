"""How a run lasts, what it leaves and what it reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_tip.config.section import Section


class CheckpointConfig(Section):
    """What an interrupted run continues from, in checkpoints/: everything that the next step depends on."""

    every_steps: int = Field(default=20, ge=0)
    """Save after so many steps; 0: not for that reason."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Save after the step that ends so long after the last save; 0: not for that reason."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are removed once a newer one is whole."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Those of steps divisible by it are kept as well; 0: none."""
    in_background: bool = True
    """Copy what is saved to host memory and write it while training goes on; false: wait for the disk."""


class FaultConfig(Section):
    """What happens when something goes wrong."""

    step_timeout_seconds: float = Field(default=1800.0, ge=0)
    """A rank that finishes no step for so long writes its stacks to stacks/ and ends the run; 0: waits for ever."""
    grace_seconds: float = Field(default=120.0, ge=0)
    """Told to stop, `megatron-tip train` gives its workers so long to save before it ends them."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """Steps in a row whose loss or gradient is not finite are skipped; after so many the run saves and ends."""


class OutputConfig(Section):
    """What the run leaves besides metrics, samples and rollouts."""

    save_checkpoint: bool = True
    """Write Megatron's sharded checkpoint to checkpoint/ at the end."""
    export_hf: bool = True
    """Write the student as a Hugging Face directory to hf/ at the end."""
    save_rollouts: bool = True
    """Write each step's rollouts to rollouts/, readable by the replay engine."""


class TrackingConfig(Section):
    """Where the run's numbers go besides metrics.jsonl, which is always written. No tracker's failure ends a run."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline: files under wandb/ in the run's folder, which `wandb sync` uploads later."""
    wandb_project: str = "megatron-tip"
    """Project of the run."""
    wandb_entity: str = ""
    """User or team; empty: the account's default."""
    wandb_name: str = ""
    """Name of the run; empty: that of the run's folder."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_artifact: bool = False
    """Store the exported student (hf/) as an artifact at the end."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run's folder."""
    view_every_steps: int = Field(default=0, ge=0)
    """Every so many steps, show responses with the selected tokens coloured and the tokens' quadrants, in views/ of the
    run's folder and in every tracker; with each token's statistics and both models' top-K for `megatron-tip report`.
    0: never."""
    view_samples: int = Field(default=4, ge=1)
    """Responses in such a view."""
    view_points: int = Field(default=2000, ge=1)
    """Tokens in such a view's scatter of quadrants."""


class MonitoringConfig(Section):
    """What is measured of the machine."""

    every_seconds: float = Field(default=5.0, ge=0)
    """Sample GPU and host so often, in a thread; each step is given at least one sample. 0: no monitoring."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Dense bfloat16 TFLOP/s of one worker's device, for model FLOPs utilisation; 0: known by the GPU's name, else
    utilisation is left out."""
    trace: bool = False
    """Write trace.json, a time line of every worker's phases for Perfetto (ui.perfetto.dev)."""
