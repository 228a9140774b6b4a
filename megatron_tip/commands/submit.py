"""`megatron-tip submit`: the check and the SLURM submission of a configuration."""

import difflib
import os
import re
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
_TWO_WORDS = re.compile(r"--?[\w-]+\s")
_CHECKED = {"--nodes": "--nodes N", "-N": "--nodes N", "--gpus-per-node": "--gpus-per-node N"}
"""Options of sbatch that have a place of their own in `submit`."""


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
    checked = check_elsewhere(as_served(config, submission), hosts, gpu_memory)
    if not dry_run:
        require_files(checked.absent)
    typer.echo(f"asks SLURM for {_asked(nodes, len(hosts.gpus))}", err=True)
    typer.echo(submit(submission, config, dry_run=dry_run))


def require_files(absent: Sequence[Path]) -> None:
    """Raises ConfigError if `absent`, what a run reads and this machine lacks, is not empty: a path may be misspelt."""
    if absent:
        raise ConfigError(
            f"files: expected what the run reads on the machine that submits it, found no {absent[0]}; mend the path, "
            "or if only the nodes have it, run the command that --dry-run prints"
        )


def _asked(nodes: int, gpus: int) -> str:
    every = f"{gpus} GPUs" if gpus else "no GPUs"
    return f"one node with {every} (--nodes N for more)" if nodes == 1 else f"{nodes} nodes with {every} each"


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
    given = _words(submission.options)
    check_time_limit(site["TIP_TIME"], given)
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
    return ["sbatch", *named, *given, str(script), *arguments]


def _words(options: Sequence[str]) -> list[str]:
    """Returns sbatch's options as it reads them: "-p gpu" is two words.

    Raises:
        ConfigError: one asks for other nodes or GPUs than those that were checked.
    """
    words = [
        word for option in options for word in (option.split(maxsplit=1) if _TWO_WORDS.match(option) else [option])
    ]
    for word in words:
        for name, ours in _CHECKED.items():
            if word == name or word.startswith(f"{name}=" if name.startswith("--") else name):
                raise ConfigError(f"--sbatch={word}: expected {ours}, by which the run is checked as well")
    return words


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
    command, logs = sbatch_command(submission, config), config.run.folder.absolute() / "slurm"
    by_hand = f"{shlex.join(['mkdir', '-p', str(logs)])} && {shlex.join(command)}"  # SLURM makes no folder for its log
    if dry_run:
        return by_hand
    if shutil.which("sbatch") is None:
        raise ConfigError(f"sbatch: expected SLURM on this machine, found none; where it is installed, run: {by_hand}")
    logs.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run(command, env=dict(submission.environ), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ConfigError(f"sbatch: {ended.stderr.strip()}\n  {shlex.join(command)}")
    return f"{ended.stdout.strip()}\nlog: {config.run.folder / 'slurm'}"
