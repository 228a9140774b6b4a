"""What is asked of a backend and what becomes of its answer; programs stand in for the real backends."""

import json
import multiprocessing
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tip.errors import EvaluationError, InputError, OptionalDependencyError, OutputError
from megatron_tip.evaluation.benchmarks import Request, run_benchmarks
from megatron_tip.evaluation.context import context_of
from megatron_tip.evaluation.evalscope import score_of
from megatron_tip.evaluation.harness import Model
from megatron_tip.evaluation.offline_data import find_data
from megatron_tip.evaluation.presets import PRESETS, load_presets
from megatron_tip.evaluation.results import append_result, model_folder
from megatron_tip.observability.run_folder import RunFolder

HARNESS = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
if arguments[0] == "-c":
    print("0.4.13")
    print("/opt/lm_eval")
    sys.exit()
assert arguments[:3] == ["-m", "lm_eval", "run"]
given = dict(zip(arguments, arguments[1:]))
task, seed = given["--tasks"], int(given["--seed"])
if seed == 13:
    print("out of luck")
    sys.exit(3)
output = Path(given["--output_path"], "model")
output.mkdir(parents=True)
(output / "arguments.json").write_text(json.dumps(arguments))
scores = {{"exact_match,flexible-extract": seed / 10, "exact_match,strict-match": 0.0}}
results = {{"results": {{task: scores}}, "n-samples": {{task: {{"effective": 4}}}}}}
(output / "results_2026-01-01.json").write_text(json.dumps(results))
answers = ["```python\\ndef add(a, b):\\n    return a + b\\n```", "```python\\ndef add(a, b):\\n    return 0\\n```"]
question = {{"prompt": "def add(a, b):\\n", "test": "def check(f):\\n    assert f(1, 2) == 3\\n", "entry_point": "add"}}
lines = [json.dumps({{"doc": question, "resps": [[answer]]}}) + "\\n" for answer in answers]
(output / f"samples_{{task}}_2026-01-01.jsonl").write_text("".join(lines))
"""


@pytest.fixture
def request_of(tmp_path):
    """A request of the stand-in, and a run folder."""
    program = tmp_path / "python"
    program.write_text(HARNESS.format(python=sys.executable))
    program.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    request = Request(
        Model(path=Path("/models/student"), device="cpu"),
        label="student",
        presets=[PRESETS["gsm8k"]],
        seeds=[1, 2, 4],
        backend="lm-eval",
        python=str(program),
        data=None,
        limit=None,
        allow_code_execution=False,
        allow_code_execution_as_root=True,
    )
    return request, run


def lines_of(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_seeds_become_a_line_with_mean_and_deviation(request_of):
    request, run = request_of
    run_benchmarks(request, run)
    run_benchmarks(replace(request, seeds=[7], label="teacher", limit=2), run)
    first, second = lines_of(run)
    assert first["values"] == [0.1, 0.2, 0.4]
    assert first["mean"] == pytest.approx(0.7 / 3)
    assert first["sd"] == pytest.approx(statistics.stdev([0.1, 0.2, 0.4]))
    assert (first["num_questions"], first["backend"], first["model"]) == (4, "lm-eval 0.4.13", "student")
    assert first["protocol"]["temperature"] == 0.6
    assert (second["mean"], second["sd"], second["limit"]) == (0.7, None, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_backend_ends_with_the_evaluation(tmp_path, number):
    """And what it has started: here a child that takes no notice of SIGTERM."""
    backend = tmp_path / "backend.py"
    backend.write_text(
        "import os, signal, sys, time\n"
        "child = os.fork()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL if child else signal.SIG_IGN)\n"
        "child and print(os.getpid(), child, flush=True)\n"
        "time.sleep(300)\n"
    )
    source = "import sys; from pathlib import Path; from megatron_tip.evaluation.child_process import run_logged\n"
    source += "run_logged([sys.executable, '-S', sys.argv[1]], Path(sys.argv[2]))"
    log = tmp_path / "log.txt"
    evaluation = subprocess.Popen([sys.executable, "-c", source, str(backend), str(log)])
    try:
        started = time.monotonic()
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() - started < 60
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for pid in log.read_text().split()]
        evaluation.send_signal(number)
        assert evaluation.wait(timeout=60) == 128 + number
        gone, left = psutil.wait_procs(family, timeout=10)
        assert (len(gone), left) == (2, [])
    finally:
        evaluation.kill()
        evaluation.wait()


def test_lines_of_evaluations_that_end_at_once_are_all_kept(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"model": "before"}\n{"cut o')
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)

    def append(model):
        start.wait()
        for place in range(25):
            append_result(RunFolder(tmp_path), {"model": model, "place": place, "long": "x" * 20_000})

    evaluations = [context.Process(target=append, args=(model,)) for model in range(4)]
    for evaluation in evaluations:
        evaluation.start()
    for evaluation in evaluations:
        evaluation.join()
    first, broken, *lines = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert (first, broken) == ('{"model": "before"}', '{"cut o')
    assert sorted((line["model"], line["place"]) for line in map(json.loads, lines)) == [
        (model, place) for model in range(4) for place in range(25)
    ]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    append_result(RunFolder(tmp_path), {"model": "before"})
    before = (tmp_path / "eval.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with pytest.raises(OutputError, match=r"eval\.jsonl: cannot write"):
            append_result(RunFolder(tmp_path), {"model": "a longer one than ten bytes"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "eval.jsonl").read_bytes() == before


def test_the_harness_is_asked_for_our_protocol(request_of, tmp_path):
    request, run = request_of
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    greedy = load_presets(["gsm8k"], temperature=0.0, max_tokens=7)
    run_benchmarks(replace(request, data=tmp_path, presets=greedy, seeds=[3]), run)
    folder = run / "eval" / "student" / "lm-eval" / "gsm8k" / "seed_3"
    given = json.loads((folder / "results" / "model" / "arguments.json").read_text())
    assert "--apply_chat_template" in given
    assert json.loads(given[given.index("--model_args") + 1]) == {"pretrained": "/models/student", "dtype": "auto"}
    task = {}
    for line in (folder / "task" / "gsm8k.yaml").read_text().splitlines():
        key, value = line.split(": ", 1)
        task[key] = json.loads(value)
    assert task["include"] == "/opt/lm_eval/tasks/gsm8k/gsm8k-cot-zeroshot.yaml"
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "gsm8k.jsonl")
    sampling = {key: task["generation_kwargs"][key] for key in ("do_sample", "temperature", "max_gen_toks")}
    assert sampling == {"do_sample": False, "temperature": 0.0, "max_gen_toks": 7}
    assert "top_p" not in task["generation_kwargs"]


def test_a_server_is_asked_by_chat_with_the_seed(request_of):
    request, run = request_of
    run_benchmarks(replace(request, model=Model(url="http://node:30000/v1/", name="qwen"), seeds=[5]), run)
    (path,) = run.rglob("arguments.json")
    given = json.loads(path.read_text())
    facts = json.loads(given[given.index("--model_args") + 1])
    assert given[given.index("--model") + 1] == "local-chat-completions"
    assert (facts["base_url"], facts["model"], facts["seed"]) == ("http://node:30000/v1/chat/completions", "qwen", 5)


def test_answers_fit_into_the_context_of_the_model(request_of, tmp_path):
    request, run = request_of

    def protocol_of(config, **sampling):
        (tmp_path / "config.json").write_text(json.dumps(config))
        presets = load_presets(["gsm8k"], **sampling)
        (result,) = run_benchmarks(replace(request, model=Model(tmp_path), presets=presets, seeds=[1]), run)
        (task,) = run.rglob("gsm8k.yaml")
        assert f'"max_gen_toks": {result["protocol"]["max_tokens"]}' in task.read_text()
        return [result["protocol"].get(name) for name in ("max_tokens", "max_tokens asked", "context")]

    assert protocol_of({"max_position_embeddings": 8192}) == [4096, None, 8192]
    assert protocol_of({"max_position_embeddings": 5000}) == [2952, 4096, 5000]
    assert protocol_of({"max_position_embeddings": 512}, max_tokens=300) == [256, 300, 512]
    nested = {"text_config": {"max_position_embeddings": 1000}, "max_position_embeddings": 9000}
    assert protocol_of(nested) == [500, 4096, 1000]
    assert protocol_of({}) == [4096, None, "not known"]


def test_a_server_says_its_context():
    class Models(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": "other", "max_model_len": 9}, {"id": "qwen", "max_model_len": 5000}]})
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert context_of(Model(url=url, name="qwen")) == 5000
        assert context_of(Model(url=f"{url}/nowhere", name="qwen")) is None
        server.shutdown()


def test_programs_are_run_only_when_allowed(request_of):
    request, run = request_of
    request = replace(request, presets=[PRESETS["humaneval"]], seeds=[1])
    with pytest.raises(InputError, match="--allow-code-execution"):
        run_benchmarks(request, run)
    assert not (run / "eval").exists()
    (result,) = run_benchmarks(replace(request, allow_code_execution=True), run)
    assert (result["mean"], result["num_questions"], result["metric"]) == (0.5, 2, "pass@1")
    assert result["details"][0]["outcomes"] == {"passed": 1, "failed": 1, "timeout": 0}
    (path,) = run.rglob("arguments.json")
    assert "--predict_only" in json.loads(path.read_text())  # the harness runs nothing


def test_a_failed_backend_is_named_and_earlier_results_stay(request_of):
    request, run = request_of
    run_benchmarks(replace(request, seeds=[1]), run)
    with pytest.raises(EvaluationError, match=r"seed_13/log\.txt: .* exit code 3: out of luck"):
        run_benchmarks(replace(request, seeds=[2, 13]), run)
    assert len(lines_of(run)) == 1
    with pytest.raises(EvaluationError, match=r"expected the metric 'math_verify,none', got \['exact_match"):
        run_benchmarks(replace(request, presets=[PRESETS["math500"]], seeds=[1]), run)


def test_bad_requests_end_before_anything_runs(request_of, tmp_path):
    request, run = request_of
    cases = [
        (replace(request, seeds=[1, 1]), run, InputError, "none twice"),
        (request, tmp_path / "nowhere", InputError, "no such folder"),
        (replace(request, data=tmp_path), run, InputError, r"expected .*gsm8k\.jsonl"),
        (replace(request, python="/no/such/python"), run, OptionalDependencyError, "cannot run /no/such/python"),
        (replace(request, python=sys.executable), run, OptionalDependencyError, "make eval"),
        (replace(request, python=sys.executable, backend="evalscope"), run, OptionalDependencyError, "evalscope"),
    ]
    for wrong, folder, kind, message in cases:
        with pytest.raises(kind, match=message):
            run_benchmarks(wrong, folder)
    programs = replace(request, presets=[PRESETS["humaneval"]], allow_code_execution=True, backend="evalscope")
    with pytest.raises(InputError, match="without code execution"):
        run_benchmarks(programs, run)
    with pytest.raises(InputError, match="got 'gsm9k'; the nearest is 'gsm8k'"):
        load_presets(["gsm9k"])
    with pytest.raises(InputError, match="temperature"):
        load_presets(["gsm8k"], temperature=-1.0)
    with pytest.raises(InputError, match=r"config\.json"):
        model_folder(run, None)
    assert not RunFolder(run).evaluations.exists()


def test_offline_questions_are_checked(tmp_path):
    preset = PRESETS["aime25"]
    (tmp_path / "aime25.jsonl").write_text('{"problem": "1 + 1"}\n')
    with pytest.raises(InputError, match="got one without answer; it has problem"):
        find_data(tmp_path, preset)
    (tmp_path / "aime25.json").write_text("[]")
    with pytest.raises(InputError, match=r"\['aime25.jsonl', 'aime25.json'\]"):
        find_data(tmp_path, preset)
    (tmp_path / "aime25.jsonl").unlink()
    with pytest.raises(InputError, match="cannot read them"):
        find_data(tmp_path, preset)
    (tmp_path / "aime25.json").unlink()
    (tmp_path / "aime25").mkdir()
    pq.write_table(pa.table({"problem": ["1 + 1"], "answer": ["2"]}), tmp_path / "aime25" / "test.parquet")
    found = find_data(tmp_path, preset)
    assert (found.path.name, found.kind) == ("test.parquet", "parquet")


def test_evalscope_reports_give_their_primary_metric():
    accuracy = {"name": "accuracy", "aggregation": "mean", "dimensions": {}}
    other = {"name": "f1", "aggregation": "mean", "dimensions": {}}
    metrics = [{"identity": other, "score": 0.9, "num": 1}, {"identity": accuracy, "score": 0.25, "num": 8}]
    score = score_of({"primary_metric_identity": accuracy, "metrics": metrics})
    assert (score.value, score.num_questions) == (0.25, 8)
    with pytest.raises(EvaluationError, match="primary metric"):
        score_of({"primary_metric_identity": accuracy, "metrics": []})
