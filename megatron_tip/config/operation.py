"""Checkpoints, faults, outputs, tracking and monitoring of a run."""

from typing import Literal

from pydantic import Field

from megatron_tip.config.section import Section


class CheckpointConfig(Section):
    """What an interrupted run continues from, in checkpoints/: everything that the next step needs."""

    every_steps: int = Field(default=20, ge=0)
    """Save every this many steps; 0: never for this reason."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Save after the first step that ends at least this long after the last save; 0: never for this reason."""
    keep_last: int = Field(default=2, ge=1)
    """Number of checkpoints to keep; older ones are removed once a newer one is complete."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Also keep the checkpoints of steps divisible by this; 0: none."""
    in_background: bool = True
    """Copy the checkpoint to host memory and write it while training continues; false: wait for the disk."""


class FaultConfig(Section):
    """What happens when something goes wrong."""

    step_timeout_seconds: float = Field(default=1800.0, ge=0)
    """A rank that finishes no step for this long writes its stacks to stacks/ and ends the run; 0: wait forever."""
    grace_seconds: float = Field(default=120.0, ge=0)
    """After a stop signal, how long `megatron-tip train` lets its workers save before it ends them."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run saves and ends."""

    @property
    def collective_timeout_seconds(self) -> float:
        """Time limit of collectives: longer than the watchdog's, whose report says more."""
        return self.step_timeout_seconds + 120.0 if self.step_timeout_seconds else 7 * 24 * 3600.0


class OutputConfig(Section):
    """Outputs besides metrics and samples."""

    save_checkpoint: bool = True
    """Write Megatron's sharded checkpoint to checkpoint/ at the end."""
    export_hf: bool = True
    """Write the student as a Hugging Face directory to hf/ at the end."""
    save_rollouts: bool = True
    """Write each step's rollouts to rollouts/, readable by the replay engine."""


class TrackingConfig(Section):
    """Trackers besides metrics.jsonl, which is always written. The failure of a tracker never ends a run."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline: files in wandb/ of the run's folder, which `wandb sync --append` uploads later."""
    wandb_project: str = "megatron-tip"
    """Project of the run."""
    wandb_entity: str = ""
    """User or team; empty: the account's default."""
    wandb_name: str = ""
    """Name of the run; empty: the name of the run's folder."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_artifact: bool = False
    """Store the exported student (hf/) as an artifact at the end."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the run's folder."""
    view_every_steps: int = Field(default=0, ge=0)
    """Every this many steps, write views to views/ of the run's folder and to every tracker: responses with the
    selected tokens coloured, and the tokens' quadrants. For `megatron-tip report` they also contain each token's
    statistics and both models' top-K. 0: never."""
    view_samples: int = Field(default=4, ge=1)
    """Responses per view."""
    view_points: int = Field(default=2000, ge=1)
    """Tokens in a view's scatter plot of quadrants."""


class MonitoringConfig(Section):
    """What is measured on the machine."""

    every_seconds: float = Field(default=5.0, ge=0)
    """Interval at which a thread samples GPU and host; each step gets at least one sample. 0: no monitoring."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Dense bfloat16 TFLOP/s of one worker's device, for model FLOPs utilisation; 0: looked up by the GPU's name, and
    utilisation is left out if the name is unknown."""
    trace: bool = False
    """Write trace.json, a timeline of every worker's phases for Perfetto (ui.perfetto.dev)."""
