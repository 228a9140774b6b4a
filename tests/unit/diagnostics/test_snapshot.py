"""That the student is set back to its start; over whole models: tests/distributed/test_diagnostics.py."""

from types import SimpleNamespace

import torch

from megatron_tip.diagnostics import snapshot
from megatron_tip.diagnostics.snapshot import StudentStart


class CountingAdam(torch.optim.Adam):
    """Keeps its step count in the group from its first step on, as Transformer Engine's and Apex's FusedAdam do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                parameter.data -= self.state[parameter]["exp_avg"] / (1 - 0.9 ** group["step"])


def test_a_step_count_that_the_optimizer_keeps_in_its_groups_begins_anew(monkeypatch):
    model = torch.nn.Linear(3, 2)
    adam = CountingAdam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        adam.state[parameter] = {"exp_avg": torch.zeros_like(parameter)}
    optimizer = SimpleNamespace(param_groups=adam.param_groups, chained_optimizers=[SimpleNamespace(optimizer=adam)])
    student = SimpleNamespace(model=model, optimizer=optimizer, scheduler=SimpleNamespace(num_steps=0))
    monkeypatch.setattr(snapshot, "complete_optimizer_state", lambda _: None)
    start = StudentStart(student)  # type: ignore[arg-type]
    trained = []
    for _ in range(3):
        start.restore()
        adam.step()
        adam.step()
        trained.append(model.weight.detach().clone())
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
