"""launch/*.sh: the job files run under a stand-in for Slurm."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from photos import write_photos
from slurm import LAUNCH, WAIT_FOR_SIGTERM, Slurm, directives, finish, wait_until
from tiny import arguments, write_dataset, write_queries
from tiny_run import write_run

from preprocessing.build import build
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.index import build_index
from training.checkpoint import list_checkpoints
from training.run_folder import read_losses

JOB_FILES = ["preprocess_array.sh", "train_one_node.sh", "train_two_nodes.sh", "evaluate.sh"]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("name", JOB_FILES)
def test_a_job_file_stops_at_the_first_error_and_can_be_requeued(name: str) -> None:
    assert "\nset -euo pipefail\n" in (LAUNCH / name).read_text()
    assert "requeue" in directives(name)
    assert os.access(LAUNCH / name, os.X_OK)


def submit_array(slurm: Slurm, *words: str, **environment: str) -> list[dict]:
    """Run preprocess_array.sh on the login node; what it submitted."""
    done = subprocess.run(
        ["bash", str(LAUNCH / "preprocess_array.sh"), *words],
        cwd=slurm.spool,
        env=slurm.environment | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return slurm.recorded("sbatch")


def test_preprocessing_submits_an_array_and_a_job_that_waits_for_all_of_it(slurm: Slurm) -> None:
    array, last = submit_array(slurm, "--image-size", "64", TASKS="5", SHARDS="s")
    script = ["launch/preprocess_array.sh", "--image-size", "64"]
    assert array["words"] == ["--parsable", "--array=0-4", *script]
    assert last["words"] == ["--parsable", "--dependency=afterok:101", "--kill-on-invalid-dep=yes", *script]
    assert [job["environment"]["ROLE"] for job in (array, last)] == ["task", "finish"]
    assert {job["environment"]["TASKS"] for job in (array, last)} == {"5"}


@pytest.mark.slow
def test_the_tasks_of_an_array_write_the_shards_that_one_build_writes(slurm: Slurm, tmp_path: Path) -> None:
    source, out, whole = tmp_path / "photos", tmp_path / "shards", tmp_path / "whole"
    write_photos(source)
    words = ["--image-size", "64", "--workers", "1"]
    variables = {"SOURCE": str(source), "SHARDS": str(out), "TASKS": "3", "PYTHON": sys.executable}
    array, last = submit_array(slurm, *words, **variables)  # two shards: the third task has nothing to do
    for index in "201":
        code, output = slurm.run("preprocess_array.sh", *words, **array["environment"], SLURM_ARRAY_TASK_ID=index)
        assert code == 0, output
    assert not (out / "dataset.json").exists()
    code, output = slurm.run("preprocess_array.sh", *words, **last["environment"])
    assert code == 0, output
    build(source, whole, Settings(20, 2, 10, 64, 90, "fast", 0), Machinery(1))
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.tar"))
    assert len(names) == 2
    for name in [*names, "classes.parquet", "dataset.json"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_finishing_job_fails_and_names_the_task_whose_shards_are_missing(slurm: Slurm, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    words = ["--image-size", "64", "--workers", "1"]
    variables: dict[str, Any] = {"SOURCE": str(tmp_path / "photos"), "SHARDS": str(tmp_path / "s"), "TASKS": "2"}
    variables["PYTHON"] = sys.executable
    code, output = slurm.run("preprocess_array.sh", *words, **variables, ROLE="task", SLURM_ARRAY_TASK_ID="0")
    assert code == 0, output
    code, output = slurm.run("preprocess_array.sh", *words, **variables, ROLE="finish")
    assert code == 1
    assert "run task 1 of 2 again" in output


def test_an_array_task_at_its_time_limit_is_stopped_with_sigterm_and_requeued(slurm: Slurm) -> None:
    job = slurm.start("preprocess_array.sh", ROLE="task", SLURM_ARRAY_TASK_ID="3", BEHAVIOUR=WAIT_FOR_SIGTERM)
    wait_until(lambda: slurm.recorded("ready"), job)
    job.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 0, output
    assert [call["words"] for call in slurm.recorded("scontrol")] == [["requeue", "4711"]]


@pytest.mark.parametrize(("job_file", "nodes"), [("train_one_node.sh", 1), ("train_two_nodes.sh", 2)])
def test_a_training_job_starts_one_process_for_each_gpu_with_its_rank(slurm: Slurm, job_file: str, nodes: int) -> None:
    asked = directives(job_file)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"] == "B:USR1@120"
    code, output = slurm.run(job_file, "--epochs", "3", SHARDS="s", RUN="r", PRESET="paper-b0")
    assert code == 0, output
    (step,) = slurm.recorded("srun")
    assert "--kill-on-bad-exit=1" in step["words"]
    tasks = sorted(slurm.recorded("python"), key=lambda task: int(task["environment"]["RANK"]))
    assert [task["environment"]["RANK"] for task in tasks] == [str(rank) for rank in range(8 * nodes)]
    assert [task["environment"]["LOCAL_RANK"] for task in tasks] == [str(rank) for rank in range(8)] * nodes
    for task in tasks:
        assert task["environment"].items() >= {"WORLD_SIZE": str(8 * nodes), "LOCAL_WORLD_SIZE": "8"}.items()
        assert task["environment"].items() >= {"MASTER_ADDR": "localhost", "MASTER_PORT": "24711"}.items()
        command = "training/train.py --preset paper-b0 --shards s --out r --resume --epochs 3"
        assert task["words"] == command.split()


@pytest.mark.parametrize(
    ("behaviour", "expected"), [("print('stopped by SIGTERM after step 5; saved')", 143), ("sys.exit(3)", 3)]
)
def test_a_training_job_that_was_cancelled_or_failed_is_neither_requeued_nor_taken_for_done(
    slurm: Slurm, behaviour: str, expected: int
) -> None:
    code, output = slurm.run("train_one_node.sh", BEHAVIOUR=behaviour)
    assert code == expected
    assert f"exit code {expected}" in output
    assert "requeue" not in [call["words"][0] for call in slurm.recorded("scontrol")]


def test_a_training_job_that_stops_within_its_grace_time_requeues_itself(slurm: Slurm) -> None:
    stops = "print('stopped by SIGTERM after step 5; saved')"
    code, output = slurm.run("train_one_node.sh", BEHAVIOUR=stops, PREEMPT_TIME="2026-11-25T15:13:34")
    assert code == 0, output
    assert slurm.recorded("scontrol")[-1]["words"] == ["requeue", "4711"]


@pytest.mark.slow
def test_a_preempted_training_job_of_two_nodes_saves_is_requeued_and_goes_on_to_the_same_losses(
    slurm: Slurm, tmp_path: Path
) -> None:
    shards = write_dataset(tmp_path / "shards")
    build_index(shards.path, shards.classes)  # as a finished build leaves it
    size = {"ntasks-per-node": "1"}
    variables = {"PYTHON": sys.executable, "SHARDS": str(shards.path), "PRESET": "paper-b0"}
    words = arguments(shards.path, tmp_path / "r", epochs=12, save_every=4, save_every_epochs=12)[4:]
    job = slurm.start("train_two_nodes.sh", *words, options=size, **variables, RUN=str(tmp_path / "r"))
    wait_until(lambda: list_checkpoints(tmp_path / "r"), job)
    job.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 0, output
    assert [call["words"] for call in slurm.recorded("scontrol")][-1] == ["requeue", "4711"]
    first = (tmp_path / "logs" / "4711-0.log").read_text()
    assert "2 processes on cpu" in first
    assert "stopped by SIGUSR1" in first
    done = len(read_losses(tmp_path / "r"))
    assert 0 < done < 96

    again = {"SLURM_RESTART_COUNT": "1", "RUN": str(tmp_path / "r")}
    code, output = slurm.run("train_two_nodes.sh", *words, options=size, **variables, **again)
    second = (tmp_path / "logs" / "4711-1.log").read_text()
    assert code == 0, second
    assert "goes on from" in second
    code, output = slurm.run("train_two_nodes.sh", *words, options=size, **variables, RUN=str(tmp_path / "whole"))
    assert code == 0, output
    assert len(read_losses(tmp_path / "whole")) == 96
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "whole")


@pytest.mark.slow
def test_the_evaluation_job_evaluates_all_runs_on_all_query_sets(slurm: Slurm, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    queries = [write_queries(tmp_path / name) for name in ("q1", "q2")]
    variables: dict[str, Any] = {"RUNS": " ".join(map(str, runs)), "QUERIES": " ".join(map(str, queries))}
    variables["OUT"] = str(tmp_path / "e")
    code, output = slurm.run("evaluate.sh", "--no-report", "--threads", "1", **variables, PYTHON=sys.executable)
    assert code == 0, output
    assert len(json.loads((tmp_path / "e" / "results.json").read_text())["rows"]) == 4
