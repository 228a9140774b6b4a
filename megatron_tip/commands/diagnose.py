"""`megatron-tip diagnose`: the fixed-context diagnostic as commands. torch is imported late, in the workers."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_tip.commands.outcome import end_as, errors_reported
from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import InputError
from megatron_tip.observability.logs import configure_logging
from megatron_tip.parallel.environment import is_worker
from megatron_tip.parallel.launch import run_worker, start_workers

diagnose = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="As for train; [diagnostics] names the bank.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="section.key=value")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Workers to start on this machine, as for train.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights of the student: a Hugging Face directory, a Megatron checkpoint of any layout, a step of "
        "checkpoints/, or a run's folder. Default: model.path, as a run would begin."
    ),
]


@diagnose.callback()
def _root() -> None:
    """Freeze on-policy contexts, score checkpoints on them, and see which tokens teach the student."""


@diagnose.command()
@errors_reported()
def bank(config_path: ConfigPath, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Make a context bank in diagnostics.bank: from diagnostics.rollouts, or from the student's answers to prompts."""
    config = load_config(config_path, overrides or [])
    if config.diagnostics.rollouts is not None:  # files alone: one process does it
        if os.environ.get("RANK", "0") == "0":
            _say_bank(_bank_of_rollouts(config, config.diagnostics.rollouts))
        return

    def work(plan) -> None:
        from megatron_tip.diagnostics.freeze import bank_config, generated_bank
        from megatron_tip.diagnostics.session import bank_folder, built_run

        with built_run(bank_config(config), plan, generates=True) as run, closing(run):
            made = generated_bank(run, plan, bank_folder(config))
            if made is not None:
                _say_bank(made)

    prepare = partial(_plan_new_bank, config)
    _in_workers(["bank", str(config_path), *(overrides or [])], config, prepare, work, nproc)


@diagnose.command()
@errors_reported()
def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    name: Annotated[str, typer.Option(help="Of the scores: scores/NAME.parquet in the bank.")] = "start",
    nproc: Nproc = None,
) -> None:
    """Score a checkpoint on every position of the bank; the bank's scores/NAME.parquet is replaced."""
    from megatron_tip.diagnostics.bank import check_scores_name

    config = load_config(config_path, overrides or [])
    check_scores_name(name)
    if checkpoint and name == "start":
        raise InputError('--name: expected another name than "start" with --checkpoint: gains are taken against it')

    def work(subject) -> None:
        from megatron_tip.diagnostics.intervene import score_checkpoint
        from megatron_tip.diagnostics.session import built_run

        with built_run(config, subject.plan, checkpoint=subject.checkpoint) as run:
            score_checkpoint(run, subject, name, is_start=checkpoint is None)

    options = ["--name", name, *(["--checkpoint", str(checkpoint)] if checkpoint else [])]
    prepare = partial(_examine, config, checkpoint=checkpoint)
    _in_workers(["score", str(config_path), *(overrides or []), *options], config, prepare, work, nproc)


@diagnose.command()
@errors_reported()
def gain(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    before: Annotated[str, typer.Argument(help="Name of the scores before, as `start`.")],
    after: Annotated[str, typer.Argument(help="Name of the scores after.")],
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over prompts.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 1,
) -> None:
    """Print the gain between two checkpoints that were scored on a bank, absolute and relative."""
    from megatron_tip.diagnostics.papers.evidence import Evidence
    from megatron_tip.diagnostics.papers.token_tables import gain_row

    found = Evidence.read(bank, start=before, after=[after], arms=None, resamples=resamples, seed=seed)
    _say_caveats(found.caveats())
    row = gain_row(found.gains[after], resamples=resamples, seed=seed)
    typer.echo(
        f"{before} -> {after}: gain {row['gain']:+.5f} nats a token (95 % over prompts: {row['low']:+.5f} to "
        f"{row['high']:+.5f}), {row['relative']:+.2%} of {row['kl_before']:.5f}, over {row['tokens']} tokens"
    )


