"""TRL's part of tools/bench_step.py, for an interpreter that has trl; does not need megatron_tip.

python tools/bench_step_trl.py TASK.json RESULT.json
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingImports]  (of another environment)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]


class StepClock(TrainerCallback):
    """Measures each step's seconds, those of generation and teacher within it, and its response tokens."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._spent: dict[str, float] = {}
        self._tokens = 0
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._spent = {"rollout": 0.0, "teacher": 0.0}
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self._start
        phases = {**self._spent, "train": seconds - sum(self._spent.values())}
        self.steps.append({"seconds": seconds, "phases": phases, "response_tokens": self._tokens})

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` with its time charged to `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._spent[phase] += time.perf_counter() - start
            return result

        return call

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns TRL's loss, counting the response tokens in the mask that it gets."""

        def call(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._tokens = int(inputs["completion_mask"].sum())
            return function(model, inputs, *args, **kwargs)

        return call


def main(task_path: Path, result_path: Path) -> None:
    task = json.loads(task_path.read_text())
    questions = [json.loads(line)["prompt"] for line in Path(task["prompts"]).read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(task[key], dtype="float32") for key in ("student", "teacher")
    ]
    student, teacher = models
    clock = StepClock()
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config_of(task),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(task["student"], padding_side="left"),
        callbacks=[clock],
    )
    student.generate = clock.timed("rollout", student.generate)
    teacher.base_model.forward = clock.timed("teacher", teacher.base_model.forward)
    trainer.compute_loss = clock.counted(trainer.compute_loss)
    trainer.train()
    trainer.save_model(task["output"])
    result_path.write_text(json.dumps(clock.steps))


def config_of(task: dict[str, Any]) -> DistillationConfig:
    """Returns the settings for the same work as ours; the rest are TRL's, except what would only slow it down."""
    optimizer = task["optimizer"]
    return DistillationConfig(
        output_dir=task["output"],
        max_steps=task["steps"],
        per_device_train_batch_size=task["prompts_per_step"],
        max_completion_length=task["response_tokens"],
        shuffle_dataset=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=1.0,  # the reverse KL
        learning_rate=optimizer["lr"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["epsilon"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["clip_grad"],
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,  # its default; we do not recompute either
        use_cpu=True,
        seed=task["seed"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
