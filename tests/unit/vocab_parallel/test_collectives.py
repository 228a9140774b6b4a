from types import SimpleNamespace

import pytest
import torch

from megatron_tip.errors import InputError
from megatron_tip.vocab_parallel import collectives
from megatron_tip.vocab_parallel.collectives import agree

GROUP = SimpleNamespace(rank=lambda: 0)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("rows", "pass the same hidden states on all of them"),
        ("rows per chunk", "set the same loss.chunk_rows on all of them; .* GPU of other memory"),
    ],
)
def test_sizes_that_differ_are_named_with_what_to_do(monkeypatch, name, remedy):
    monkeypatch.setattr(collectives, "all_gather", lambda facts, _: torch.stack([facts, facts + torch.tensor([0, 5])]))
    with pytest.raises(InputError, match=rf"loss: expected the same number of {name} on .* got \[3, 8\]; {remedy}"):
        agree("loss", torch.tensor(0), {name: 3}, GROUP)
