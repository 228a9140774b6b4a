from megatron_tip.rollout.engine import SamplingParams
from megatron_tip.seeds import derive_seed

SAMPLING = SamplingParams(
    max_response_tokens=8, temperature=1.0, top_p=1.0, samples_per_prompt=2, stop_token_ids=(2,), seed=-3
)


def test_every_step_has_a_seed_of_its_own_and_held_out_prompts_one_for_all_steps():
    steps = [SAMPLING.for_step(step) for step in range(1, 50)]
    heldout = [SAMPLING.for_heldout(step) for step in (0, 7)]
    assert len({sampling.seed for sampling in [*steps, heldout[0]]}) == 50
    assert heldout[0].seed == heldout[1].seed
    assert [sampling.batch_name for sampling in heldout] == ["heldout_000000", "heldout_000007"]
    assert [sampling.samples_per_prompt for sampling in (steps[0], heldout[0])] == [2, 1]


def test_a_derived_seed_depends_on_every_part_and_its_place():
    seeds = [derive_seed(*parts) for parts in [(1,), (1, 0), (1, 2), (2, 1), (-1, 2), (1, 2, 0)]]
    assert len(set(seeds)) == len(seeds)
