"""Who runs where in every layout, and which layouts are refused, and why."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.errors import ConfigError
from megatron_tip.placement.hosts import Hosts
from megatron_tip.placement.placement import Placement, job_starts_students, num_workers_on, place
from megatron_tip.placement.slots import Place
from megatron_tip.placement.table import table_of

FOLDER = Path(__file__).parents[3] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*/*.toml") if path.name != "sweep.toml")
EIGHT = tuple(range(8))


def config_of(**sections: dict[str, Any]) -> Config:
    """A configuration with SGLang; `sections` are added to its sections."""
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": "runs/a"},
        "model": {"path": "models/student"},
        "teacher": {"path": "models/teacher"},
        "prompts": {"path": "prompts.parquet"},
        "rollout": {"engine": "sglang"},
        "training": {"steps": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


def on_node(workers: int, gpus: tuple[int, ...] = EIGHT, **values: Any) -> Hosts:
    return Hosts(workers, workers, gpus, **values)


def job(trainer_nodes: int, **values: Any) -> Hosts:
    """A job of nodes with eight GPUs and eight workers each."""
    return Hosts(8 * trainer_nodes, 8, EIGHT, **{"first_port": 31000, "by_job": True} | values)


def gpus_of(placement: Placement) -> list[list[tuple[int, int | None]]]:
    return [[(where.node, where.gpu) for where in server.places] for server in placement.students]


def assert_nothing_claimed_twice(placement: Placement) -> None:
    """No GPU has two trainer ranks or two servers; one with both is said to be shared, by each rank's name."""
    claims = [where for server in placement.servers for where in server.places if where.gpu is not None]
    assert len(claims) == len(set(claims))
    trained = [where for where in placement.trainers if where.gpu is not None]
    assert len(trained) == len(set(trained))
    for server in placement.servers:
        for where, sharer in zip(server.places, server.sharers or [None] * len(server.places), strict=True):
            assert (where in trained) == (sharer is not None and where.gpu is not None)
            assert sharer is None or placement.trainers[sharer] == where
    ports = [(server.nodes[0], port) for server in placement.servers for port in server.ports]
    assert len(ports) == len(set(ports))
    if placement.transport == "broadcast":  # NCCL refuses two ranks of one communicator on one GPU
        assert placement.trainers[0] not in claims or placement.trainers[0].gpu is None
    if placement.transport == "ipc":
        assert all(server.is_beside_trainers for server in placement.students)


def test_one_node_with_trainers_and_servers_on_the_same_gpus():
    config = config_of(sglang={"share_gpus": True})
    placement = place(config, on_node(8))
    assert_nothing_claimed_twice(placement)
    assert placement.trainers == tuple(Place(0, gpu) for gpu in EIGHT)
    assert gpus_of(placement) == [[(0, gpu)] for gpu in EIGHT]
    assert [server.sharers for server in placement.students] == [(gpu,) for gpu in EIGHT]
    assert (placement.transport, placement.memory_beside_trainers) == ("ipc", 0.3)
    assert all(server.memory_saver and server.port == 0 for server in placement.students)
    assert not job_starts_students(config, placement.hosts)


def test_wider_servers_on_the_trainers_gpus_know_the_rank_beside_each_of_theirs():
    placement = place(config_of(sglang={"share_gpus": True, "tensor_parallel_size": 4}), on_node(8))
    assert [server.sharers for server in placement.students] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_one_node_with_servers_on_gpus_of_their_own():
    config = config_of(rollout={"servers": 2})
    assert num_workers_on(config, 8) == 6
    placement = place(config, on_node(6))
    assert_nothing_claimed_twice(placement)
    assert gpus_of(placement) == [[(0, 6)], [(0, 7)]]
    assert [where.gpu for where in placement.trainers] == [0, 1, 2, 3, 4, 5]
    assert (placement.transport, placement.memory_beside_trainers) == ("broadcast", 0.0)
    assert not any(server.memory_saver or server.sharers for server in placement.students)


def test_workers_leave_the_named_gpus_to_servers():
    config = config_of(sglang={"gpus": (0, 1), "tensor_parallel_size": 2})
    assert num_workers_on(config, 8) == 6
    placement = place(config, on_node(6))
    assert gpus_of(placement) == [[(0, 0), (0, 1)]]
    assert [placement.visible_position(rank) for rank in range(6)] == [2, 3, 4, 5, 6, 7]
    with pytest.raises(ConfigError, match="LOCAL_RANK=6: expected at most 6 workers on each machine"):
        placement.visible_position(6)


