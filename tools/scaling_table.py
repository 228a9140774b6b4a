"""What grows with the number of ranks, from 8 to 1,024, as two tables; a part of it measured with real processes.

    python -m tools.scaling_table              the recipe Qwen3-14B -> 4B, with eight prompts per node and step
    python -m tools.scaling_table --check      1, 2, 4 and 8 gloo processes on this machine instead

Each size is a simulated world in which this process is rank 0: it creates the product's process groups and runs the
product's selection, the cut after it and the exchange of the selected rows; every message is counted. Rollouts with the
lengths of a typical batch are encoded, decoded and written by the product's code, in CPU seconds of this machine.
docs/scaling.md says what the columns mean.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch

from megatron_tip.batching.step_batch import StepBatch
from megatron_tip.config import Config
from megatron_tip.config.io import load_config
from megatron_tip.conversion.background_save import ShardedSave
from megatron_tip.conversion.model_size import num_parameters
from megatron_tip.machine import Machine
from megatron_tip.observability.timing import PhaseTimer
from megatron_tip.parallel.distributed import Worker
from megatron_tip.parallel.groups import ModelGroups, build_groups
from megatron_tip.planning.dtypes import Dtypes
from megatron_tip.planning.plan import Outline, outline_run, plan_run
from megatron_tip.records import Prompt, Rollout
from megatron_tip.rollout.codec import decode_rollouts, encode_rollouts
from megatron_tip.rollout.storage import rollout_file, write_rollouts
from megatron_tip.selection import Selector
from megatron_tip.simulation.assumptions import STEP, AssumedSelection, OwnReplica, assumed_rollouts
from megatron_tip.simulation.ledger import Ledger
from megatron_tip.simulation.plan import as_simulated, planned_hosts
from megatron_tip.simulation.rank import step_batch
from megatron_tip.simulation.tensors import CountedTensors
from megatron_tip.simulation.world import Answers, simulated_world
from megatron_tip.teachers.megatron import HiddenRows, MegatronTeacher
from megatron_tip.training.checkpoints.student_state import sharded_state
from megatron_tip.training.setup import build_run
from megatron_tip.training.step import cut_to_selection
from megatron_tip.training.supervision import Scored

RECIPE = Path(__file__).parents[1] / "examples" / "qwen3_14b_to_4b" / "qwen3_14b_to_4b.toml"
NODES = (1, 8, 32, 128)
PROMPTS_PER_NODE = 8
"""As the recipe has on its eight nodes."""
OPTIMIZER_BYTES = 12
"""Of a parameter in a checkpoint: the float32 weight and two moments (`distributed_optimizer_state.whole_state`)."""
PAIR_BYTES, GROUP_BYTES = 544 * 2**20, 688 * 2**20
"""What a communicator of two ranks and one of more took on four A100s with NVLink: github.com/NVIDIA/nccl/issues/964.

It depends on links, channels and NCCL's version: an order of magnitude.
"""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Messages:
    """Bytes of rank 0's messages. `selecting`: of the selection; `cutting`: of the last selected place of each rollout.

    The selected rows themselves are left out: each rank sends its own, however many ranks there are.
    """

    selecting: float
    cutting: float


def configured(nodes: int) -> tuple[Config, Outline]:
    """Returns the recipe on `nodes` nodes of eight GPUs, with as many prompts per node as on its own nodes."""
    config = as_simulated(load_config(RECIPE, [f"rollout.prompts_per_step={PROMPTS_PER_NODE * nodes}"]))
    hosts = planned_hosts(config, nodes, 8)
    return config, outline_run(config, hosts.workers, Machine(is_elsewhere=True), hosts)


@dataclass(frozen=True)
class Groups:
    """The sizes of a rank's process groups of several ranks. `meshes`: of those that also have gloo, on a GPU."""

    sizes: list[int]
    meshes: list[int]

    @classmethod
    def of(cls, student: ModelGroups, teacher: ModelGroups) -> "Groups":
        """Returns the groups of both models and the world's."""
        world = torch.distributed.group.WORLD
        every = [world, *(group for one in (student, teacher) for group in vars(one.collection).values())]
        return cls(_sizes(every), _sizes([world, student.dp_cp_group, teacher.dp_cp_group]))


def _sizes(groups: Iterable[object]) -> list[int]:
    distinct = {id(group): group for group in groups if isinstance(group, torch.distributed.ProcessGroup)}
    return [size for size in (group.size() for group in distinct.values()) if size > 1]


