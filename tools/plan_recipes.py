"""Plans the recipes for GPUs at their own size, and prints a table; names those that a plan does not simulate.

    python -m tools.plan_recipes [--gpu h800] [--nodes 8] [RECIPE ...]

The columns: GiB and phase of the fullest GPU with the longest batch, the estimate of `train --dry-run` in GiB, and of a
typical step its seconds, the phase that takes most of them, response tokens per second and GPU hours of the whole run.
"""

import argparse
import os
import time
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "examples"


def recipes_for_gpus() -> list[Path]:
    """Returns the recipes whose models generate on SGLang servers beside the trainer's ranks."""
    paths = sorted(RECIPES.glob("*/*.toml"))
    return [path for path in paths if "share_gpus = true" in path.read_text()]


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names of folders in examples/; default: all for GPUs")
    parser.add_argument("--gpu", default="h800")
    parser.add_argument("--nodes", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the simulated tensors are the CPU's
    paths = [path for path in recipes_for_gpus() if not arguments.recipes or path.parent.name in arguments.recipes]
    title = f"recipe, {8 * arguments.nodes} x {arguments.gpu}"
    print(f"| {title} | GiB | phase | estimate | step, s | bound by | tokens/s | hours |")
    print("|---|---|---|---|---|---|---|---|")
    start = time.perf_counter()
    for path in paths:
        print(_row(path, arguments.gpu, arguments.nodes), flush=True)
    print(f"\n{len(paths)} recipes in {time.perf_counter() - start:.0f} s")


def _row(path: Path, gpu: str, nodes: int) -> str:
    from megatron_tip.config.io import load_config
    from megatron_tip.errors import MegatronTipError
    from megatron_tip.planning.memory_estimate import UNCOUNTED, estimate_memory
    from megatron_tip.simulation.device import find_device
    from megatron_tip.simulation.plan import make_plan, planned_hosts

    config, device = load_config(path, []), find_device(gpu)
    try:
        plan = make_plan(config, planned_hosts(config, nodes, 8), device)
    except MegatronTipError as refusal:
        return f"| {path.parent.name} | refused: {str(refusal).split(', which')[0]} | | | | | | |"
    estimate = estimate_memory(config, plan.outline, gpu_memory_gib=device.memory_gib)
    counted = max(sum(parts.values()) - parts[UNCOUNTED] for parts in estimate.phases.values())
    seconds, generation = plan.step_seconds("typical"), plan.generation["typical"]
    phases = {"rollout": generation.seconds, **plan.phase_seconds("typical")}
    cells = (
        path.parent.name,
        f"{plan.fullest.peak_bytes / 2**30:.1f}",
        plan.fullest.peak_phase,
        f"{counted / 2**30:.1f}",
        f"{seconds:.1f}",
        max(phases, key=lambda name: phases[name]),
        f"{generation.num_tokens / seconds:,.0f}",
        f"{plan.gpu_hours('typical'):,.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
