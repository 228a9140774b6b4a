"""The command `megatron-tip`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperCommand

from megatron_tip import __version__
from megatron_tip.commands.diagnose import diagnose
from megatron_tip.commands.outcome import errors_reported as _errors_reported
from megatron_tip.commands.outcome import fail as _fail
from megatron_tip.config import Config
from megatron_tip.config.io import dump_config, load_config, reference
from megatron_tip.cpu.lean_imports import lean_imports
from megatron_tip.errors import InputError
from megatron_tip.observability.logs import configure_logging
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.parallel.environment import is_restarted, is_worker
from megatron_tip.parallel.launch import run_worker, start_workers
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.same_run import check_same_run

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(diagnose, name="diagnose")


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Token-selective on-policy distillation on Megatron-Core."""
    if show_version:
        typer.echo(f"megatron-tip {__version__}")
        raise typer.Exit


class _TrainCommand(TyperCommand):
    """Its help ends with the reference of the configuration."""

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write("\n" + reference())


@app.command(cls=_TrainCommand)
def train(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run; its keys are listed below.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Workers to start on this machine. Default: one a GPU; without a GPU the fewest that hold both "
            "models. Ignored where torchrun or srun already started the workers.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Remove the unfinished run in run.folder and start anew; without it the run is continued. Ignored "
            "where SLURM or torchrun starts the same job again.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved configuration, stop.")] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --dry-run: check for so many GPUs elsewhere; needs neither weights nor prompts."
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="With --world-size: GiB of each of those GPUs.")] = 80.0,
) -> None:
    """Distil a teacher into a student.

    Starts the workers on this machine, or joins them where torchrun or srun already did. An unfinished run in
    run.folder is continued from its newest checkpoint.

    Exit codes: 0 the run is finished; 2 the input is refused; 128 + n the command was ended by signal n; 75 a worker
    was told to stop and has saved (a second signal: 128 + n, nothing saved); 1 any other error. Whatever the code, the
    same command continues the run from its newest checkpoint.
    """
    with _errors_reported():
        config = load_config(config_path, overrides or [])
        joins = is_worker(os.environ) and not dry_run
        if joins:
            if is_restarted(os.environ) and RunFolder(config.run.folder).summary.exists():
                sys.stderr.write(f"{config.run.folder} holds the finished run of this job: nothing is left to do\n")
                return
            run_worker(lambda: _train(config, fresh=fresh and not is_restarted(os.environ)), threads=config.run.threads)
            return
        if dry_run and world_size:
            _dry_run(config, world_size, gpu_memory)
            return
        num_workers = nproc or _default_num_workers(config)
        _check(config, num_workers, fresh=fresh)
        if dry_run:
            typer.echo(dump_config(config), nl=False)
            return
        files = CheckpointFiles(RunFolder.create(config.run.folder).checkpoints)
        command = [sys.executable, "-m", "megatron_tip.cli", "train", str(config_path), *(overrides or [])]
        outcome = start_workers(
            command + ["--fresh"] * fresh,
            num_workers,
            threads=config.run.threads,
            grace_seconds=config.fault.grace_seconds,
            is_saved=lambda: bool(files.steps()),
        )
    if outcome.exit_code:
        screen = Console(stderr=True)
        if screen.is_terminal:  # a worker that was ended over its progress bar left the cursor hidden behind it
            screen.show_cursor()
            screen.line()
        _fail(outcome.message, exit_code=outcome.exit_code)