def test_gpus_are_those_of_a_narrower_cuda_visible_devices():
    placement = place(config_of(sglang={"gpus": (6, 7)}), on_node(2, (4, 5, 6, 7)))
    assert [where.gpu for where in placement.trainers] == [4, 5]
    assert gpus_of(placement) == [[(0, 6)], [(0, 7)]]
    with pytest.raises(ConfigError, match=r"sglang.gpus: expected some of the visible GPUs \(4, 5, 6, 7\), got 0;"):
        place(config_of(sglang={"gpus": (0, 6)}), on_node(2, (4, 5, 6, 7)))


def test_a_job_has_servers_on_each_of_its_training_nodes():
    config = config_of(sglang={"share_gpus": True})
    placement = place(config, job(2))
    assert_nothing_claimed_twice(placement)
    assert job_starts_students(config, placement.hosts)
    assert len(placement.students) == 16
    assert [(one.nodes, one.port, one.sharers) for one in placement.students[7:9]] == [
        ((0,), 31007, (7,)),
        ((1,), 31000, (8,)),
    ]
    assert placement.transport == "ipc"
    fewer = place(config_of(sglang={"share_gpus": True}, rollout={"servers": 4}), job(2))
    assert gpus_of(fewer) == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]


def test_its_trainer_comes_to_the_same_servers_from_their_urls():
    """A worker knows the job's servers only by their URLs, in the placement's order."""
    by_script = place(config_of(sglang={"share_gpus": True}), job(2))
    urls = tuple(f"http://n{server.nodes[0]}:{server.port}" for server in by_script.students)
    in_worker = place(config_of(sglang={"share_gpus": True}, rollout={"server_urls": urls}), Hosts(16, 8, EIGHT))
    assert [(one.places, one.sharers) for one in in_worker.students] == [
        (one.places, one.sharers) for one in by_script.students
    ]
    assert in_worker.transport == "ipc"
    with pytest.raises(ConfigError, match=r"rollout.server_urls: expected 16 with sglang.share_gpus, .* got 15"):
        place(config_of(sglang={"share_gpus": True}, rollout={"server_urls": urls[1:]}), Hosts(16, 8, EIGHT))


def test_a_job_starts_no_servers_where_the_user_has_some():
    urls = tuple(f"http://mine:{port}" for port in range(30000, 30016))
    config = config_of(sglang={"share_gpus": True}, rollout={"server_urls": urls})
    placement = place(config, job(2))
    assert not job_starts_students(config, placement.hosts)
    assert [server.ports for server in placement.students] == [()] * 16
    assert job_starts_students(config, job(1, rollout_nodes=1)), "those replace the user's"


def test_a_job_leaves_servers_the_gpus_without_workers():
    hosts = Hosts(12, 6, EIGHT, first_port=31000, by_job=True)
    placement = place(config_of(rollout={"servers": 4}), hosts)
    assert_nothing_claimed_twice(placement)
    assert gpus_of(placement) == [[(0, 6)], [(0, 7)], [(1, 6)], [(1, 7)]]
    assert placement.transport == "broadcast"
    in_worker = config_of(rollout={"server_urls": ("http://n1:31000",)}, sglang={"gpus": (0, 1)})
    assert [where.gpu for where in place(in_worker, Hosts(6, 6, EIGHT)).trainers] == [2, 3, 4, 5, 6, 7]


def test_nodes_for_rollouts_and_nodes_for_the_teacher():
    config = config_of(sglang={"tensor_parallel_size": 2, "share_gpus": True}, teacher={"tensor_parallel_size": 4})
    placement = place(config, job(3, rollout_nodes=2, teacher_nodes=1))
    assert_nothing_claimed_twice(placement)
    assert {where.node for where in placement.trainers} == {0, 1, 2}
    assert gpus_of(placement) == [[(n, g), (n, g + 1)] for n in (3, 4) for g in (0, 2, 4, 6)]
    teachers = [server for server in placement.servers if server.role == "teacher"]
    assert [(one.nodes, one.gpus_on(5), one.port) for one in teachers] == [
        ((5,), (0, 1, 2, 3), 31000),
        ((5,), (4, 5, 6, 7), 31001),
    ]
    assert placement.transport == "broadcast"
    assert not any(server.sharers for server in placement.servers)


