"""A fake server that opens the handles of weights that it is sent, as SGLang does."""

import pickle
from base64 import b64decode

import torch

from tests.helpers.fake_sglang import FakeSGLang, send_json


class OpeningSGLang(FakeSGLang):
    """`taken`: for each of its ranks the tensors that it copied. `fails_at`: the bucket (from 0) that it refuses."""

    def __init__(self, *, tp_size=1, fails_at=-1):
        super().__init__()
        self.layout = {"tp_size": tp_size}
        self.taken = [{} for _ in range(tp_size)]
        self.fails_at = fails_at
        self.num_buckets = 0
        self.num_in_bucket = []

    def respond(self, handler, path, body):
        if path != "/update_weights_from_tensor":
            return super().respond(handler, path, body)
        self.num_buckets += 1
        if self.num_buckets - 1 == self.fails_at:
            return send_json(handler, {"success": False, "message": "no room"}, status=400)
        assert body["load_format"] == "flattened_bucket"
        for taken, handle in zip(self.taken, body["serialized_named_tensors"], strict=True):
            taken |= opened(handle)
        return send_json(handler, {"success": True, "message": ""})


def opened(handle):
    """Copies of the tensors behind `handle`, by name."""
    content = pickle.loads(b64decode(handle))
    data = content["flattened_tensor"]
    return {
        place.name: data[place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape).clone()
        for place in content["metadata"]
    }


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
