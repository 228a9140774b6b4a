"""`megatron-tip submit`: the check and the SLURM submission of a configuration."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.time_limit import check_time_limit
from megatron_tip.commands.train import check_elsewhere
from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Submission:
    """A job to submit. `script`: a file of the repository's slurm/, without its suffix. `options`: more sbatch options;
    they come last and win. `rollout_nodes`, `teacher_nodes`: how many of all `nodes`, for train_disaggregated.
    """

    config_path: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    script: str = "train"
    options: Sequence[str] = ()
    rollout_nodes: int = 0
    teacher_nodes: int = 0
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        """Raises ConfigError if no node is left for the trainer, or none is given to the rollouts."""
        if self.script == "train_disaggregated" and (self.trainer_nodes < 1 or self.rollout_nodes < 1):
            raise ConfigError(
                f"--nodes: expected at least one trainer and one rollout node, got {self.nodes} in total with "
                f"--rollout-nodes {self.rollout_nodes} and --teacher-nodes {self.teacher_nodes}"
            )

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.rollout_nodes - self.teacher_nodes


@errors_reported()
def command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run, as for train.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Workers per node; slurm/site.sh may set it too.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each GPU, for the check.")] = 80.0,
    script: Annotated[str, typer.Option(help="train, train_disaggregated or sweep.")] = "train",
    rollout_nodes: Annotated[int, typer.Option(min=0, help="train_disaggregated: how many nodes run SGLang.")] = 0,
    teacher_nodes: Annotated[int, typer.Option(min=0, help="train_disaggregated: how many serve the teacher.")] = 0,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="An sbatch option, as --sbatch=--qos=high; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, stop.")] = False,
) -> None:
    """Checks a configuration for this many nodes and submits it to SLURM.

    Site values come from slurm/site.sh; command-line options win.
    """
    config = load_config(config_path, overrides or [])
    site = site_values(os.environ)
    submission = Submission(
        config_path,
        overrides or [],
        nodes=nodes,
        script=script,
        options=sbatch or [],
        rollout_nodes=rollout_nodes,
        teacher_nodes=teacher_nodes,
    )
    workers = submission.trainer_nodes * int(site["TIP_TASKS_PER_NODE"] or gpus_per_node)
    memory = gpu_memory * (trainer_share(site) if script == "train" else 1.0)
    check_elsewhere(as_served(config, site, script), workers, memory)
    typer.echo(submit(submission, config, dry_run=dry_run))


def sbatch_command(submission: Submission, config: Config) -> list[str]:
    """Returns the sbatch command: site values, job name and log from the run, then the script and its arguments.

    Raises:
        ConfigError: the script does not exist next to the package, or the time limit leaves no time for a step.
    """
    script = _ROOT / "slurm" / f"{submission.script}.sbatch"
    if not script.exists():
        known = sorted(path.stem for path in script.parent.glob("*.sbatch"))
        raise ConfigError(
            f"--script: expected one of {', '.join(known) or 'the scripts of a clone of the repository'}, got "
            f"{submission.script} in {script.parent}; install the package from a clone: pip install --editable ."
        )
    site = site_values(submission.environ)
    check_time_limit(site["TIP_TIME"], submission.options)
    folder = config.run.folder.absolute()
    is_array = submission.script == "sweep"
    options = {
        "--job-name": folder.name,
        "--nodes": str(submission.nodes),
        "--partition": site["TIP_PARTITION"],
        "--account": site["TIP_ACCOUNT"],
        "--time": site["TIP_TIME"],
        "--output": f"{folder}/slurm/".replace("%", "%%") + ("%A_%a.out" if is_array else "%j.out"),
        "--export": ",".join(["ALL", f"TIP_ROOT={_ROOT}", *_split(submission)]),
    }
    named = [f"{name}={value}" for name, value in options.items() if value]
    arguments = [str(submission.config_path.absolute()), *submission.overrides]
    return ["sbatch", *named, *submission.options, str(script), *arguments]


def _split(submission: Submission) -> list[str]:
    """Returns the environment variables that tell the script how many nodes each kind gets."""
    if submission.script != "train_disaggregated":
        return []
    return [f"TIP_ROLLOUT_NODES={submission.rollout_nodes}", f"TIP_TEACHER_NODES={submission.teacher_nodes}"]


def site_values(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the values that slurm/site.sh sets for sbatch; bash itself reads the file.

    Raises:
        ConfigError: bash cannot read the file.
    """
    names = (
        *("TIP_PARTITION", "TIP_ACCOUNT", "TIP_TIME", "TIP_TASKS_PER_NODE"),
        *("TIP_SGLANG_PER_NODE", "TIP_SGLANG_SHARED_MEMORY"),
    )
    site = environ.get("MEGATRON_TIP_SITE") or str(_ROOT / "slurm" / "site.sh")
    script = 'set -e; source "$0"; for name in "$@"; do printf "%s\\0" "${!name}"; done'
    read = subprocess.run(
        ["bash", "-c", script, site, *names], env=dict(environ), capture_output=True, text=True, check=False
    )
    if read.returncode:
        raise ConfigError(f"{site}: expected a file of shell variables, got: {read.stderr.strip()}")
    return dict(zip(names, read.stdout.split("\0"), strict=False))


def trainer_share(site: Mapping[str, str]) -> float:
    """Returns the share of each GPU's memory that servers on the same GPUs leave to the trainer."""
    return 1.0 - float(site["TIP_SGLANG_SHARED_MEMORY"]) if int(site["TIP_SGLANG_PER_NODE"]) else 1.0


def as_served(config: Config, site: Mapping[str, str], script: str) -> Config:
    """Returns the configuration to check: as the script will run it, with the rollout servers that it starts.

    Raises:
        ConfigError: servers cannot replace the configured engine.
    """
    if script != "train_disaggregated" and not (script == "train" and int(site["TIP_SGLANG_PER_NODE"])):
        return config
    urls = {"engine": "sglang", "server_urls": ("http://started-by-the-script:1",)}
    try:
        return Config.model_validate({**config.model_dump(), "rollout": {**config.rollout.model_dump(), **urls}})
    except ValueError as error:
        raise ConfigError(
            f"rollout: expected settings that suit the servers that slurm/{script}.sbatch starts: {error}"
        ) from error


def submit(submission: Submission, config: Config, *, dry_run: bool) -> str:
    """Submits the job and returns the text for the user; with `dry_run` only returns the command.

    Raises:
        ConfigError: sbatch is missing or fails.
    """
    command = sbatch_command(submission, config)
    if dry_run:
        return shlex.join(command)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"sbatch: expected SLURM on this machine, found none; where it is installed, run: {shlex.join(command)}"
        )
    (config.run.folder / "slurm").mkdir(parents=True, exist_ok=True)
    ended = subprocess.run(command, env=dict(submission.environ), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ConfigError(f"sbatch: {ended.stderr.strip()}\n  {shlex.join(command)}")
    return f"{ended.stdout.strip()}\nlog: {config.run.folder / 'slurm'}"
