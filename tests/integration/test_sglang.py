"""Real SGLang servers on the CPU: what they generate, how they take weights, and what happens when they are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import WeightsLostError
from megatron_tip.records import Prompt
from megatron_tip.rollout.engine import ALL_MEMORY, WEIGHTS, SamplingParams
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine, new_run_id
from megatron_tip.rollout.sglang.keys import ServerKeys
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from megatron_tip.rollout.sglang.server import ServerSettings, SGLangServer
from megatron_tip.rollout.sglang.weights.broadcast import BroadcastTransport
from megatron_tip.rollout.sglang.weights.folder import FolderTransport
from megatron_tip.rollout.sglang.weights.ipc import IpcTransport
from tests.helpers.processes import is_alive, wait_until
from tests.helpers.tiny import make_llama

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(280)]

PYTHON = (sys.executable,)
VOCAB_SIZE = 307
LAYERS = 6
KEYS = ServerKeys(api="api-key-of-the-test", admin="admin-key-of-the-test")
PROBE = list(range(3, 43))
PROMPTS = [Prompt(place, f"prompt {place}", tuple(range(3, 9 + place))) for place in range(8)]
SAMPLING = SamplingParams(48, 1.0, 1.0, samples_per_prompt=2, stop_token_ids=(2,), seed=1, batch_name="step_000001")


class Student:
    """A model whose weights change at will; the truth that servers are compared with."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = HfCheckpoint(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def change(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)

    def weights(self):
        tensors = dict(self.model.named_parameters())
        for name in hf_shapes(self.checkpoint.architecture):
            yield name, tensors[name].detach()

    def logprobs(self, ids):
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [logprobs[place, ids[place + 1]].item() for place in range(len(ids) - 1)]

    def largest_gap(self, engine) -> float:
        """Over all servers and ids of the probe."""
        expected = self.logprobs(PROBE)
        found = engine.input_logprobs(PROBE)
        assert found
        return max(abs(a - b) for logprobs in found.values() for a, b in zip(logprobs, expected, strict=True))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return Student(make_llama(tmp_path_factory.mktemp("student"), seed=1))


def server_of(student, folder, index, **values):
    settings = ServerSettings(
        model_path=student.checkpoint.folder,
        log_path=folder / f"server_{index}.log",
        max_total_tokens=8192,
        memory_fraction=0.3,
        dummy_weights=True,
        seed=index,
        keys=KEYS,
        **values,
    )

    def connect(url):
        return SGLangClient(url, vocab_size=VOCAB_SIZE, keys=KEYS, timeouts=Timeouts(silence=60.0, control=60.0))

    return PooledServer(connect, process=SGLangServer(settings))


