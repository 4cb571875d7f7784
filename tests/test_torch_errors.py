"""What is said where a GPU's memory does not suffice, and where a model cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, arguments
from torch._inductor.exc import InductorError, TritonMissing

from shards.console import JobError
from training.torch_errors import torch_errors_told


@pytest.mark.parametrize("compiling", [False, True])
def test_a_full_gpu_is_one_line_with_what_needs_less(compiling: bool) -> None:
    said = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    with pytest.raises(JobError) as error, torch_errors_told():
        raise InductorError(said, None) if compiling else said
    assert str(error.value).startswith(
        "CUDA out of memory. Tried to allocate 2.00 GiB; less is needed with --accumulate"
    )
    assert "\n" not in str(error.value)


def test_memory_of_the_machine_that_does_not_suffice_is_one_line() -> None:
    way_out = r"^not enough memory: 4.* more were asked for; .*--accumulate 4"
    with pytest.raises(JobError, match=way_out) as error, torch_errors_told():
        torch.empty(1 << 60)
    assert "\n" not in str(error.value)


def test_a_gpu_that_triton_cannot_compile_for_is_one_line_with_the_way_out() -> None:
    with pytest.raises(JobError, match=r"^--compile: .*--no-compile") as error, torch_errors_told():
        raise TritonMissing(None)
    assert "\n" not in str(error.value)


def test_other_errors_of_torch_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), torch_errors_told():
        raise RuntimeError("size mismatch")


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line_with_the_way_out(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "training/train.py", *arguments(shards, tmp_path / "r", cpu=True, compile=True)]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: --compile: ")
    assert "--no-compile" in line