def test_a_server_over_two_nodes():
    config = config_of(sglang={"tensor_parallel_size": 16}, teacher={"tensor_parallel_size": 16})
    placement = place(config, job(1, rollout_nodes=4, teacher_nodes=2))
    assert_nothing_claimed_twice(placement)
    assert [server.nodes for server in placement.servers] == [(1, 2), (3, 4), (5, 6)]
    one = placement.students[0]
    assert (one.gpus_on(1), one.gpus_on(2), one.ports) == (EIGHT, EIGHT, (31000, 31001))
    shared = place(config_of(sglang={"tensor_parallel_size": 16, "share_gpus": True}), job(2))
    assert [server.sharers for server in shared.students] == [tuple(range(16))]
    assert (shared.transport, shared.handing_ranks) == ("ipc", tuple(range(16)))
    assert place(config_of(sglang={"share_gpus": True}, sync={"transport": "folder"}), job(2)).handing_ranks == ()


def test_a_cpu():
    placement = place(config_of(rollout={"servers": 3}, sglang={"tensor_parallel_size": 2}), on_node(2, ()))
    assert placement.trainers == (Place(0, None), Place(0, None))
    assert [server.sharers for server in placement.students] == [(0, 0)] * 3
    assert [server.memory_fraction for server in placement.students] == [0.5] * 3
    assert not any(server.memory_saver for server in placement.students)
    assert (placement.transport, placement.handing_ranks) == ("ipc", (0,))
    assert place(config_of(sync={"transport": "broadcast"}), on_node(2, ())).transport == "broadcast"
    apart = place(config_of(), Hosts(2, 1, (), rollout_nodes=1, by_job=True))
    assert ([server.nodes for server in apart.students], apart.transport) == ([(2,)], "broadcast")


def test_without_servers_there_are_only_trainers():
    placement = place(config_of(rollout={"engine": "embedded"}), on_node(8))
    assert (len(placement.trainers), placement.servers, placement.transport) == (8, (), None)
    given = place(config_of(rollout={"server_urls": ("http://n7:30000",)}), on_node(8))
    assert (given.servers, given.transport) == ((), "broadcast")
    assert num_workers_on(config_of(rollout={"engine": "embedded"}), 8) == 8


def test_files_are_left_where_neither_memory_nor_nccl_can_be_shared():
    """Server 0 is beside rank 0, server 1 has a GPU of its own."""
    config = config_of(sglang={"share_gpus": True, "gpus": (0, 7)})
    placement = place(config, on_node(4))
    assert [server.sharers for server in placement.students] == [(0,), ()]
    assert placement.transport == "folder"
    beside_others = place(config_of(sglang={"share_gpus": True, "gpus": (1, 7)}), on_node(4))
    assert beside_others.transport == "broadcast", "rank 0 alone is in the group with the servers"
    half = place(config_of(sglang={"share_gpus": True, "gpus": (3, 4), "tensor_parallel_size": 2}), on_node(4))
    assert [server.sharers for server in half.students] == [(3, None)]
    assert (half.transport, half.students[0].neighbours) == ("broadcast", ())