def broadcast(run_id, bucket_bytes=40_000):
    return BroadcastTransport(
        run_id=run_id, bucket_bytes=bucket_bytes, backend="gloo", device="cpu", timeout_seconds=20.0
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def engine(student, folder):
    """Two servers, the second of two tensor-parallel ranks, that took one sync by broadcast."""
    pool = ServerPool(
        [server_of(student, folder, 0), server_of(student, folder, 1, tp_size=2)],
        PoolSettings(concurrency=8, heartbeat=1.0, start_timeout=200.0, wait=200.0),
        model_type="llama",
    )
    run_id = new_run_id()
    settings = EngineSettings(run_id, 6, folder / "set_aside.jsonl", num_layers=LAYERS, releases_memory=True)
    engine = SGLangEngine(pool, broadcast(run_id), settings)
    try:
        engine.update_weights(student.weights(), 0)
        yield engine
    finally:
        engine.close()


def servers_of(engine):
    return engine._pool.servers


def assert_complete(rollouts, weight_version):
    expected = [(prompt.index, sample) for prompt in PROMPTS for sample in range(2)]
    assert [(rollout.prompt_index, rollout.sample_index) for rollout in rollouts] == expected
    assert {rollout.weight_version for rollout in rollouts} == {weight_version}


def test_servers_hold_the_weights_that_were_broadcast(engine, student):
    assert len(engine.input_logprobs(PROBE)) == 2
    assert student.largest_gap(engine) < 1e-4
    student.change()
    assert student.largest_gap(engine) > 1e-2  # so a sync that did nothing would be seen
    engine.update_weights(student.weights(), 1)
    assert engine.take_metrics(SAMPLING.batch_name)["sync/num_servers"] == 2
    assert student.largest_gap(engine) < 1e-4


def test_sampled_logprobs_are_those_of_the_student(engine, student):
    engine.update_weights(student.weights(), 2)
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert_complete(rollouts, 2)
    for rollout in rollouts[:4]:
        assert all(0 <= token < VOCAB_SIZE for token in rollout.response_ids)
        assert rollout.finish_reason == ("stop" if rollout.response_ids[-1] == 2 else "length")
        expected = student.logprobs([*rollout.prompt_ids, *rollout.response_ids])[len(rollout.prompt_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), torch.tensor(expected), atol=1e-4, rtol=0)
    responses = {rollout.response_ids for rollout in rollouts}
    assert len(responses) == len(rollouts), "samples of one prompt, and servers, draw differently"


def test_what_is_drawn_follows_from_the_seed_whichever_server_draws(engine, student):
    engine.update_weights(student.weights(), 2)
    first, again, other = (engine.generate(PROMPTS, replace(SAMPLING, seed=seed)) for seed in (1, 1, 5))
    assert [rollout.response_ids for rollout in first] == [rollout.response_ids for rollout in again]
    assert not {rollout.response_ids for rollout in first} & {rollout.response_ids for rollout in other}


def test_temperature_divides_the_logits_that_logprobs_are_taken_of(engine, student):
    server = servers_of(engine)[0]
    generation = server.http.generate(PROBE, max_new_tokens=1, temperature=0.5)
    with torch.no_grad():
        logits = student.model(torch.tensor([PROBE])).logits[0, -1]
    expected = (logits / 0.5).log_softmax(-1)[generation.response_ids[0]].item()
    assert generation.logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_servers_give_back_their_memory_and_take_it_back(engine, student):
    """The calls and their order; on a CPU SGLang has no memory saver and frees nothing."""
    engine.hold_memory(frozenset(), may_start=False)
    time.sleep(2.5)  # heartbeats
    assert engine.take_metrics(SAMPLING.batch_name)["servers/num_up"] == 2
    with pytest.raises(WeightsLostError):
        engine.generate(PROMPTS, SAMPLING)
    for version in (5, 6):
        engine.hold_memory(frozenset({WEIGHTS}), may_start=True)
        student.change()
        engine.update_weights(student.weights(), version)
        assert engine.take_metrics(SAMPLING.batch_name)["sync/num_servers"] == 2
        engine.hold_memory(ALL_MEMORY, may_start=True)
        assert student.largest_gap(engine) < 1e-4
        assert_complete(engine.generate(PROMPTS, SAMPLING), version)


def test_no_password_is_in_a_log_or_a_process_list(engine, folder):
    seen = "".join(path.read_text(errors="replace") for path in folder.glob("*.log"))
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        for name in ("cmdline", "environ"):
            try:
                seen += (entry / name).read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has ended, or is not ours to see
    assert "api_key" in seen, "the server logs its arguments, where the password would be"
    assert KEYS.api not in seen
    assert KEYS.admin not in seen


@pytest.mark.parametrize("way", ["folder", "ipc"])
def test_weights_in_other_ways_than_by_broadcast(engine, student, folder, way):
    transport = IpcTransport(bucket_bytes=40_000, device=torch.device("cpu"))
    if way == "folder":
        transport = FolderTransport(folder / "weights", student.checkpoint, dtype=torch.float32, bucket_bytes=200_000)
    by_broadcast, engine._transport = engine._transport, transport
    try:
        student.change()
        engine.update_weights(student.weights(), 3)
        assert engine.take_metrics(SAMPLING.batch_name)["sync/num_servers"] == 2
        assert student.largest_gap(engine) < 1e-4
    finally:
        engine._transport = by_broadcast
        transport.close()
    student.change()
    engine.update_weights(student.weights(), 4)  # and back: a server stays able to take a broadcast
    assert student.largest_gap(engine) < 1e-4


def test_another_trainers_weights_are_noticed_before_a_rollout_is_used(engine, student):
    engine.update_weights(student.weights(), 5)
    other = servers_of(engine)[0].http
    other.weights_endpoint("update_weight_version", {"new_version": "another/5", "abort_all_requests": False})
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert_complete(rollouts, 5)
    assert engine.take_metrics(SAMPLING.batch_name)["rollout/num_wrong_version"] >= 1


def test_killed_in_the_middle_of_a_sync_and_of_a_generation(engine, student):
    """One restart serves both: the tp-1 server is killed in mid-sync, and again, the other then, in mid-generation."""
    first, second = servers_of(engine)
    engine.update_weights(student.weights(), 6)

    def weights_that_kill():
        for place, item in enumerate(student.weights()):
            if place == 20:
                os.killpg(first.process.pid, signal.SIGKILL)
            yield item

    student.change()
    engine.update_weights(weights_that_kill(), 7)
    # The other server may hold half of the new weights: nothing is generated until it got all.
    with pytest.raises(WeightsLostError):
        engine.generate(PROMPTS, SAMPLING)
    engine.update_weights(student.weights(), 7)
    assert student.largest_gap(engine) < 1e-4
    assert_complete(engine.generate(PROMPTS, SAMPLING), 7)

    wait_until(lambda: first.is_up)  # restarted by itself
    engine.update_weights(student.weights(), 8)
    assert engine.take_metrics(SAMPLING.batch_name)["sync/num_servers"] == 2
    killer = threading.Timer(0.4, lambda: os.killpg(second.process.pid, signal.SIGKILL))
    killer.start()
    rollouts = engine.generate(PROMPTS, replace(SAMPLING, max_response_tokens=200))
    killer.join()
    assert_complete(rollouts, 8)
    metrics = engine.take_metrics(SAMPLING.batch_name)
    assert metrics["rollout/num_repeated"] >= 1
    assert metrics["rollout/num_set_aside"] == 0


def test_a_server_ends_with_the_process_that_started_it(student, folder):
    code = f"""
from pathlib import Path
from megatron_tip.rollout.sglang.server import ServerSettings, SGLangServer
server = SGLangServer(ServerSettings(Path({str(student.checkpoint.folder)!r}), Path({str(folder / "orphan.log")!r})))
server.start()
print(server.pid, flush=True)
import os, signal, time
time.sleep(1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    starter = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(starter.stdout)
    assert starter.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(pid))


def test_a_run_whose_server_is_killed_ends_with_every_prompt_accounted_for_once(student, tmp_path):
    make_llama(tmp_path / "teacher", seed=2, hidden_size=96)
    config = tmp_path / "run.toml"
    config.write_text(RUN.format(student=student.checkpoint.folder, teacher=tmp_path / "teacher", run=tmp_path / "run"))
    with (tmp_path / "out").open("wb") as out:
        command = [*PYTHON, "-m", "megatron_tip.cli", "train", str(config)]
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: run.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= 2))
        assert run.poll() is None, (tmp_path / "out").read_text()[-3000:]
        killed = kill_a_server_of(run.pid)
        code = run.wait(timeout=250)
    assert code == 0, (tmp_path / "out").read_text()[-3000:]
    assert killed
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert records[-1]["servers/num_restarts"] >= 1
    assert all(record["rollout/num_set_aside"] == 0 for record in records[1:])
    for step in range(1, 7):
        lines = (tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        jobs = [(record["prompt_index"], record["sample_index"]) for record in map(json.loads, lines)]
        assert len(jobs) == len(set(jobs)) == 8, f"step {step}: {jobs}"


def kill_a_server_of(pid: int) -> bool:
    """Kills the process group of the server that a run's worker started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            worker = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            launcher = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"rollout.sglang.main" in command and pid in (worker, launcher):
            os.killpg(int(entry.name), signal.SIGKILL)
            return True
    return False


RUN = """
[run]
folder = "{run}"
threads = 1
[model]
path = "{student}"
[teacher]
path = "{teacher}"
[prompts]
source = "reasoning_gym"
tasks = ["basic_arithmetic"]
max_prompt_tokens = 256
[heldout]
num_prompts = 2
[rollout]
engine = "sglang"
prompts_per_step = 4
samples_per_prompt = 2
max_response_tokens = 64
ahead = 1
importance_cap = 2.0
[sglang]
heartbeat_seconds = 1.0
[sync]
verify = "always"
[optimizer]
lr = 1e-3
[training]
steps = 6
[output]
save_checkpoint = false
export_hf = false
"""
