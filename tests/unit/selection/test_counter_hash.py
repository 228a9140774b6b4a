import torch

from megatron_tip.records import TokenIndex
from megatron_tip.selection.counter_hash import _mix, shuffled, uniform

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published algorithm, in Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def index_of(*pairs: tuple[int, int]) -> TokenIndex:
    rollouts, positions = zip(*pairs, strict=True)
    return TokenIndex(torch.tensor(rollouts), torch.tensor(positions))


def test_mixer_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the reference implementation for seed 0
    states = [0, 1, 2**31, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF]
    mixed = _mix(torch.tensor(states, dtype=torch.int64))
    assert [int(value) & MASK for value in mixed] == [splitmix64(state) for state in states]


def test_uniform_is_the_hash_of_its_counters():
    pairs = [(0, 0), (0, 1), (1, 0), (2**40, 8191)]
    for seed, step, stream in ((0, 0, 0), (1, 2, 3), (-5, 10**6, 1), (2**63, 1, 0)):
        expected = []
        for rollout, position in pairs:
            state = 0
            for part in (seed, stream, step, rollout, position):
                state = splitmix64((state ^ splitmix64(part & MASK)) & MASK)
            expected.append(((state >> 12) + 0.5) * 2.0**-52)
        assert uniform(seed, step, index_of(*pairs), stream=stream).tolist() == expected


def test_uniform_is_uniform_and_depends_on_every_counter():
    index = index_of(*((rollout, position) for rollout in range(100) for position in range(100)))
    base = uniform(0, 0, index)
    assert 0 < float(base.min()) < float(base.max()) < 1
    counts = torch.histc(base, 20, 0, 1)
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert 5 < chi_square < 43  # 19 degrees of freedom: 0.1 % to 99.9 %
    others = [uniform(1, 0, index), uniform(0, 1, index), uniform(0, 0, index, stream=1), base.roll(1), base.roll(100)]
    for other in others:
        correlation = float(torch.corrcoef(torch.stack([base, other]))[0, 1])
        assert abs(correlation) < 0.05  # 5 standard deviations


def test_shuffled_is_a_permutation_that_depends_on_seed_and_step():
    for bits in (1, 2, 3, 8, 13):
        keys = torch.arange(2**bits)
        assert torch.equal(shuffled(keys, bits, 3, 4).sort().values, keys)
    keys = torch.arange(2**13)
    first = shuffled(keys, 13, 0, 0)
    for other in (keys, shuffled(keys, 13, 1, 0), shuffled(keys, 13, 0, 1)):
        assert abs(float(torch.corrcoef(torch.stack([first, other]).double())[0, 1])) < 0.06
