"""Tokens per second of each phase, and the share of the devices' peak that the model's own operations make up."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import forward_flops, head_flops
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import RunPlan

PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bfloat16 TFLOP/s by a part of the GPU's name: SXM boards, NVIDIA's data sheets, without sparsity."""


@dataclass(frozen=True)
class Throughput:
    """What a step's counts and seconds say about speed.

    `teacher`: None where it is behind servers, whose work is not counted.
    `peak_tflops`: of one worker's device; 0 where it is not known, and utilisation is left out.
    """

    student: ModelArchitecture
    teacher: ModelArchitecture | None
    world_size: int
    peak_tflops: float

    @classmethod
    def of_run(cls, config: Config, plan: RunPlan, worker: Worker) -> "Throughput":
        """Returns that of a planned run on the devices of its workers."""
        return cls(
            plan.student.architecture,
            plan.teacher.architecture if plan.teacher else None,
            worker.world_size,
            config.monitoring.peak_tflops or peak_tflops_of(worker.device),
        )

    def metrics(self, step: Mapping[str, float]) -> dict[str, float]:
        """Returns `perf/...` of a step's metrics:

        - `<phase>_tokens_per_second`: rollout: generated; teacher, score: prompts and responses, padding not counted;
          train: those left by the cut behind the selection; `step`: generated, over the whole step's seconds;
        - `<phase>_tflops_per_rank` of teacher, score and train: the operations that the mathematics needs, whatever
          was recomputed. Train counts three forward passes of the layers, and of the heads on the selected rows alone;
        - `<phase>_mfu`: those over `peak_tflops`.
        """
        seconds = {phase: step.get(f"time/{phase}_seconds", 0.0) for phase in ("rollout", "teacher", "score", "train")}
        tokens = {
            "rollout": step.get("rollout/response_tokens", 0.0),
            "teacher": step.get("train/num_model_tokens_uncut", 0.0),
            "score": step.get("train/num_model_tokens_uncut", 0.0),
            "train": step.get("train/num_model_tokens", 0.0),
        }
        found = {
            f"perf/{phase}_tokens_per_second": tokens[phase] / seconds[phase]
            for phase in seconds
            if seconds[phase] and tokens[phase]
        }
        timed = {name: value for name, value in step.items() if name.startswith("time/")}
        total = sum(timed.values()) - timed.get("time/heldout_seconds", 0.0)
        if total and tokens["rollout"]:
            found["perf/step_tokens_per_second"] = tokens["rollout"] / total
        for phase, flops in self._flops(step).items():
            if seconds[phase] and flops:
                tflops = flops / seconds[phase] / self.world_size / 1e12
                found[f"perf/{phase}_tflops_per_rank"] = tflops
                if self.peak_tflops:
                    found[f"perf/{phase}_mfu"] = tflops / self.peak_tflops
        return found

    def _flops(self, step: Mapping[str, float]) -> dict[str, float]:
        sequences = step.get("rollout/num_rollouts", 0.0) - step.get("rollout/num_empty", 0.0)
        scored, trained = (step.get(f"train/num_model_tokens{cut}", 0.0) for cut in ("_uncut", ""))
        rows, selected = (step.get(f"selection/num_{kind}", 0.0) for kind in ("valid", "selected"))
        length = scored / sequences if sequences else 0.0
        flops = {
            "score": forward_flops(self.student, num_tokens=scored, mean_length=length)
            + head_flops(self.student, num_rows=rows),
            "train": 3 * forward_flops(self.student, num_tokens=trained, mean_length=length)
            + 3 * head_flops(self.student, num_rows=selected),
        }
        if self.teacher is not None:
            flops["teacher"] = forward_flops(self.teacher, num_tokens=scored, mean_length=length)
            flops["score"] += head_flops(self.teacher, num_rows=rows)
            flops["train"] += head_flops(self.teacher, num_rows=selected)
        return flops


def peak_tflops_of(device: torch.device) -> float:
    """Returns the dense bfloat16 peak of `device` by its name, 0 if it is not in the table."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