def simulated_messages(selector: Selector, batch: StepBatch, outline: Outline) -> Messages:
    """Returns what rank 0 sends from the selection up to the training pass, in a world with `outline`'s layout.

    Rank 0 must be on the last stage.
    """
    ledger, answers = Ledger(), Answers()
    assumed = AssumedSelection.of(selector, batch, takes_one_pass=False)
    with simulated_world(ledger, answers, rank=0, world_size=outline.student_grid.world_size):
        groups = build_groups(outline.student_grid)
        (statistics,) = assumed.statistics_of(0, [len(batch.token_index(0))])
        selector.select_among(OwnReplica(groups.dp_group), statistics, batch.token_index(0), STEP)
        selecting = sum(traffic.num_bytes for traffic in ledger.traffic.values())
        answers.replicas.append(assumed.last_selected)
        answers.replicas.extend(assumed.arrivals(0) if groups.dp_cp_group.size() > 1 else ())
        rows = HiddenRows(torch.zeros(len(batch.token_index(0)), 1))
        cut_to_selection(groups, Scored(batch, rows, statistics, None), assumed.selection_of(0))
    moved = sum(traffic.num_bytes for route, traffic in ledger.traffic.items() if route.operation != "all_to_all")
    return Messages(selecting, moved - selecting)


def messages_of_step(config: Config, outline: Outline) -> Messages:
    """Returns `simulated_messages` of a typical step, with short responses: messages do not grow with rows."""
    short = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_response_tokens": 512})})
    batch = step_batch(short, outline, assumed_rollouts(short, longest=False))
    return simulated_messages(outline.selector, batch, outline)


def timed(action: Callable[[], Value]) -> tuple[Value, float]:
    """Returns what `action` returns, and the CPU seconds that it took."""
    start = time.process_time()
    value = action()
    return value, time.process_time() - start


def with_random_ids(rollouts: Sequence[Rollout], vocab_size: int) -> list[Rollout]:
    """Returns the rollouts with ids and log-probabilities that have as many digits as real ones."""
    generator = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return generator.integers(vocab_size, size=count)

    return [
        replace(
            one,
            prompt_ids=ids(len(one.prompt_ids)),
            response_ids=ids(len(one.response_ids)),
            rollout_logprobs=np.log(generator.random(len(one.response_ids))),
        )
        for one in rollouts
    ]


