"""`megatron-tip eval`: benchmarks of a run's student."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_tip.commands.outcome import errors_reported
from megatron_tip.errors import InputError
from megatron_tip.observability.logs import configure_logging


@errors_reported()
def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run; results go to its eval.jsonl.")],
    benchmarks: Annotated[
        str, typer.Option(help="Comma-separated: gsm8k, math500, aime24, aime25, gpqa_diamond, humaneval, ifeval.")
    ] = "gsm8k,math500,aime24,aime25,gpqa_diamond,ifeval",
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds, from 1; mean and standard deviation are over them.")
    ] = 5,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face directory, such as the teacher; default: hf/ of the run.")
    ] = None,
    url: Annotated[str, typer.Option(help="A running OpenAI-compatible server, as http://host:30000/v1.")] = "",
    model_name: Annotated[str, typer.Option(help="With --url: the server's name for the model.")] = "default",
    label: Annotated[
        str, typer.Option(help="The model's name in the results; default: student, or its folder's.")
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="A folder of questions, NAME.jsonl or .parquet; default: hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many questions: a trial, no result.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the preset's 0.6; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the preset's 0.95.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit per answer; default: the preset's.")] = None,
    backend: Annotated[str, typer.Option(help="lm-eval or evalscope.")] = "lm-eval",
    python: Annotated[
        str,
        typer.Option(envvar="MEGATRON_TIP_EVAL_PYTHON", help="Interpreter that has the backend; default: this one."),
    ] = "",
    device: Annotated[str, typer.Option(help="lm-eval with a directory: cuda:0, cpu; default: it chooses.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="With a directory: questions per batch.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="With a server: questions in flight.")] = 32,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="humaneval: run the model's code, under limits.")
    ] = False,
    allow_code_execution_as_root: Annotated[
        bool,
        typer.Option("--allow-code-execution-as-root", help="humaneval: run it even with the rights of root."),
    ] = False,
) -> None:
    """Evaluates a run's student on benchmarks: mean and standard deviation over several seeds.

    docs/evaluation.md describes the protocol of each benchmark.
    """
    from megatron_tip.evaluation.benchmarks import Request, run_benchmarks
    from megatron_tip.evaluation.harness import Model
    from megatron_tip.evaluation.presets import load_presets
    from megatron_tip.evaluation.results import model_folder, table

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
        allow_code_execution_as_root=allow_code_execution_as_root,
    )
    typer.echo(table(run_benchmarks(request, run)))
