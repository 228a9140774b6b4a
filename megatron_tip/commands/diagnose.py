"""`megatron-tip diagnose`: the commands of the fixed-context diagnostic. torch is imported late."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_tip.commands.outcome import end_as, errors_reported
from megatron_tip.commands.run_command import Overrides, RunCommand, configured_run
from megatron_tip.config import Config
from megatron_tip.errors import InputError
from megatron_tip.observability.logs import configure_logging
from megatron_tip.parallel.environment import is_worker
from megatron_tip.parallel.launch import run_worker, start_workers

logger = logging.getLogger(__name__)

diagnose = typer.Typer(
    help="Freeze on-policy contexts, score checkpoints on them, and see which tokens teach the student.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="As for train; [diagnostics] names the bank.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Workers to start on this machine, as for train.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="The student's weights: a Hugging Face directory, a Megatron checkpoint of any layout, a step in "
        "checkpoints/, or a run's folder. Default: model.path, as at the start of a run."
    ),
]

Resamples = Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap over prompts.")]
Seed = Annotated[int, typer.Option(help="Seed of the bootstrap.")]


@diagnose.command(cls=RunCommand)
@errors_reported()
def bank(config_path: ConfigPath, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Creates the context bank diagnostics.bank from diagnostics.rollouts or from new answers of the student."""
    config = configured_run(config_path, overrides)
    if config.diagnostics.rollouts is not None:  # only reads files: one process is enough
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


@diagnose.command(cls=RunCommand)
@errors_reported()
def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    name: Annotated[str, typer.Option(help="Name of the scores: scores/NAME.parquet in the bank.")] = "start",
    nproc: Nproc = None,
) -> None:
    """Scores a checkpoint on every position of the bank; replaces scores/NAME.parquet in the bank."""
    from megatron_tip.diagnostics.bank import check_scores_name

    config = configured_run(config_path, overrides)
    check_scores_name(name)
    if checkpoint and name == "start":
        raise InputError('--name: expected a name other than "start" with --checkpoint: gains are relative to "start"')

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
    before: Annotated[str, typer.Argument(help="Name of the scores before, for example `start`.")],
    after: Annotated[str, typer.Argument(help="Name of the scores after.")],
    resamples: Resamples = 1000,
    seed: Seed = 1,
) -> None:
    """Prints the absolute and relative gain between two checkpoints that were scored on a bank."""
    from megatron_tip.diagnostics.papers.evidence import Evidence
    from megatron_tip.diagnostics.papers.token_tables import gain_row

    found = Evidence.read(bank, start=before, after=[after], arms=None, resamples=resamples, seed=seed)
    _say_caveats(found.caveats())
    row = gain_row(found.gains[after], resamples=resamples, seed=seed)
    typer.echo(
        f"{before} -> {after}: gain {row['gain']:+.5f} nats per token (95 % over prompts: {row['low']:+.5f} to "
        f"{row['high']:+.5f}), {row['relative']:+.2%} of {row['kl_before']:.5f}, over {row['tokens']} tokens"
    )


@diagnose.command(cls=RunCommand)
@errors_reported()
def intervene(
    config_path: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    nproc: Nproc = None,
) -> None:
    """Trains with every rule from the same start and budgets, and measures the gain on held-out contexts of the bank.

    Each arm takes training.steps steps of rollout.prompts_per_step contexts and is measured on heldout.num_prompts
    others. Finished arms are written to run.folder; the same command continues after the last one.
    """
    config = configured_run(config_path, overrides)

    def work(subject) -> None:
        from megatron_tip.diagnostics.arms import ArmsFile
        from megatron_tip.diagnostics.intervene import intervene as run_arms
        from megatron_tip.diagnostics.session import built_run

        _log_memory(config, subject)
        with built_run(config, subject.plan, checkpoint=subject.checkpoint) as run:
            run_arms(run, subject, ArmsFile(config.run.folder))

    options = ["--checkpoint", str(checkpoint)] if checkpoint else []
    prepare = partial(_examine_arms, config, checkpoint=checkpoint)
    _in_workers(["intervene", str(config_path), *(overrides or []), *options], config, prepare, work, nproc)


@diagnose.command()
@errors_reported()
def report(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the tables (CSV) and figures (PNG, CSV).")],
    start: Annotated[str, typer.Option(help="Name of the scores before.")] = "start",
    after: Annotated[list[str] | None, typer.Option(help="Scores after; repeatable. Default: all others.")] = None,
    arms: Annotated[Path | None, typer.Option(help="run.folder of `diagnose intervene`.")] = None,
    page: Annotated[Path | None, typer.Option(help="A Markdown page whose markers are filled in.")] = None,
    resamples: Resamples = 1000,
    seed: Seed = 1,
) -> None:
    """Writes the papers' tables and figures for a bank."""
    from megatron_tip.diagnostics.papers.evidence import Evidence
    from megatron_tip.diagnostics.papers.write import fill_page, page_blocks, write_all

    found = Evidence.read(bank, start=start, after=after or [], arms=arms, resamples=resamples, seed=seed)
    _say_caveats(found.caveats())
    tables = write_all(found, folder)
    if page is not None:
        fill_page(page, page_blocks(found, tables), folder)
    typer.echo(f"{folder}: {len(tables)} tables, {len(list(folder.glob('*.png')))} figures")