@app.command()
def submit(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run, as for train.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Workers a node; slurm/site.sh may say it too.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each GPU, for the check.")] = 80.0,
    script: Annotated[str, typer.Option(help="train, train_disaggregated or sweep.")] = "train",
    rollout_nodes: Annotated[int, typer.Option(min=0, help="Of all nodes, those of SGLang; train_disaggregated.")] = 0,
    teacher_nodes: Annotated[int, typer.Option(min=0, help="Of all nodes, those of the teacher's servers.")] = 0,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="An option of sbatch, as --sbatch=--qos=high; repeats.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, stop.")] = False,
) -> None:
    """Check a configuration for so many nodes and submit it to SLURM.

    Site values are those of slurm/site.sh, options of the command line win.
    """
    from megatron_tip.commands.submit import Submission, as_served, site_values, trainer_share
    from megatron_tip.commands.submit import submit as submit_job

    with _errors_reported():
        config = load_config(config_path, overrides or [])
        site = site_values(os.environ)
        tasks = int(site["TIP_TASKS_PER_NODE"] or gpus_per_node)
        submission = Submission(
            config_path,
            overrides or [],
            nodes=nodes,
            script=script,
            options=sbatch or [],
            rollout_nodes=rollout_nodes,
            teacher_nodes=teacher_nodes,
        )
        memory = gpu_memory * (trainer_share(site) if script == "train" else 1.0)
        served = as_served(config, site, script)
        _dry_run(served, submission.trainer_nodes * tasks, memory, shows_config=False)
        typer.echo(submit_job(submission, config, dry_run=dry_run))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of one to six runs, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; default: report.html in the run's folder, of several here."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(min=0.0, help="Thin what the token inspector shows to that size.")
    ] = 10,
) -> None:
    """Write one HTML file about runs, side by side: curves, quadrants, time and memory, samples, every token.

    It opens from the disk and loads nothing.
    """
    from megatron_tip.report.page import write_report_page

    with _errors_reported():
        target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        num_bytes = write_report_page(runs, target, max_bytes=round(max_megabytes * 1e6))
        typer.echo(f"{target}: {num_bytes / 1e6:.1f} MB")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run; eval.jsonl there takes the results.")],
    benchmarks: Annotated[
        str, typer.Option(help="Of gsm8k, math500, aime24, aime25, gpqa_diamond, humaneval, ifeval, with commas.")
    ] = "gsm8k,math500,aime24,aime25,gpqa_diamond,ifeval",
    seeds: Annotated[
        int, typer.Option(min=1, help="So many, from 1 on; mean and standard deviation are over them.")
    ] = 5,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory, such as the teacher; default: hf/ of the run.")
    ] = None,
    url: Annotated[str, typer.Option(help="A running OpenAI-compatible server instead, as http://host:30000/v1.")] = "",
    model_name: Annotated[str, typer.Option(help="With --url: what the server calls the model.")] = "default",
    label: Annotated[
        str, typer.Option(help="The model's name in the results; default: student, or its folder's.")
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="A folder of questions, NAME.jsonl or .parquet; default: hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions; for a try, no result.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the preset's 0.6; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the preset's 0.95.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: the preset's.")] = None,
    backend: Annotated[str, typer.Option(help="lm-eval or evalscope.")] = "lm-eval",
    python: Annotated[
        str,
        typer.Option(envvar="MEGATRON_TIP_EVAL_PYTHON", help="Interpreter that has the backend; default: this one."),
    ] = "",
    device: Annotated[str, typer.Option(help="Of lm-eval with a directory: cuda:0, cpu; default: it chooses.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once, of a directory.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at once, of a server.")] = 32,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="humaneval: run what the model writes, under limits.")
    ] = False,
) -> None:
    """Evaluate a run's student on benchmarks: several seeds, mean and standard deviation.

    The protocol of each benchmark is in docs/evaluation.md.
    """
    from megatron_tip.evaluation.benchmarks import Request, run_benchmarks
    from megatron_tip.evaluation.harness import Model
    from megatron_tip.evaluation.presets import load_presets
    from megatron_tip.evaluation.results import model_folder, table

    with _errors_reported():
        configure_logging(0)
        if backend not in ("lm-eval", "evalscope"):
            raise InputError(f"backend: expected lm-eval or evalscope, got {backend!r}")
        names = [name.strip() for name in benchmarks.split(",") if name.strip()]
        presets = load_presets(names, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        path = None if url else model_folder(run, model)
        request = Request(
            Model(path, url, model_name, device, batch_size, concurrency),
            label=label or (model.resolve().name if model else model_name if url else "student"),
            presets=presets,
            seeds=range(1, seeds + 1),
            backend=backend,
            python=python or sys.executable,
            data=data,
            limit=limit,
            allow_code_execution=allow_code_execution,
        )
        typer.echo(table(run_benchmarks(request, run)))


@app.command()
def doctor(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="A run to examine for.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Check the run for so many GPUs elsewhere; weights may be missing here.")
    ] = None,
) -> None:
    """Say what is installed, what a run would use here, and what is missing, with the command that mends it.

    Exit code 1 if something is missing that the run cannot do without.
    """
    from megatron_tip.commands.doctor import examine

    with _errors_reported():
        config = load_config(config_path, overrides or []) if config_path else None
        findings = examine(config, world_size=world_size)
        typer.echo("\n".join(finding.line() for finding in findings))
        if any(finding.state == "missing" for finding in findings):
            raise SystemExit(1)


def _dry_run(config: Config, world_size: int, gpu_memory: float, *, shows_config: bool = True) -> None:
    from megatron_tip.planning.dry_run import dry_run  # imports torch and transformers, not Megatron

    sys.stderr.write(dry_run(config, world_size, gpu_memory_gib=gpu_memory).report(gpu_memory) + "\n")
    if shows_config:
        typer.echo(dump_config(config), nl=False)


def _check(config: Config, num_workers: int, *, fresh: bool) -> None:
    from megatron_tip.planning.plan import plan_run  # imports torch and transformers, not Megatron

    plan = plan_run(config, num_workers)
    if config.diagnostics.every_steps:
        from megatron_tip.diagnostics.session import open_bank  # imports Megatron

        open_bank(config, plan)
    if not fresh:
        check_same_run(config)


def _train(config: Config, *, fresh: bool) -> None:
    configure_logging(int(os.environ["RANK"]))
    with lean_imports():
        from megatron_tip.training.loop import train as train_loop  # imports torch and Megatron: in the workers alone

    make_gauge = None
    if config.diagnostics.every_steps:
        from megatron_tip.diagnostics.gauge import make_gauge
    train_loop(config, fresh=fresh, make_gauge=make_gauge)


def _default_num_workers(config: Config) -> int:
    from megatron_tip.planning.plan import default_num_workers  # a wrong key is reported before torch's seconds

    return default_num_workers(config)


if __name__ == "__main__":
    main()
