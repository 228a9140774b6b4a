"""What "auto" comes to is decided once, for the run, its servers and the estimate of memory."""

from pathlib import Path

import pytest
import torch

from megatron_tip.planning.dtypes import Dtypes
from tests.helpers.training import Layout, make_config

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "names,on_gpu,expected",
    [
        (("auto", "auto", "auto"), True, (BFLOAT16, BFLOAT16, BFLOAT16)),
        (("auto", "auto", "auto"), False, (FLOAT32, FLOAT32, FLOAT32)),
        (("float32", "bfloat16", "auto"), True, (FLOAT32, BFLOAT16, FLOAT32)),  # the engine's: that of the student
        (("bfloat16", "float32", "float32"), False, (BFLOAT16, FLOAT32, FLOAT32)),
    ],
)
def test_auto_is_resolved(names: tuple[str, str, str], on_gpu: bool, expected: tuple[torch.dtype, ...]):
    sections = {section: {"dtype": name} for section, name in zip(("model", "teacher", "rollout"), names, strict=True)}
    dtypes = Dtypes.of(make_config(Path("models"), Layout(1), **sections), on_gpu=on_gpu)
    assert (dtypes.student, dtypes.teacher, dtypes.engine) == expected
    assert dtypes.coarser == (BFLOAT16 if BFLOAT16 in expected[:2] else FLOAT32)


def test_the_default_is_what_this_machine_has():
    config = make_config(Path("models"), Layout(1), model={"dtype": "auto"}, teacher={"dtype": "auto"})
    assert Dtypes.of(config) == Dtypes.of(config, on_gpu=torch.cuda.is_available())