@diagnose.command()
@errors_reported()
def advise(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    start: Annotated[str, typer.Option(help="Name of the scores of the student in question.")] = "start",
    support_size: Annotated[
        int | None, typer.Option("--k", help="K, one of the scores' own. Default: 16, or the first.")
    ] = None,
    ratios: Annotated[list[float] | None, typer.Option("--ratio", help="A budget; repeatable.")] = None,
    resamples: Resamples = 1000,
    seed: Seed = 1,
) -> None:
    """Says in numbers what regime a pair is in, which rules differ on it, and what studies know about such a pair."""
    from megatron_tip.diagnostics.advice import advice, pair_facts
    from megatron_tip.diagnostics.bank import read_bank, strangers
    from megatron_tip.diagnostics.scores import read_scores

    if bad := [ratio for ratio in ratios or [] if not 0 < ratio <= 1]:
        raise InputError(f"--ratio: expected numbers in (0, 1], got {bad}")
    opened = read_bank(bank)
    scores = read_scores(opened.scores_path(start), opened)
    _say_caveats(strangers(opened, student=scores.about["student"], teacher=scores.about["teacher"]))
    size = support_size or (16 if 16 in scores.support_sizes else scores.support_sizes[0])
    budgets = ratios or [0.01, 0.03, 0.05, 0.1]
    facts = pair_facts(scores, support_size=size, ratios=budgets, resamples=resamples, seed=seed)
    for line in advice(facts):
        typer.echo(line)


def _in_workers(
    arguments: Sequence[str],
    config: Config,
    prepare: Callable[[int], Any],
    work: Callable[[Any], None],
    nproc: int | None,
) -> None:
    """Runs `work` in each worker; joins an existing world or starts one on this machine.

    Args:
        prepare: takes the number of workers, checks what they need by reading files only, and returns the argument
            of `work`. Every worker calls it before its first collective, and our launcher before it starts workers.
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
    return plan_run(bank_config(config), num_workers, reads_prompts=False)


def _examine(config: Config, num_workers: int, *, checkpoint: Path | None):
    from megatron_tip.diagnostics.session import examine

    return examine(config, num_workers, checkpoint=checkpoint)


def _examine_arms(config: Config, num_workers: int, *, checkpoint: Path | None):
    from megatron_tip.diagnostics.arms import ArmsFile
    from megatron_tip.diagnostics.intervene import check_arms

    subject = _examine(config, num_workers, checkpoint=checkpoint)
    check_arms(config, subject, ArmsFile(config.run.folder))
    return subject


def _log_memory(config: Config, subject) -> None:
    """Logs what the arms will need, phase by phase, before anything is loaded, and warns if there is less."""
    from megatron_tip.diagnostics.intervene import estimate_arms

    memory_gib = subject.plan.memory_bytes / 2**30
    estimate = estimate_arms(config, subject, memory_gib=memory_gib, on_gpu=subject.plan.device_index is not None)
    logger.info("memory of the fullest rank, roughly: %.1f of %.1f GiB", estimate.total_bytes / 2**30, memory_gib)
    for line in estimate.lines():
        logger.info("%s", line)
    if estimate.total_bytes > memory_gib * 2**30:
        logger.warning(
            "memory: the estimate exceeds what exists; lower training.max_tokens_per_micro_batch, diagnostics.seeds or "
            "diagnostics.num_contexts, raise tensor or pipeline parallel sizes, or set training.offload"
        )


def _bank_of_rollouts(config: Config, rollouts: Path):
    from megatron_tip.diagnostics.freeze import bank_of_rollouts
    from megatron_tip.diagnostics.session import bank_folder
    from megatron_tip.files import require_new
    from megatron_tip.planning.inputs import default_num_workers
    from megatron_tip.planning.plan import plan_run

    require_new(bank_folder(config))
    plan = plan_run(config, default_num_workers(config), reads_prompts=False, generates=False)
    return bank_of_rollouts(config, plan, bank_folder(config), rollouts)


def _say_bank(made) -> None:
    manifest = made.manifest
    typer.echo(
        f"{made.folder}: {manifest['num_contexts']} contexts of {int(made.prompts.max()) + 1} prompts, "
        f"{manifest['num_tokens']} tokens"
    )


def _say_caveats(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        typer.echo(f"note: {sentence}", err=True)
