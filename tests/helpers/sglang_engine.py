"""An engine over several fake servers, and what its tests share."""

import torch

from megatron_tip.records import Prompt
from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.engine import EngineSettings, SGLangEngine
from megatron_tip.rollout.sglang.pool import PooledServer, PoolSettings, ServerPool
from tests.helpers.fake_sglang import VOCAB_SIZE, FakeSGLang

FAST = Timeouts(connect=1.0, silence=1.0, control=1.0, retries=0, back_off=0.01)
SAMPLING = SamplingParams(6, 1.0, 1.0, samples_per_prompt=2, stop_token_ids=(2,), seed=1, batch_name="step_000001")
PROMPTS = [Prompt(10 * place, f"prompt {place}", (1, 4 + place)) for place in range(6)]


_ENGINE_VALUES = ("attempts", "drop_wrong_version", "releases_memory", "show")


class VersionTransport:
    """Brings no tensors, but tells servers their version; `refuse` names those that do not take it."""

    def __init__(self):
        self.num_bytes = 0
        self.refuse = set()
        self.num_syncs = 0
        self.version = None
        self.keeps = False

    def send(self, servers, weights, version):
        self.num_syncs += 1
        self.version = version
        taken = [server for server in servers if server.url not in self.refuse]
        for server in taken:
            server.http.weights_endpoint("update_weight_version", {"new_version": version})
        next(iter(weights))  # and leaves the rest of the stream to its caller
        return taken

    def check(self, server):
        pass

    def refresh(self, server):
        if not self.keeps or self.version is None:
            return None
        server.http.weights_endpoint("update_weight_version", {"new_version": self.version})
        return self.version

    def close(self):
        pass


class Cluster:
    def __init__(self, stack, tmp_path, num_servers=2, **settings):
        self.fakes = [stack.enter_context(FakeSGLang()) for _ in range(num_servers)]
        self.transport = VersionTransport()
        self.set_aside_path = tmp_path / "set_aside.jsonl"
        values = {"concurrency": 3, "heartbeat": 0.05, "heartbeat_timeout": 0.5, "missed_heartbeats": 2, "wait": 1.0}
        engine_values = {name: settings.pop(name) for name in _ENGINE_VALUES if name in settings}

        def connect(url):
            return SGLangClient(url, vocab_size=VOCAB_SIZE, timeouts=FAST)

        servers = [PooledServer(connect, url=fake.url) for fake in self.fakes]
        self.router = stack.enter_context(FakeSGLang()) if settings.pop("with_router", False) else None
        router = connect(self.router.url) if self.router else None
        self.pool = ServerPool(servers, PoolSettings(**values | settings), model_type="llama", router=router)
        self.engine = SGLangEngine(
            self.pool,
            self.transport,
            EngineSettings("run", engine_values.pop("attempts", 3), self.set_aside_path, num_layers=1, **engine_values),
        )
        stack.callback(self.engine.close)

    def sync(self, version=0):
        weight = torch.full((8,), float(version))
        stream = iter([("model.layers.0.self_attn.o_proj.weight", weight), ("b", weight)])
        self.engine.update_weights(stream, version)
        assert next(stream, None) is None, "the stream was not consumed to its end"


def assert_complete(rollouts, prompts=PROMPTS, samples=2, weight_version=0):
    expected = [(prompt.index, sample, prompt.prompt_ids) for prompt in prompts for sample in range(samples)]
    assert [(r.prompt_index, r.sample_index, r.prompt_ids) for r in rollouts] == expected
    assert {r.weight_version for r in rollouts} == {weight_version}
    assert {len(r.response_ids) for r in rollouts} == {6}


def num_generated(*fakes):
    return sum(bool(body.get("stream")) for fake in fakes for body in fake.generations())