@diagnose.command()
@errors_reported()
def intervene(
    config_path: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    nproc: Nproc = None,
) -> None:
    """Train with every rule from one start at the same budgets and measure the gain on held-out contexts of the bank.

    Arms take training.steps steps of rollout.prompts_per_step contexts and are measured on heldout.num_prompts others;
    they are written to run.folder as they end, and the same command continues after the last one.
    """
    config = load_config(config_path, overrides or [])

    def work(subject) -> None:
        from megatron_tip.diagnostics.arms import ArmsFile
        from megatron_tip.diagnostics.intervene import intervene as run_arms
        from megatron_tip.diagnostics.session import built_run

        with built_run(config, subject.plan, checkpoint=subject.checkpoint) as run:
            run_arms(run, subject, ArmsFile(config.run.folder))

    options = ["--checkpoint", str(checkpoint)] if checkpoint else []
    prepare = partial(_examine_arms, config, checkpoint=checkpoint)
    _in_workers(["intervene", str(config_path), *(overrides or []), *options], config, prepare, work, nproc)


@diagnose.command()
@errors_reported()
def report(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    folder: Annotated[Path, typer.Option("--out", help="Where tables (CSV) and figures (PNG, CSV) go.")],
    start: Annotated[str, typer.Option(help="Name of the scores before.")] = "start",
    after: Annotated[list[str] | None, typer.Option(help="Name of scores after; repeats. Default: all others.")] = None,
    arms: Annotated[Path | None, typer.Option(help="run.folder of `diagnose intervene`.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page of Markdown whose markers are filled.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over prompts.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 1,
) -> None:
    """Write the papers' tables and figures of a bank."""
    from megatron_tip.diagnostics.papers.evidence import Evidence
    from megatron_tip.diagnostics.papers.write import fill_page, page_blocks, write_all

    found = Evidence.read(bank, start=start, after=after or [], arms=arms, resamples=resamples, seed=seed)
    _say_caveats(found.caveats())
    tables = write_all(found, folder)
    if page is not None:
        fill_page(page, page_blocks(found, tables), folder)
    typer.echo(f"{folder}: {len(tables)} tables, {len(list(folder.glob('*.png')))} figures")


def _in_workers(
    arguments: Sequence[str],
    config: Config,
    prepare: Callable[[int], Any],
    work: Callable[[Any], None],
    nproc: int | None,
) -> None:
    """Runs `work` in each worker: joins a world that exists, or starts one on this machine.

    Args:
        prepare: checks, from files alone, what a world of so many workers needs and returns what `work` takes. Every
            worker does so before its first collective, however it was started; our own launcher also before it starts
            any.
    """

    def in_worker() -> None:
        configure_logging(int(os.environ["RANK"]))
        work(prepare(int(os.environ["WORLD_SIZE"])))

    if is_worker(os.environ):
        run_worker(in_worker, threads=config.run.threads)
        return
    from megatron_tip.planning.inputs import default_num_workers

    num_workers = nproc or default_num_workers(config)
    prepare(num_workers)
    command = [sys.executable, "-m", "megatron_tip.cli", "diagnose", *arguments]
    end_as(start_workers(command, num_workers, threads=config.run.threads))


def _plan_new_bank(config: Config, num_workers: int):
    from megatron_tip.diagnostics.freeze import bank_config
    from megatron_tip.diagnostics.session import bank_folder
    from megatron_tip.files import require_new
    from megatron_tip.planning.plan import plan_run

    require_new(bank_folder(config))
    return plan_run(bank_config(config), num_workers)


def _examine(config: Config, num_workers: int, *, checkpoint: Path | None):
    from megatron_tip.diagnostics.session import examine

    return examine(config, num_workers, checkpoint=checkpoint)


def _examine_arms(config: Config, num_workers: int, *, checkpoint: Path | None):
    from megatron_tip.diagnostics.arms import ArmsFile
    from megatron_tip.diagnostics.intervene import check_arms

    subject = _examine(config, num_workers, checkpoint=checkpoint)
    check_arms(config, subject, ArmsFile(config.run.folder))
    return subject


def _bank_of_rollouts(config: Config, rollouts: Path):
    from megatron_tip.diagnostics.freeze import bank_of_rollouts
    from megatron_tip.diagnostics.session import bank_folder
    from megatron_tip.files import require_new
    from megatron_tip.planning.inputs import default_num_workers
    from megatron_tip.planning.plan import plan_run

    require_new(bank_folder(config))
    return bank_of_rollouts(config, plan_run(config, default_num_workers(config)), bank_folder(config), rollouts)


def _say_bank(made) -> None:
    manifest = made.manifest
    typer.echo(
        f"{made.folder}: {manifest['num_contexts']} contexts of {int(made.prompts.max()) + 1} prompts, "
        f"{manifest['num_tokens']} tokens"
    )


def _say_caveats(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        typer.echo(f"mind: {sentence}", err=True)
