"""`megatron-tip doctor`: what is installed here, what a run would use, what is missing and how to fix it."""

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_tip import __version__
from megatron_tip.commands.finding import Finding
from megatron_tip.commands.network import address_findings, gpu_findings, network_findings, server_findings
from megatron_tip.commands.outcome import errors_reported
from megatron_tip.commands.run_command import Overrides, configured_run
from megatron_tip.config import Config
from megatron_tip.errors import ConfigError, MegatronTipError
from megatron_tip.machine import untested_megatron
from megatron_tip.placement.hosts import Hosts, hosts_elsewhere

_MINIMUM_FREE_BYTES = 20 * 2**30


@errors_reported()
def command(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The run to check for.")] = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Check the run for this many GPUs elsewhere, and nothing of this machine."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="With --world-size: of each node; 0: no GPUs.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="With --world-size: GiB of each of those GPUs.")] = 80.0,
) -> None:
    """Prints what is installed, what a run would use here, and what is missing, with the command that fixes it.

    With --world-size: what the run would use on such a cluster, and what its nodes need. The last line says whether
    something is missing that the run cannot do without; the exit code is then 1.
    """
    config = configured_run(config_path, overrides) if config_path else None
    if world_size is not None:
        if config is None:
            raise ConfigError("--world-size: expected a configuration to check for other machines, got none")
        findings = examine_elsewhere(config, hosts_elsewhere(world_size, gpus_per_node), gpu_memory)
    else:
        findings = examine(config)
    typer.echo("\n".join(finding.line() for finding in findings))
    num_missing = sum(finding.state == "missing" for finding in findings)
    if num_missing:
        typer.echo(f"not ready: {num_missing} missing, marked above")
        raise SystemExit(1)
    typer.echo(f"ready: {'this run' if config else 'a run'} lacks nothing {'there' if world_size else 'here'}")


def examine_elsewhere(config: Config, hosts: Hosts, gpu_memory_gib: float) -> list[Finding]:
    """Returns what a run would use on `hosts`, and what their nodes need; nothing about this machine."""
    from megatron_tip.planning.dry_run import dry_run

    findings: list[Finding] = []
    try:
        result = dry_run(config, hosts, gpu_memory_gib=gpu_memory_gib)
        lines = result.lines()
        noted = [line for line in lines if line.startswith("not checked here")]
        facts = [line for line in lines if line not in noted]
        findings += [Finding("ok", "\n".join(facts)), *(Finding("note", line) for line in noted)]
        result.require_memory()
    except MegatronTipError as error:
        return [*findings, Finding("missing", f"the configuration cannot run there: {error}", "see the message")]
    findings += [
        Finding("note", f"each node needs {package.distribution}: {package.use}", package.remedy)
        for package in _PACKAGES
        if package.needed(config)
    ]
    return findings


def examine(config: Config | None) -> list[Finding]:
    """Returns all findings; a configuration decides what is needed, and is checked as by `train --dry-run`."""
    findings = [Finding("ok", f"megatron_tip {__version__}, Python {sys.version.split()[0]}")]
    for look in (_torch, _packages, _slurm, _machine):
        findings += look(config)
    findings += [*gpu_findings(), *address_findings(socket.gethostname()), *network_findings(os.environ)]
    if config is not None:
        findings += [*_run(config), *server_findings(config, os.environ)]
    return findings


