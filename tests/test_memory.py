"""What is said where a GPU's memory does not suffice."""

import pytest
import torch

from shards.console import JobError
from training.memory import full_memory_told


def test_a_full_gpu_is_one_line_with_what_needs_less() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    with pytest.raises(JobError) as error, full_memory_told():
        raise torch.OutOfMemoryError(said)
    assert str(error.value).startswith(
        "CUDA out of memory. Tried to allocate 2.00 GiB; less is needed with --accumulate"
    )
    assert "\n" not in str(error.value)
