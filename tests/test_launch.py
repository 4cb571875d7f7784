"""launch/: the Accelerate configurations start real runs; the Slurm job files run under a stand-in for Slurm."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from photos import write_photos
from tiny import ROOT, arguments, write_dataset, write_queries
from tiny_run import write_run

from preprocessing.build import build
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.index import build_index
from training.checkpoint import list_checkpoints, load_for_evaluation
from training.run_folder import read_losses

LAUNCH = ROOT / "launch"
CONFIGS = ["cpu", "one_gpu", "eight_gpus", "two_machines"]
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
JOB_FILES = ["preprocess_array.sh", "train_one_node.sh", "train_two_nodes.sh", "evaluate.sh"]

# Slurm's commands as the job files use them. What they were told is kept as lines of JSON.
RECORD = """
import json, os, sys
def record(**facts):
    with open(os.environ["RECORDS"], "a") as file:
        file.write(json.dumps(facts) + "\\n")
"""
SBATCH = """
record(command="sbatch", words=sys.argv[1:], environment=dict(os.environ))
print(100 + sum('"sbatch"' in line for line in open(os.environ["RECORDS"])))
"""
SCONTROL = """
record(command="scontrol", words=sys.argv[1:])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
"""
# As srun does: SIGUSR1 goes on to the tasks, SIGTERM kills them.
SRUN = """
import signal, subprocess
first = next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith("--"))
record(command="srun", words=sys.argv[1:first])
per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
def forward(number, frame):
    for task in tasks:
        task.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGKILL)
signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
for rank in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)}
    tasks.append(subprocess.Popen(sys.argv[first:], env=os.environ | place))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
# In place of Python where only the job file is looked at: records the command and does as BEHAVIOUR says.
PYTHON = """
import time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
record(command="python", words=sys.argv[1:], environment={n: os.environ[n] for n in names if n in os.environ})
exec(os.environ.get("BEHAVIOUR", ""))
"""
WAIT_FOR_SIGTERM = """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
record(command="ready")
time.sleep(60)
"""


class Slurm:
    """A stand-in for a cluster: submits by recording, and runs job files as Slurm runs them."""

    def __init__(self, folder: Path) -> None:
        self.records = folder / "records.jsonl"
        self.records.touch()
        self.spool = folder / "spool"
        self.spool.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN), ("python", PYTHON)):
            (commands / name).write_text(f"#!{sys.executable}\n{RECORD}{text}")
            (commands / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "RECORDS": str(self.records),
            "PYTHON": str(commands / "python"),
            "LOGS": str(folder / "logs"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def recorded(self, command: str) -> list[dict]:
        """What `command` was told, call by call."""
        records = [json.loads(line) for line in self.records.read_text().splitlines()]
        return [record for record in records if record["command"] == command]

    def start(
        self, job_file: str, *words: str, options: dict[str, str] | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Run a job file from a copy elsewhere, as slurmd does, with the variables that follow from its directives;
        `options` override those, as on sbatch's command line."""
        asked = directives(job_file) | (options or {})
        nodes, per_node = int(asked["nodes"]), int(asked.get("ntasks-per-node", "1"))
        job = self.spool / "slurm_script"
        shutil.copyfile(LAUNCH / job_file, job)
        facts = {
            "SLURM_JOB_ID": "4711",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": ",".join(["localhost", "node-2", "node-3"][:nodes]),
            "SLURM_NTASKS": str(nodes * per_node),
            "SLURM_NTASKS_PER_NODE": str(per_node),
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
        }
        return subprocess.Popen(
            ["bash", str(job), *words],
            cwd=self.spool,
            env=self.environment | facts | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, job_file: str, *words: str, options: dict[str, str] | None = None, **environment: str
    ) -> tuple[int, str]:
        """Run a job file to its end: exit code and output."""
        return finish(self.start(job_file, *words, options=options, **environment))


def directives(job_file: str) -> dict[str, str]:
    """The #SBATCH options of a job file."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (LAUNCH / job_file).read_text(), re.MULTILINE)
    return dict(lines)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds while `process` runs."""
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = write_dataset(tmp_path_factory.mktemp("launch") / "shards")
    build_index(dataset.path, dataset.classes.groups)  # as a finished build leaves it
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


# Job files


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_find_nothing_to_say(name: str) -> None:
    checks = [["bash", "-n"]] + ([["shellcheck", "-x"]] if shutil.which("shellcheck") else [])
    for check in checks:
        done = subprocess.run([*check, f"launch/{name}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


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


def test_the_finishing_job_fails_and_names_the_task_whose_shards_are_missing(slurm: Slurm, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    words = ["--image-size", "64", "--workers", "1"]
    variables = {"SOURCE": str(tmp_path / "photos"), "SHARDS": str(tmp_path / "s"), "PYTHON": sys.executable}
    variables["TASKS"] = "2"
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


@pytest.mark.slow
def test_a_preempted_training_job_of_two_nodes_saves_is_requeued_and_goes_on_to_the_same_losses(
    slurm: Slurm, shards: Path, tmp_path: Path
) -> None:
    size = {"ntasks-per-node": "1"}
    variables = {"PYTHON": sys.executable, "SHARDS": str(shards), "PRESET": "paper-b0"}
    words = arguments(shards, tmp_path / "r", epochs=12, save_every=4, save_every_epochs=12)[4:]
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
    variables = {"RUNS": " ".join(map(str, runs)), "QUERIES": " ".join(map(str, queries)), "OUT": str(tmp_path / "e")}
    code, output = slurm.run("evaluate.sh", "--no-report", "--threads", "1", **variables, PYTHON=sys.executable)
    assert code == 0, output
    assert len(json.loads((tmp_path / "e" / "results.json").read_text())["rows"]) == 4


# Docker


def test_the_dockerfile_copies_files_that_exist_and_installs_an_extra_that_exists() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert "*" in name or (ROOT / name).exists(), name
    (extra,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert text.count("--constraint constraints.txt") == 1
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.MULTILINE)
    assert project["requires-python"] == f">={python}"
