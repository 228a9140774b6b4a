"""What checksums of a few tensors prove about the weights of a server."""

import pytest
import torch

from megatron_tip.errors import ServerError
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.proof import WeightProof
from tests.helpers.fake_sglang import VOCAB_SIZE, FakeSGLang, send_json

NAME = "model.layers.0.self_attn.o_proj.weight"


class Checked(FakeSGLang):
    """`ranks`: the checksum of NAME on each rank."""

    def __init__(self, *ranks):
        super().__init__()
        self.ranks = list(ranks)

    def respond(self, handler, path, body):
        if path == "/weights_checker":
            ranks = [{"checksums": {NAME: value, "model.norm.weight": "x"}} for value in self.ranks]
            return send_json(handler, {"success": True, "message": "", "ranks": ranks})
        return super().respond(handler, path, body)


def served(fake):
    return PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url=fake.url)


def send(proof, version, tensor):
    for _ in proof.watched([(NAME, tensor), ("model.norm.weight", tensor)], version):
        pass


def test_a_change_that_no_rank_shows_is_none_that_the_server_took():
    proof = WeightProof(num_layers=3)
    with Checked("a", "b") as fake:
        server = served(fake)
        send(proof, "run/0", torch.zeros(4, 4))
        proof.confirm(server, "run/0")
        send(proof, "run/1", torch.ones(4, 4))
        with pytest.raises(ServerError, match=f"took the weights run/1, but {NAME} are still those of run/0"):
            proof.confirm(server, "run/1")
        fake.ranks = ["a", "c"]  # a change may be within the part of one rank
        proof.confirm(server, "run/1")
        assert proof.still_holds(server, "run/1")
        assert not proof.still_holds(server, "run/0")


def test_a_change_too_small_for_bfloat16_proves_nothing():
    proof = WeightProof(num_layers=3)
    with Checked("a") as fake:
        server = served(fake)
        send(proof, "run/0", torch.ones(4, 4))
        proof.confirm(server, "run/0")
        send(proof, "run/1", torch.ones(4, 4) + 1e-5)
        proof.confirm(server, "run/1")


def test_a_server_of_the_same_version_with_other_checksums_holds_something_else():
    proof = WeightProof(num_layers=3)
    with Checked("a") as fake:
        server = served(fake)
        assert not proof.still_holds(server, "run/0"), "never seen"
        send(proof, "run/0", torch.ones(4, 4))
        proof.confirm(server, "run/0")
        fake.ranks = ["b"]
        with pytest.raises(ServerError, match="says that it holds the weights run/0, and holds others"):
            proof.still_holds(server, "run/0")


@pytest.mark.parametrize("num_layers, watched", [(1, [0]), (3, [0, 1, 2]), (24, [0, 7, 15, 23])])
def test_all_but_one_tensor_of_a_few_layers_is_left_out(num_layers, watched):
    names = ["self_attn.o_proj.weight", "self_attn.qkv_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"]
    served_names = [f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in names]
    served_names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    proof = WeightProof(num_layers)
    with Checked("a") as fake:
        proof._checksums_of(served(fake))
        (body,) = [body for path, body, _ in fake.seen if path == "/weights_checker"]
    left = [name for name in served_names if not any(part in name for part in body["skip_tensor_list"])]
    assert left == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in watched]


def test_quantized_weights_are_not_compared():
    proof = WeightProof(num_layers=1)
    with Checked("a") as fake:
        server = served(fake)
        server.is_quantized = True
        for version in ("run/0", "run/1"):
            send(proof, version, torch.full((4, 4), float(len(fake.seen))))
            proof.confirm(server, version)
        assert fake.seen == []
