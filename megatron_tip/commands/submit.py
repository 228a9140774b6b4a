"""`megatron-tip submit`: the check and the SLURM submission of a configuration."""

import difflib
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
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.commands.time_limit import check_time_limit
from megatron_tip.commands.train import check_elsewhere
from megatron_tip.config import Config
from megatron_tip.errors import ConfigError
from megatron_tip.placement.hosts import Hosts

SCRIPTS = ("train", "train_disaggregated", "sweep")
"""Files of the repository's slurm/, without their suffix, that take a configuration."""

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Submission:
    """A job to submit. `script`: a file of the repository's slurm/, without its suffix. `options`: more sbatch options;
    they come last and win. `rollout_nodes`, `teacher_nodes`: how many of all `nodes`, for train_disaggregated.
    `gpus_per_node`: None: as slurm/site.sh says, or 8; 0: none.
    """

    config_path: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    script: str = "train"
    options: Sequence[str] = ()
    rollout_nodes: int = 0
    teacher_nodes: int = 0
    gpus_per_node: int | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        """Raises ConfigError if no node is left for the trainer, or rollouts have none, or nodes and script differ.

        Likewise if there is no such script.
        """
        if self.script not in SCRIPTS:
            close = difflib.get_close_matches(self.script, SCRIPTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--script: expected one of {', '.join(SCRIPTS)}, got {self.script}{hint}")
        if self.script != "train_disaggregated" and (self.rollout_nodes or self.teacher_nodes):
            raise ConfigError(
                f"--rollout-nodes, --teacher-nodes: expected --script train_disaggregated, got --script {self.script}"
            )
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
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs per node; 0: none. Default: what slurm/site.sh says, or 8.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each GPU, for the check.")] = 80.0,
    script: Annotated[str, typer.Option(help="train or train_disaggregated.")] = "train",
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
    if script == "sweep":
        raise ConfigError("--script: expected train or train_disaggregated; a sweep is `megatron-tip sweep --submit`")
    config = configured_run(config_path, overrides)
    submission = Submission(
        config_path,
        overrides or [],
        nodes=nodes,
        script=script,
        options=sbatch or [],
        rollout_nodes=rollout_nodes,
        teacher_nodes=teacher_nodes,
        gpus_per_node=gpus_per_node,
    )
    hosts = hosts_of(submission)
    check_elsewhere(as_served(config, submission), hosts, gpu_memory)
    gpus = f"{len(hosts.gpus)} GPUs" if hosts.gpus else "no GPUs"
    typer.echo(f"asks SLURM for {nodes} nodes with {gpus} each", err=True)
    typer.echo(submit(submission, config, dry_run=dry_run))


def sbatch_command(submission: Submission, config: Config) -> list[str]:
    """Returns the sbatch command: site values, job name and log from the run, then the script and its arguments.

    Raises:
        ConfigError: the script does not exist next to the package, or the time limit leaves no time for a step.
    """
    script = _ROOT / "slurm" / f"{submission.script}.sbatch"
    if not script.exists():
        raise ConfigError(
            f"--script: expected the repository's slurm/ next to the package, found no {script}; install the package "
            "from a clone: pip install --editable ."
        )
    site, gpus = site_values(submission.environ), len(hosts_of(submission).gpus)
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
        "--export": ",".join(["ALL", f"TIP_ROOT={_ROOT}", f"TIP_GPUS_PER_NODE={gpus}", *_split(submission)]),
    }
    named = [f"{name}={value}" for name, value in options.items() if value]
    if gpus and site["TIP_GPU_REQUEST"]:
        named.append(f"{site['TIP_GPU_REQUEST']}{gpus}")
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
        *("TIP_GPUS_PER_NODE", "TIP_GPU_REQUEST", "TIP_SGLANG_PORT"),
    )
    site = environ.get("MEGATRON_TIP_SITE") or str(_ROOT / "slurm" / "site.sh")
    script = 'set -e; source "$0"; for name in "$@"; do printf "%s\\0" "${!name}"; done'
    read = subprocess.run(
        ["bash", "-c", script, site, *names], env=dict(environ), capture_output=True, text=True, check=False
    )
    if read.returncode:
        raise ConfigError(f"{site}: expected a file of shell variables, got: {read.stderr.strip()}")
    return dict(zip(names, read.stdout.split("\0"), strict=False))


def hosts_of(submission: Submission) -> Hosts:
    """Returns the nodes that the job will have.

    Raises:
        ConfigError: slurm/site.sh has a value that is not a number.
    """
    site = site_values(submission.environ)
    try:
        gpus = submission.gpus_per_node
        gpus = int(site["TIP_GPUS_PER_NODE"] or 8) if gpus is None else gpus
        workers, port = int(site["TIP_TASKS_PER_NODE"] or gpus or 1), int(site["TIP_SGLANG_PORT"])
    except ValueError as error:
        raise ConfigError(
            f"slurm/site.sh: expected numbers in TIP_GPUS_PER_NODE, TIP_TASKS_PER_NODE and TIP_SGLANG_PORT: {error}"
        ) from None
    return Hosts(
        submission.trainer_nodes * workers,
        workers,
        tuple(range(gpus)),
        rollout_nodes=submission.rollout_nodes,
        teacher_nodes=submission.teacher_nodes,
        first_port=port,
        by_job=True,
    )


def as_served(config: Config, submission: Submission) -> Config:
    """Returns the configuration to check: as the script will run it, with the servers on nodes of their own.

    Raises:
        ConfigError: servers cannot replace the configured engine or teacher.
    """
    if submission.script != "train_disaggregated":
        return config
    urls = ("http://started-by-the-script:1",)
    sections = config.model_dump()
    sections["rollout"] |= {"engine": "sglang", "server_urls": urls}
    if submission.teacher_nodes:
        sections["teacher"] |= {"kind": "sglang", "urls": urls}
    try:
        return Config.model_validate(sections)
    except ValueError as error:
        raise ConfigError(
            f"rollout: expected settings that suit the servers that slurm/{submission.script}.sbatch starts: {error}"
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
