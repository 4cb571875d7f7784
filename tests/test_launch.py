"""launch/: the Accelerate configurations start real runs; the Dockerfile fits the project."""

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from slurm import finish
from tiny import ROOT, arguments, write_dataset

from shards.index import build_index
from training.checkpoint import load_for_evaluation
from training.run_folder import read_losses

LAUNCH = ROOT / "launch"
CONFIGS = ["cpu", "one_gpu", "eight_gpus", "two_machines"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = write_dataset(tmp_path_factory.mktemp("launch") / "shards")
    build_index(dataset.path, dataset.classes)  # as a finished build leaves it
    return dataset.path


# Accelerate configurations


@pytest.mark.parametrize(("name", "processes", "machines"), [*zip(CONFIGS, [2, 1, 8, 16], [1, 1, 1, 2], strict=True)])
def test_accelerate_reads_a_configuration_and_precision_is_left_to_the_flag(
    name: str, processes: int, machines: int
) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision is None


def accelerate(config: str, options: list[str], words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{config}.yaml")]
    return subprocess.Popen(
        [*command, *options, "training/train.py", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "processes"),
    [
        ("cpu", [], "2 processes"),
        ("cpu", ["--num_processes", "4"], "4 processes"),
        ("one_gpu", [], "1 process "),
        ("eight_gpus", ["--num_processes", "2"], "2 processes"),
    ],
)
def test_a_configuration_of_one_machine_starts_its_processes_in_the_precision_of_the_flag(
    shards: Path, tmp_path: Path, config: str, options: list[str], processes: str
) -> None:
    words = arguments(shards, tmp_path / "r", schedule="joint", epochs=1, precision="bf16")
    code, output = finish(accelerate(config, options, words))
    assert code == 0, output
    assert processes in output
    assert "bf16" in output
    assert len(read_losses(tmp_path / "r")) == 8
    assert sorted(load_for_evaluation(tmp_path / "r").heads) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_for_two_is_told_what_starts_two(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = arguments(shards, tmp_path / "r", schedule="joint", epochs=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "training/train.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    started = "2 processes" if "2 processes" in done.stdout else "1 process "
    assert ("--config_file launch/cpu.yaml --num_processes N" in done.stdout) == (started == "1 process ")


@pytest.mark.slow
def test_the_configuration_of_two_machines_joins_two_launchers_in_one_run(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    words = arguments(shards, tmp_path / "r", schedule="joint", epochs=1)
    launchers = [accelerate("two_machines", [*options, "--machine_rank", rank], words) for rank in "01"]
    (code, output), (other_code, other_output) = map(finish, launchers)
    assert (code, other_code) == (0, 0), output + other_output
    assert "2 processes" in output
    assert len(read_losses(tmp_path / "r")) == 8


# Docker


def test_the_dockerfile_copies_files_that_exist_and_installs_extras_that_exist() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert "*" in name or (ROOT / name).exists(), name
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert text.count("--constraint constraints.txt") == 1
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.MULTILINE)
    assert project["requires-python"] == f">={python}"