@pytest.mark.parametrize(
    "sections,hosts,expected_text",
    [
        ({}, on_node(8), "got 7 of 8: trainer rank 7 and a server would claim one GPU; set sglang.share_gpus = true"),
        ({"sglang": {"gpus": (0,)}}, on_node(8), "got 0 of 8: trainer rank 7 and a server would claim one GPU"),
        ({"sglang": {"gpus": (6, 6)}}, on_node(4), "sglang.gpus: expected different GPUs, got 6 twice"),
        ({"sglang": {"gpus": (8,)}}, on_node(4), "sglang.gpus: expected some of the visible GPUs (0, 1, 2, 3, 4, 5"),
        ({"sglang": {"gpus": (0,)}}, on_node(1, ()), "(none: it would run on the CPU), got 0"),
        ({"rollout": {"servers": 3}, "sglang": {"gpus": (6, 7)}}, on_node(4), "sglang.gpus: expected 3 for rollout."),
        ({"sglang": {"gpus": (5, 6, 7), "tensor_parallel_size": 2}}, on_node(4), "expected whole servers of"),
        ({"rollout": {"servers": 9}}, on_node(1), "rollout.servers: expected at most 8 servers of 1 GPUs"),
        (
            {"rollout": {"servers": 17}, "sglang": {"share_gpus": True}},
            job(2),
            "rollout.servers: expected a multiple of 2, at most 16 servers of 1 GPUs on 8 GPUs of 2 nodes, got 17",
        ),
        ({"rollout": {"servers": 3}}, job(1, rollout_nodes=2), "expected a multiple of 2, at most 16 servers"),
        ({"sglang": {"tensor_parallel_size": 12}}, job(1, rollout_nodes=2), "sglang.tensor_parallel_size: expected at"),
        ({"sglang": {"tensor_parallel_size": 16}}, job(1, rollout_nodes=3), "got 16 with 3 nodes"),
        (
            {"teacher": {"tensor_parallel_size": 16}},
            job(1, rollout_nodes=1, teacher_nodes=1),
            "teacher.tensor_parallel_size: expected at most the 8 GPUs that servers have on a node",
        ),
        (
            {"sglang": {"share_gpus": True, "memory_fraction": 0.95}},
            on_node(8),
            "sglang.memory_fraction: expected at most 0.9 on GPUs that the trainer shares, got 0.95",
        ),
        ({}, job(1, rollout_nodes=1, first_port=65530), "TIP_SGLANG_PORT=65530: expected ports from 1024 to 65535"),
        ({}, job(1, rollout_nodes=1, first_port=29995), "the trainer's (20000 to 29999, or MASTER_PORT), got 29995"),
        ({}, job(1, rollout_nodes=1, rendezvous_port=31003), "got 31003 for student server 3"),
        ({"rollout": {"engine": "embedded"}}, on_node(9), "workers: expected at most one per GPU, 8 on this machine"),
        (
            {"sglang": {"share_gpus": True}, "sync": {"transport": "broadcast"}},
            on_node(8),
            "got student server 0 on node 0, GPU 0; NCCL refuses two ranks of one communicator on one GPU",
        ),
        ({"sync": {"transport": "ipc"}}, on_node(7), "got student server 0 on node 0, GPU 7; set sync.transport = "),
        (
            {"sync": {"transport": "ipc"}, "rollout": {"server_urls": ("http://n7:1",)}},
            on_node(8),
            "got servers that are only given by URL",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(sections: dict[str, Any], hosts: Hosts, expected_text: str):
    with pytest.raises(ConfigError) as caught:
        place(config_of(**sections), hosts)
    assert expected_text in str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_every_recipe_has_a_placement_that_nccl_allows(path: Path, nodes: int):
    """As a job, whether its servers are beside the trainer or on nodes of their own."""
    config = load_config(path)
    served = config.rollout.engine == "sglang"
    if config.sglang.share_gpus or not served:
        placement = place(config, job(nodes))
        assert_nothing_claimed_twice(placement)
        assert placement.transport == ("ipc" if served else None)
        assert len(placement.students) == (8 * nodes if served else 0)
    if nodes > 1:
        apart = place(config, job(nodes - 1, rollout_nodes=1))
        assert_nothing_claimed_twice(apart)
        assert apart.transport == "broadcast"


def test_the_recipes_of_clusters_share_gpus():
    assert sum(load_config(path).sglang.share_gpus for path in EXAMPLES) == 8


def test_like_nodes_share_a_row_of_the_table():
    config = config_of(sglang={"share_gpus": True, "tensor_parallel_size": 4}, teacher={"tensor_parallel_size": 8})
    lines = table_of(place(config, job(4, teacher_nodes=1)))
    assert [line.split("  ")[0] for line in lines] == [*("nodes", "0-3", "0-3", "0-3", "4"), lines[-1]]
    cells = [[cell for cell in line.split("  ") if cell] for line in lines[1:-1]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["0-3", "trainer, ranks 0-31", "0-7"],
        ["0-3", "student servers 0, 2, 4, 6, tp 4", "0-3", "31000", "0.30", "0-3, 8-11, 16-19, 24-27"],
        ["0-3", "student servers 1, 3, 5, 7, tp 4", "4-7", "31001", "0.30", "4-7, 12-15, 20-23, 28-31"],
        ["4", "teacher server 0, tp 8", "0-7", "31000", "auto", "-"],
    ]
    assert lines[-1] == "weights: by IPC (ipc), from each trainer rank to the server beside it"
    assert not any(line.startswith("few servers") for line in lines)
    assert "  CPU  " in table_of(place(config_of(), on_node(1, ())))[1] + "  "


def test_one_server_for_many_workers_is_said():
    lines = table_of(place(config_of(sglang={"gpus": (7,)}), Hosts(56, 7, EIGHT)))
    assert lines[-1].startswith("few servers: 1 for 56 workers, which wait while it generates; raise rollout.servers")
    assert lines[-2].startswith("servers on the first node alone: a run that srun or torchrun starts has none on")
    by_job = table_of(place(config_of(sglang={"share_gpus": True}), job(8)))
    assert not any("first node alone" in line for line in by_job)
    assert not table_of(place(config_of(), on_node(7)))[-1].startswith("few servers")
