"""A teacher behind a real SGLang server on the CPU: its log-probabilities, and a whole run of several turns with it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.keys import ServerKeys
from megatron_tip.rollout.sglang.server import ServerSettings, SGLangServer
from megatron_tip.rollout.storage import read_rollouts
from megatron_tip.teachers.server_scorer import ScoringSettings, ServerTeacher, generated_positions
from tests.helpers.fake_teacher import scored_by
from tests.helpers.tiny import make_llama
from tests.helpers.training import make_rollouts

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(280)]

VOCAB_SIZE = 307
KEYS = ServerKeys(api="api-key-of-the-test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served_teacher")
    make_llama(folder / "student", seed=1, num_layers=2)
    make_llama(folder / "teacher", seed=2, num_layers=2, tied=False, hidden_size=96)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    settings = ServerSettings(
        model_path=folder / "teacher",
        log_path=folder / "server.log",
        max_total_tokens=8192,
        memory_fraction=0.3,
        keys=KEYS,
    )
    with SGLangServer(settings) as server:
        yield server.url


def test_log_probabilities_are_the_models_own(folder: Path, url: str):
    """Also of ids that are named, in windows whose beginning the server has cached, and at 16 requests at once."""
    rollouts = [
        replace(rollout, environment_spans=((5, 9),) if place == 1 else ())
        for place, rollout in enumerate(make_rollouts([7, 40, 0, 23]))
    ]
    # SGLang calls the last id of its vocabulary 0.
    rollouts[0] = replace(rollouts[0], response_ids=(VOCAB_SIZE - 1, *rollouts[0].response_ids[1:]))
    rows = []
    for rollout in rollouts:
        logprobs = scored_by(folder / "teacher", rollout.prompt_ids + rollout.response_ids)
        rows += [logprobs[len(rollout.prompt_ids) - 1 + place] for place in generated_positions(rollout)]
    expected = torch.stack(rows)
    labels = torch.tensor([r.response_ids[place] for r in rollouts for place in generated_positions(r)])
    asked = torch.randint(0, VOCAB_SIZE, (len(expected), 16), generator=torch.Generator().manual_seed(1))
    with SGLangClient(url, vocab_size=VOCAB_SIZE, keys=KEYS) as client:
        teacher = ServerTeacher({"": [client]}, ScoringSettings(VOCAB_SIZE, 16, window_tokens=4, max_concurrent=16))
        teacher.check(asks_student_support=True)
        got = teacher.top_k(rollouts, [""] * 4)
        on_asked = teacher.student_support(rollouts, [""] * 4, asked)
    values, ids = expected.topk(16)
    assert torch.equal(got.support_ids, ids)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got.support_logprobs.double(), values, **close)
    torch.testing.assert_close(got.label_logprobs.double(), expected.gather(1, labels[:, None]).squeeze(1), **close)
    torch.testing.assert_close(on_asked.double(), expected.gather(1, asked), **close)


RUN = """
[run]
folder = "{folder}/run"
threads = 1

[model]
path = "{folder}/student"
dtype = "float32"
tensor_parallel_size = 2

[teacher]
kind = "sglang"
path = "{folder}/teacher"
urls = ["{url}"]
keys_file = "{folder}/keys.json"

[prompts]
source = "reasoning_gym"
tasks = ["basic_arithmetic"]
max_prompt_tokens = 128

[heldout]
num_prompts = 2

[rollout]
environment = "calculator"
observation_role = "user"
max_turns = 3
prompts_per_step = 4
max_response_tokens = 144

[selection]
retention_ratio = 0.2
support_size = 8

[loss]
divergence = "topk_reverse_kl"

[optimizer]
lr = 3e-3

[training]
steps = 3
max_tokens_per_micro_batch = 1024
"""


def test_a_run_of_several_turns_comes_nearer_to_a_teacher_behind_a_server(folder: Path, url: str):
    (folder / "keys.json").write_text(json.dumps({"api": KEYS.api}))
    (folder / "run.toml").write_text(RUN.format(folder=folder, url=url))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tip.cli", "train", str(folder / "run.toml")],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    heldout = [step["heldout/topk_reverse_kl"] for step in metrics if "heldout/topk_reverse_kl" in step]
    assert 0 < heldout[-1] < heldout[0]
    rollouts = [r for path in sorted((folder / "run/rollouts").glob("step_*.jsonl")) for r in read_rollouts(path)]
    assert len(rollouts) == 12
    assert sum(len(rollout.environment_spans) for rollout in rollouts) > 0, "the case must hold several turns"
    generated = sum(rollout.num_generated for rollout in rollouts)
    assert sum(step.get("selection/num_valid", 0) for step in metrics) == generated
    assert sum(step.get("rollout/environment_tokens", 0) for step in metrics) > 0
    written = "".join(path.read_text() for path in (folder / "run").glob("*.toml")) + done.stderr + done.stdout
    assert str(KEYS.api) not in written
