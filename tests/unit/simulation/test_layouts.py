"""A layout is a set of overrides: with them, the configuration has the layout, and only then."""

from pathlib import Path

from megatron_tip.config.io import load_config
from megatron_tip.simulation.layouts import Layout, Servers, Sizes, layouts, token_limits

RECIPE = Path(__file__).parents[3] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"


def test_the_configured_layout_is_among_the_choices_and_needs_no_overrides():
    config = load_config(RECIPE, ["model.tensor_parallel_size=3", "training.offload=all"])
    own = Layout.of(config)
    assert own.overrides(config) == []
    assert own.student == Sizes(3, 1)
    assert any(one.shape == own.shape and one.recomputed == own.recomputed for one in layouts(config, 8))


def test_a_configuration_with_the_overrides_of_a_layout_has_it():
    config = load_config(RECIPE, [])
    every = list(layouts(config, 8))
    within_a_node = 4 + 3 + 2 + 1  # cp 1, 2, 4, 8 at tp 1, and so on
    assert len(set(every)) == len(every) == (within_a_node * 4) ** 2 * 4 * 3 * 3
    assert token_limits(config) == [8192, 16384, 32768]
    for layout in every[:: len(every) // 50]:
        found = load_config(RECIPE, layout.overrides(config))
        assert Layout.of(found) == layout
        assert found.model.sequence_parallel == (layout.student.tp > 1)


def test_sequence_parallelism_that_was_configured_off_stays_off():
    off = ["model.sequence_parallel=false"]
    one, two = (load_config(RECIPE, [*off, f"model.tensor_parallel_size={tp}"]) for tp in (1, 2))
    wide = Layout.of(load_config(RECIPE, ["model.tensor_parallel_size=4"]))
    assert "model.sequence_parallel=true" in wide.overrides(one)
    assert not any("sequence_parallel" in override for override in wide.overrides(two))


def test_a_teacher_that_is_the_student_has_its_sizes():
    self_teacher = ["teacher.kind=self", "teacher.path=models/Qwen3-4B", "teacher.tensor_parallel_size=2"]
    every = list(layouts(load_config(RECIPE, self_teacher), 8))
    assert len(every) == 40 * 4 * 3 * 3
    assert all(one.student == one.teacher for one in every)


def servers_of(overrides: list[str]) -> list[Servers]:
    return list(dict.fromkeys(one.servers for one in layouts(load_config(RECIPE, overrides), 8)))


def test_servers_are_varied_where_a_search_may():
    assert servers_of([]) == [Servers(1), Servers(2), Servers(4), Servers(8)]
    assert servers_of(["sglang.gpus=[0,1]"]) == [Servers(1, (0, 1)), Servers(2, (0, 1))]
    apart = ["sglang.share_gpus=false", "sglang.tensor_parallel_size=2"]
    assert servers_of(apart) == [Servers(2), Servers(2, (6, 7)), Servers(2, (4, 5, 6, 7))]
    for fixed in ("rollout.engine=embedded", "rollout.servers=8", 'rollout.server_urls=["http://a:1"]'):
        assert len(servers_of([fixed])) == 1, fixed
