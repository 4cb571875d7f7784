"""A stand-in for Slurm: its commands as the job files use them, and the variables that it sets."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny import ROOT

LAUNCH = ROOT / "launch"

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
if sys.argv[1:3] == ["show", "job"]:
    print("   PreemptEligibleTime=2026-11-25T15:12:54 PreemptTime=" + os.environ.get("PREEMPT_TIME", "None"))
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
    """Exit code and output of a process, once it has ended."""
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds while `process` runs."""
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
