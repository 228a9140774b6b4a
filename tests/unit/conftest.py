from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode


@pytest.fixture
def stack():
    with ExitStack() as one:
        yield one


@pytest.fixture(scope="module", autouse=True)
def stand_in_removed() -> Iterator[None]:
    """Megatron on a CPU leaves its stand-in for CUDA on; the tests of the next file begin without it, in any order."""
    depth, before = len(_get_current_function_mode_stack()), dict(vars(torch.cuda))
    yield
    while len(_get_current_function_mode_stack()) > depth:
        _pop_mode()
    for name, value in before.items():
        setattr(torch.cuda, name, value)
