"""A teacher with a prompt of its own, and the student as its own teacher: frozen, live, and a moving average."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tip.config import Config
from megatron_tip.conversion.bridge import export_hf
from megatron_tip.records import Rollout
from megatron_tip.teachers.own import AverageTeacher
from megatron_tip.training.checkpoints.files import CheckpointFiles
from megatron_tip.training.checkpoints.progress import RunProgress
from megatron_tip.training.checkpoints.resume import restore
from megatron_tip.training.run import TrainingRun
from tests.helpers.checkpoints import checkpointer_of, take_step
from tests.helpers.distributed import run_workers
from tests.helpers.first_step import selected_and_gradients
from tests.helpers.training import Layout, build_tiny_run, make_config, make_models, make_rollouts

ROLLOUTS = [
    replace(rollout, teacher_prompt_ids=range(30, 50 + 3 * place))
    for place, rollout in enumerate(make_rollouts([12, 0, 7, 15, 9, 1]))
]
ALL = {"rule": "full", "retention_ratio": 1.0}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), tied=request.param)


def own_config(models: Path, layout: Layout, update: str, **sections: Any) -> Config:
    dtype = sections.get("model", {}).get("dtype", "float32")
    teacher = {"kind": "self", "path": models / "student", "update": update, "dtype": dtype}
    if update == "average":
        teacher["ema_decay"] = 0.75
    values = {"selection": ALL, "prompts": {"teacher_system_prompt": "hint", "max_teacher_prompt_tokens": 100}}
    return make_config(models, layout, teacher=teacher, **(values | sections))


def reference(student: Any, teacher: Any, rollouts: list[Rollout]) -> torch.Tensor:
    """Mean KL(p || q) over all response tokens, with the prompts that each model reads; float64, differentiable."""
    losses = []
    for rollout in rollouts:
        if not len(rollout.response_ids):
            continue

        def logprobs(model: Any, prompt: Any, response: Any = rollout.response_ids) -> torch.Tensor:
            ids = torch.tensor([[*prompt, *response]])
            return model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]

        log_p = logprobs(student, rollout.prompt_ids)
        with torch.no_grad():
            log_q = logprobs(teacher, rollout.teacher_prompt_ids)
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(losses).mean()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("update", ["", "frozen", "live", "average"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(2),
        Layout(2, student=(2, 1), sequence_parallel=True),
        Layout(4, student=(2, 2)),
        Layout(4, cp=(2, 2)),
    ],
    ids=str,
)
def test_the_teacher_reads_its_own_prompt(models: Path, layout: Layout, update: str, tmp_path: Path):
    """At the first step the student's own teacher is the student, whichever way it follows."""
    if update:
        config, teacher = own_config(models, layout, update), "student"
    else:
        other = replace(layout, teacher=(layout.world_size, 1), cp=(layout.cp[0], 1))
        config, teacher = make_config(models, other, selection=ALL), "teacher"
    ranks = run_workers(selected_and_gradients, layout.world_size, tmp_path, config, ROLLOUTS)
    student = loaded(models / "student")
    loss = reference(student, loaded(models / teacher), ROLLOUTS)
    loss.backward()
    assert sum(part for _, part, _ in ranks) == pytest.approx(loss.item(), rel=1e-5)
    exported = ranks[0][2]
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(exported[name].double(), parameter.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("cp", [(2, 2), (2, 4), (1, 2), (4, 2)], ids=str)
def test_both_prompts_are_read_in_parts(cp: tuple[int, int], tmp_path: Path):
    """Chunks of the teacher's sequences end at other tokens than the student's."""
    models = make_models(tmp_path)
    whole = run_workers(selected_and_gradients, 1, tmp_path, make_config(models, Layout(1)), ROLLOUTS)[0]
    config = make_config(models, Layout(4, cp=cp))
    ranks = run_workers(selected_and_gradients, 4, tmp_path, config, ROLLOUTS)
    assert sorted(row for selected, _, _ in ranks for row in selected) == sorted(whole[0])
    assert sum(part for _, part, _ in ranks) == pytest.approx(whole[1], rel=1e-5)
    for name, gradient in whole[2].items():
        torch.testing.assert_close(ranks[0][2][name], gradient, rtol=2e-4, atol=2e-6)


def weights_of(run: TrainingRun, model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under Hugging Face names, on rank 0."""
    groups = run.student.groups
    found = export_hf(model, run.architecture, groups) if groups.dp_rank == 0 else ()
    return {name: tensor.clone() for name, tensor in found}


def followed(config: Config, folder: Path) -> dict[str, Any]:
    """Two steps, saved, and two more; and the same two from the checkpoint, on a run built anew."""
    run, files = build_tiny_run(config, ROLLOUTS), CheckpointFiles(folder / "checkpoints")
    teacher = run.teacher
    students, metrics = [weights_of(run, run.student.model)], []
    for step in (1, 2):
        metrics.append(take_step(run, step))
        students.append(weights_of(run, run.student.model))
    average = weights_of(run, teacher.model) if isinstance(teacher, AverageTeacher) else {}
    checkpointer = checkpointer_of(run, files)
    checkpointer.save(RunProgress(step=2))
    checkpointer.finish()
    straight = [take_step(run, step) for step in (3, 4)]
    resumed_run = build_tiny_run(config, ROLLOUTS)
    restore(resumed_run, files, 2)
    resumed = [take_step(resumed_run, step) for step in (3, 4)]
    shares = getattr(teacher, "model", None) is run.student.model
    return {
        "students": students,
        "average": average,
        "straight": straight,
        "resumed": resumed,
        "shares": shares,
        "metrics": metrics,
    }


@pytest.mark.parametrize("update", ["frozen", "live", "average"])
@pytest.mark.parametrize(
    "layout,dtype,distributed",
    [
        (Layout(2, student=(2, 1)), "float32", False),
        (Layout(2, student=(1, 2)), "bfloat16", False),
        (Layout(2), "float32", True),
    ],
    ids=["tp2", "pp2-bf16", "dp2-distributed"],
)
def test_it_follows_and_resumes_exactly(
    models: Path, layout: Layout, dtype: str, distributed: bool, update: str, tmp_path: Path
):
    types = {"model": {"dtype": dtype}, "optimizer": {"distributed": distributed, "lr": 1e-2}}
    config = own_config(models, layout, update, **types)
    ranks = run_workers(followed, 2, tmp_path, config, tmp_path)
    for found in ranks:
        assert found["resumed"] == found["straight"]
        assert found["shares"] is (update == "live")
    first = ranks[0]
    if update != "average":
        return
    start, one, two = first["students"]
    for name, average in first["average"].items():
        expected = 0.75 * (0.75 * start[name].double() + 0.25 * one[name].double()) + 0.25 * two[name].double()
        rtol, atol = (1e-6, 1e-7) if dtype == "float32" else (4e-3, 1e-5)
        torch.testing.assert_close(average.double(), expected, rtol=rtol, atol=atol)
        assert not torch.equal(average, two[name]) or torch.equal(start[name], two[name])


def two_steps(configs: list[Config]) -> list[dict[str, float]]:
    """The metrics of each configuration's second step, before which the teacher has followed the student once."""
    found = []
    for config in configs:
        run = build_tiny_run(config, ROLLOUTS)
        take_step(run, 1)
        found.append(take_step(run, 2))
    return found


@pytest.mark.parametrize("update", ["live", "average"])
def test_one_pass_is_two(models: Path, update: str, tmp_path: Path):
    selection = {"rule": "ta_opd_teachability", "retention_ratio": 0.3}
    steady = {"lr": 1e-2, "epsilon": 1e-2}  # gradients close to 0 do not become steps of the full size
    configs = [
        own_config(models, Layout(2), update, selection=selection | {"passes": passes}, optimizer=steady)
        for passes in ("one", "two")
    ]
    for one, two in run_workers(two_steps, 2, tmp_path, configs):
        assert (one["train/one_pass"], two["train/one_pass"]) == (1.0, 0.0)
        assert one["train/loss"] > 0
        for name in ("selection/num_selected", "selection/threshold", "train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
