"""What a failed write says. That checkpoints are written and read is tested in tests/distributed."""

import errno
import io

import pytest
import torch

from megatron_tip.conversion.background_save import system_error_behind


class FullDisk(io.BytesIO):
    def write(self, data, /):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_whatever_torch_makes_of_it():
    with pytest.raises(RuntimeError, match="unexpected pos") as raised:
        torch.save(torch.zeros(30000), FullDisk())
    assert isinstance(system_error_behind(raised.value), OSError)
    assert "No space left" in str(system_error_behind(raised.value))


def test_another_error_stays_what_it_is():
    error = ValueError("a shape")
    assert system_error_behind(error) is error
