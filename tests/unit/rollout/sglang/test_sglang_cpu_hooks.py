"""What stands in for SGLang's own functions in our CPU servers. That SGLang takes them is tested with real servers."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_tip.rollout.sglang.cpu_hooks import (
    decode_attention,
    sample_logprobs,
    sample_probabilities,
    uniforms_of,
    with_seeds,
)
from megatron_tip.rollout.sglang.server import CPU_SHIM

LENGTHS = torch.tensor([5, 1, 9])


def pool(kv_heads, seed=0):
    """Keys and values of a pool of 32 tokens; those that belong to no request are NaN, as stale ones may be."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(32, generator=generator)
    req_to_token = torch.zeros(4, 12, dtype=torch.int32)
    caches = [torch.full((32, kv_heads, 8), torch.nan) for _ in range(2)]
    rows = torch.tensor([2, 0, 3])
    first = 0
    for row, length in zip(rows.tolist(), LENGTHS.tolist(), strict=True):
        own = places[first : first + length]
        req_to_token[row] = places[20]  # of nobody
        req_to_token[row, :length] = own.int()
        for cache in caches:
            cache[own] = torch.randn(length, kv_heads, 8, generator=generator)
        first += length
    return (*caches, req_to_token, rows)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_all_requests_at_once_are_each_request_by_itself(heads, kv_heads):
    keys, values, req_to_token, rows = pool(kv_heads)
    query = torch.randn(3, heads, 8, generator=torch.Generator().manual_seed(1))
    output = torch.empty_like(query)
    found = decode_attention(
        pytest.fail, None, query, output, keys, values, req_to_token, rows, LENGTHS, scaling=0.3, enable_gqa=True
    )
    assert found is output
    for place, (row, length) in enumerate(zip(rows.tolist(), LENGTHS.tolist(), strict=True)):
        own = req_to_token[row, :length].long()
        expected = scaled_dot_product_attention(
            query[place, :, None], keys[own].transpose(0, 1), values[own].transpose(0, 1), scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found[place], expected[:, 0])


@pytest.mark.parametrize("given", [{"sliding_window_size": 4}, {"encoder_lens": LENGTHS}])
def test_what_sglang_alone_knows_is_left_to_it(given):
    keys, values, req_to_token, rows = pool(1)
    query = torch.randn(3, 2, 8)
    seen = {}

    def original(*arguments, **named):
        seen.update(named, encoder_lens=arguments[8], seq_lens=arguments[7])
        return "original"

    got = decode_attention(
        original, None, query, query, keys, values, req_to_token, rows, LENGTHS, causal=False, **given
    )
    assert got == "original"
    assert seen.items() >= {**given, "causal": False, "seq_lens": LENGTHS}.items()


def test_a_token_follows_from_seed_and_position_and_from_nothing_else():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    probabilities = logits.softmax(-1)
    seeds, positions = torch.tensor([7, 7, 8, 2**40]), torch.tensor([3, 4, 3, 3])
    drawn = sample_probabilities(probabilities, seeds, positions)
    assert drawn.dtype == torch.int32
    order = torch.tensor([2, 0, 3, 1])
    again = sample_probabilities(probabilities[order], seeds[order], positions[order])
    assert torch.equal(again, drawn[order])
    # Weights that do not add up to 1, as behind a top-k, draw the same.
    assert torch.equal(sample_logprobs(logits, seeds, positions).flatten().int(), drawn)
    assert len(set(uniforms_of([7, 7, 8], [3, 4, 3]).tolist())) == 3


def test_seeds_draw_by_the_probabilities():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    drawn = sample_probabilities(probabilities, torch.arange(20_000), torch.full((20_000,), 11))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities[0], atol=0.015, rtol=0)
    assert shares[1] == 0


def test_a_request_without_a_seed_gets_a_random_one():
    requests = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in (5, None, None)]
    batch = SimpleNamespace(reqs=requests)
    first, second = (with_seeds(SimpleNamespace(), object, batch, 307).sampling_seed.tolist() for _ in range(2))
    assert first[0] == second[0] == 5
    assert len({*first[1:], *second[1:]}) == 4


def test_sglang_finds_the_plugin_where_the_shim_is_and_nowhere_else():
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='sglang.srt.plugins')])"
    found = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True).stdout
        for path in (str(CPU_SHIM), "")
    ]
    assert found == ["['megatron_tip.rollout.sglang.main:register_cpu_hooks']\n", "[]\n"]