def _torch(config: Config | None) -> Iterator[Finding]:
    import torch
    from torch.cuda import nccl

    yield Finding("ok", f"torch {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}")
    if untested := untested_megatron():
        yield Finding("note", untested, "install one of those, or run tests/distributed with yours")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built} but finds no GPU or driver (nvidia-smi)" if built else "torch's CPU build"
        )
        yield Finding("note", f"no GPU: {why}; runs on the CPU over gloo, for development")
        return
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    yield Finding("ok", f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if torch.distributed.is_nccl_available():
        yield Finding("ok", f"NCCL {'.'.join(map(str, nccl.version()))}")
    else:
        yield Finding("missing", "NCCL: this build of torch has none", "install torch's CUDA build for Linux")


@dataclass(frozen=True)
class _Package:
    """An optional package. `needed`: whether a configuration requires it."""

    distribution: str
    module: str
    use: str
    remedy: str
    needed: Callable[[Config], bool] = lambda config: False


def _extra(name: str, *options: str) -> str:
    return " ".join(["pip install", *options, f'"megatron_tip[{name}]"'])


_PACKAGES = (
    _Package(
        "transformer-engine",
        "transformer_engine",
        "faster layers on GPUs; without it, torch's own",
        _extra("transformer-engine", "--no-build-isolation"),  # it is built against the torch that is installed
        lambda config: "transformer_engine" in (config.model.transformer_impl, config.teacher.transformer_impl),
    ),
    _Package(
        "apex",
        "apex",
        "Megatron's fused optimizer and gradient kernels on GPUs; without it, torch's own",
        "build NVIDIA/apex from source: no package index has it under that name",
    ),
    _Package(
        "flash-attn", "flash_attn", "an attention kernel that Transformer Engine can use", "pip install flash-attn"
    ),
    _Package(
        "sglang",
        "sglang",
        "rollouts from servers",
        _extra("sglang"),
        lambda config: config.rollout.engine == "sglang" and not config.rollout.server_urls,
    ),
    _Package(
        "wandb", "wandb", "Weights & Biases", _extra("tracking"), lambda config: config.tracking.wandb != "disabled"
    ),
    _Package(
        "tensorboardX",
        "tensorboardX",
        "TensorBoard's event files",
        _extra("tracking"),
        lambda config: config.tracking.tensorboard,
    ),
    _Package("nvidia-ml-py", "pynvml", "GPU metrics", _extra("monitoring")),
    _Package(
        "reasoning-gym",
        "reasoning_gym",
        "generated prompts",
        _extra("tasks"),
        lambda config: config.prompts.source == "reasoning_gym",
    ),
)


def _packages(config: Config | None) -> Iterator[Finding]:
    for package in _PACKAGES:
        if importlib.util.find_spec(package.module) is not None:
            yield Finding("ok", f"{package.distribution} {_version(package.distribution)}: {package.use}")
            continue
        needed = config is not None and package.needed(config)
        text = f"{package.distribution} is not installed: {package.use}"
        yield Finding("missing" if needed else "note", text, package.remedy)
    if config is not None and config.tracking.wandb == "online" and not _has_wandb_key():
        text = 'W&B: tracking.wandb = "online" but no login found here; the run would stay offline'
        yield Finding("missing", text, "wandb login, or export WANDB_API_KEY in the job, or tracking.wandb=offline")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    in_netrc = netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    return bool(os.environ.get("WANDB_API_KEY")) or in_netrc


def _slurm(config: Config | None) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("note", "SLURM is not installed here: megatron-tip submit needs it", "run submit on a login node")
        return
    try:
        command = ["sinfo", "--noheader", "--format=%P %a %D nodes %t"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        why = _reason_of(error)
        yield Finding("note", f"SLURM is installed but does not answer: {why}", "scontrol ping; see slurmctld's log")
        return
    yield Finding("ok", "SLURM: " + "; ".join(shown.split("\n")[:6]).strip("; "))


def _reason_of(error: OSError | subprocess.SubprocessError) -> str:
    """Returns why sinfo failed: the last line of its standard error if it wrote any."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"sinfo did not answer within {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr.strip().splitlines() or [f"sinfo exited with code {error.returncode}"])[-1]
    return str(error)


def _machine(config: Config | None) -> Iterator[Finding]:
    folder = config.run.folder if config is not None else Path.cwd()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"disk: {free / 2**30:.0f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        yield Finding("missing", f"disk: {existing} is not writable", "choose another run.folder")
    elif free < _MINIMUM_FREE_BYTES:
        yield Finding("note", text, "free some space: a checkpoint takes 14 bytes per parameter, and several are kept")
    else:
        yield Finding("ok", text)
    port = os.environ.get("MASTER_PORT", "0")
    try:
        with socket.create_server(("127.0.0.1", int(port))):
            yield Finding("ok", f"ports: {'MASTER_PORT ' + port if port != '0' else 'a free one can be'} bound")
    except (OSError, ValueError) as error:
        yield Finding("missing", f"ports: MASTER_PORT = {port} cannot be bound: {error}", "unset MASTER_PORT")


def _run(config: Config) -> Iterator[Finding]:
    """Yields what the configuration would use here, and whether it can run."""
    from megatron_tip.machine import Machine
    from megatron_tip.models.gpt import resolve_transformer_impl
    from megatron_tip.placement.table import table_of
    from megatron_tip.planning.dtypes import Dtypes
    from megatron_tip.planning.inputs import default_num_workers
    from megatron_tip.planning.plan import outline_run

    num_workers = default_num_workers(config)
    student = Dtypes.of(config).student
    dtype = str(student).removeprefix("torch.")
    layers = resolve_transformer_impl(config.model.transformer_impl, student)
    yield Finding(
        "ok", f"the run would use: {num_workers} workers, {dtype}, {layers} layers, {config.rollout.engine} engine"
    )
    try:
        outline = outline_run(config, num_workers, Machine())
        yield Finding("ok", f"layouts: {outline.grids_in_words()}")
        yield from _context_parallelism(config)
        yield from (Finding("ok", f"placement: {line}") for line in table_of(outline.placement))
        yield Finding("ok", "the configuration can run")
    except MegatronTipError as error:
        yield Finding("missing", f"the configuration cannot run: {error}", "see the message; megatron-tip train --help")


def _context_parallelism(config: Config) -> Iterator[Finding]:
    """Yields a note for each model whose sequences are shared by GPUs without Transformer Engine's attention."""
    import torch

    from megatron_tip.models.gpt import resolve_transformer_impl
    from megatron_tip.planning.dtypes import Dtypes

    dtypes = Dtypes.of(config)
    for section, model, dtype in (("model", config.model, dtypes.student), ("teacher", config.teacher, dtypes.teacher)):
        layers = resolve_transformer_impl(model.transformer_impl, dtype)
        if model.context_parallel_size > 1 and layers == "local" and torch.cuda.is_available():
            yield Finding(
                "note",
                f"{section}.context_parallel_size: local layers gather the keys and values of whole sequences in every "
                "layer; Transformer Engine sends them round in a ring",
                _extra("transformer-engine", "--no-build-isolation"),
            )