def growth_row(nodes: int) -> str:
    """Returns the row of what is sent and done in a step."""
    config, outline = configured(nodes)
    sent = messages_of_step(config, outline)
    rollouts = with_random_ids(assumed_rollouts(config, longest=False), outline.vocab_size)
    prompts = [Prompt(place, "", ()) for place in range(config.rollout.prompts_per_step)]
    content, encoding = timed(lambda: encode_rollouts(rollouts))
    _, decoding = timed(lambda: decode_rollouts(content))
    with tempfile.TemporaryDirectory() as folder:
        _, writing = timed(lambda: write_rollouts(Path(folder), "step", rollouts, prompts))
        file_bytes = rollout_file(Path(folder), "step").stat().st_size
    _, laying = timed(lambda: step_batch(config, outline, rollouts))
    cells = (
        f"{outline.student_grid.world_size:,}",
        f"{len(rollouts):,}",
        f"{sent.selecting / 2**10:.1f}",
        f"{sent.cutting / 2**10:.1f}",
        f"{len(content) / 2**20:.1f}",
        f"{encoding:.2f}",
        f"{file_bytes / 2**20:.1f}",
        f"{writing:.1f}",
        f"{decoding + laying:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def standing_row(nodes: int) -> str:
    """Returns the row of what stands during a run: groups, their sockets and memory, checkpoints."""
    config, outline = configured(nodes)
    world_size = outline.student_grid.world_size
    with simulated_world(Ledger(), Answers(), rank=0, world_size=world_size):
        student = build_groups(outline.student_grid)
        # as `build_run` does
        same = outline.teacher_grid == outline.student_grid
        groups = Groups.of(student, student if same else build_groups(outline.teacher_grid))
    memory = sum(PAIR_BYTES if size == 2 else GROUP_BYTES for size in groups.sizes)
    checkpoint = checkpoint_bytes(config, outline)
    cells = (
        f"{world_size:,}",
        f"{len(groups.sizes)}",
        f"{memory / 2**30:.1f}",
        f"{sum(size - 1 for size in groups.meshes):,}",
        f"{checkpoint / world_size / 2**20:,.0f}",
        f"{checkpoint / 2**30:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def checkpoint_bytes(config: Config, outline: Outline) -> int:
    """Returns the bytes of a checkpoint's tensors: the student's weights and its optimizer's state."""
    each = Dtypes.of(config).student.itemsize + OPTIMIZER_BYTES
    return num_parameters(outline.student.architecture) * each


def main() -> None:
    """Prints the tables, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES, help="sizes, in nodes of eight GPUs")
    parser.add_argument("--check", action="store_true", help="compare with real processes on this machine")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.check:
        sys.exit(0 if check() else 1)
    encode_rollouts([])  # the first call imports a part of Arrow
    titles = ("selection, KiB", "cut, KiB", "sent, MiB", "encode, s", "file, MiB", "write, s", "read on each rank, s")
    _print_table(("ranks", "rollouts", *titles), growth_row, arguments.nodes)
    titles = ("groups", "NCCL, GiB", "gloo sockets", "checkpoint per rank, MiB", "in all, GiB")
    _print_table(("ranks", *titles), standing_row, arguments.nodes)


def _print_table(titles: Sequence[str], row: Callable[[int], str], sizes: Sequence[int]) -> None:
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for nodes in sizes:
        print(row(nodes), flush=True)
    print()


@dataclass(frozen=True)
class Measured:
    """What one real process found. `selecting`: as in `Messages`. `sockets`: that are connected; `num_peers`: ranks
    beside it in each of its groups, added up. `file_bytes`: of its file of a checkpoint.
    """

    selecting: float
    sockets: int
    num_peers: int
    file_bytes: int


def check(counts: Sequence[int] = (1, 2, 4, 8)) -> bool:
    """Compares worlds of real gloo processes with simulated ones, prints both; returns whether they agree.

    The selection's bytes may differ by a tenth: real replicas search among the rows of all, a simulated one among its
    own, and each search sends 8 KiB for each prefix that is left.
    """
    from tests.helpers.distributed import run_workers
    from tests.helpers.training import Layout, make_config, make_models

    agree = True
    print("| processes | selection, KiB | simulated | sockets | pairs | checkpoint, KiB | counted | largest file |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        for count in counts:
            layout = Layout(count, (1, 1), (min(count, 2), 1))
            sections = {
                "rollout": {"prompts_per_step": 16, "max_response_tokens": 64},
                "optimizer": {"distributed": True},
            }
            config = make_config(models, layout, **sections)
            outline = outline_run(config, count, Machine(is_elsewhere=True))
            batch = step_batch(config, outline, assumed_rollouts(config, longest=False))
            (shards := Path(folder, f"shards_{count}")).mkdir()
            found = run_workers(measure, count, models, config, batch, shards, timeout_seconds=600)
            simulated = simulated_messages(outline.selector, batch, outline).selecting
            files, counted = [one.file_bytes for one in found], checkpoint_bytes(config, outline)
            first = found[0]
            agree &= abs(first.selecting - simulated) <= 0.1 * simulated and first.sockets == first.num_peers
            cells = (first.selecting / 2**10, simulated / 2**10, first.sockets, first.num_peers)
            sizes = (sum(files) / 2**10, counted / 2**10, max(files) / 2**10)
            print(f"| {count} | {' | '.join(f'{cell:.0f}' for cell in (*cells, *sizes))} |", flush=True)
    return agree


def measure(config: Config, batch: StepBatch, folder: Path) -> Measured:
    """Returns what this process of a gloo world finds in the same steps. Collective over the world."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = Worker(rank, world_size, rank, torch.device("cpu"))
    plan = plan_run(config, world_size)
    run = build_run(config, plan, worker, PhaseTimer(worker.device), num_threads=1, generates=False)
    groups, teacher = run.student.groups, run.teacher
    assert isinstance(teacher, MegatronTeacher), "as the configuration says"
    assumed, ledger = AssumedSelection.of(plan.selector, batch, takes_one_pass=False), Ledger(rank)
    (statistics,) = assumed.statistics_of(groups.dp_cp_rank, [len(batch.token_index(groups.dp_cp_rank))])
    with CountedTensors(ledger):
        plan.selector.select(statistics, batch.token_index(groups.dp_cp_rank), step=STEP, dp_group=groups.dp_group)
    save = ShardedSave(sharded_state(run.student, run.teacher), folder, copies=False, sharers=groups.dp_cp_group)
    save.write()
    save.finish()
    return Measured(
        selecting=sum(traffic.num_bytes for traffic in ledger.traffic.values()),
        sockets=_num_sockets(),
        num_peers=sum(size - 1 for size in Groups.of(groups, teacher.groups).sizes),
        file_bytes=sum(path.stat().st_size for path in folder.glob(f"__{rank}_*")),
    )


def _num_sockets() -> int:
    """Returns the number of this process's connected sockets."""
    return sum(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process().net_connections("tcp"))


if __name__ == "__main__":
    main()
