"""Tokens per second of each phase, and model FLOPs utilisation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_tip.config import Config
from megatron_tip.conversion.architecture import ModelArchitecture
from megatron_tip.conversion.model_size import forward_flops, head_flops
from megatron_tip.parallel.distributed import Worker
from megatron_tip.planning.plan import RunPlan
from megatron_tip.teachers.setup import teacher_kind

PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Part of the GPU's name -> peak bfloat16 TFLOP/s without sparsity, from NVIDIA's data sheets of the SXM boards."""


@dataclass(frozen=True)
class Throughput:
    """Throughput metrics from the counts and durations of a step.

    `teacher`: None if it is behind servers, whose work is not counted. `peak_tflops`: of one worker's device; 0 if
    unknown, which leaves out utilisation.
    """

    student: ModelArchitecture
    teacher: ModelArchitecture | None
    world_size: int
    peak_tflops: float

    @classmethod
    def of_run(cls, config: Config, plan: RunPlan, worker: Worker) -> "Throughput":
        """Returns the `Throughput` of a planned run on its workers' devices."""
        return cls(
            plan.student.architecture,
            (plan.teacher or plan.student).architecture if teacher_kind(config).has_weights else None,
            worker.world_size,
            config.monitoring.peak_tflops or peak_tflops_of(worker.device),
        )

    def metrics(self, step: Mapping[str, float]) -> dict[str, float]:
        """Returns the `perf/...` metrics of a step from its other metrics:

        - `<phase>_tokens_per_second`: for rollout, generated tokens; for teacher and score, prompt and response tokens
          without padding; for train, those left after the cut to the selection; for `step`, generated tokens over the
          duration of the whole step, held-out measurement excluded;
        - `<phase>_tflops_per_rank` of teacher, score and train: model FLOPs, recomputation not counted. Train counts
          three forward passes of the student's layers, without the first if score's was held (`train/one_pass`), and
          the heads on selected rows only;
        - `<phase>_mfu`: `<phase>_tflops_per_rank` over `peak_tflops`.
        """
        seconds = {phase: step.get(f"time/{phase}_seconds", 0.0) for phase in ("rollout", "teacher", "score", "train")}
        tokens = {
            "rollout": step.get("rollout/response_tokens", 0.0),
            "teacher": step.get("train/num_teacher_tokens", step.get("train/num_model_tokens_uncut", 0.0)),
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
        passes = 2 if step.get("train/one_pass") else 3
        flops = {
            "score": forward_flops(self.student, num_tokens=scored, mean_length=length)
            + head_flops(self.student, num_rows=rows),
            "train": passes * forward_flops(self.student, num_tokens=trained, mean_length=length)
            + 3 * head_flops(self.student, num_rows=selected),
        }
        if self.teacher is not None:
            flops["teacher"] = forward_flops(self.teacher, num_tokens=scored, mean_length=length)
            flops["score"] += head_flops(self.teacher, num_rows=rows)
            flops["train"] += head_flops(self.teacher, num_rows=selected)
        return flops


def peak_tflops_of(device: torch.device) -> float:
    """Returns the peak of `device` in PEAK_TFLOPS, or 0 if its name is not there."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)
