"""The benchmark beside other projects' code: what it says where that code is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "benchmarks" / "peers.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the checkout of one by --arcface, --cosplace, --openvprlab"),
        (["--part", "step", "--arcface", "."], "name the checkout of one by --cosplace"),
        (["--cosplace", "EMPTY"], "holds no cosface_loss.py"),
        (["--openvprlab", "EMPTY"], "holds no src/core/vpr_datamodule.py"),
        (["--arcface", "EMPTY"], "holds no partial_fc_v2.py"),
        (["--cosplace", "EMPTY", "--photos", "EMPTY/none"], "EMPTY/none: is no folder"),
    ],
)
def test_without_a_checkout_that_can_be_measured_one_line_says_which_is_wanted(tmp_path, words, said):
    done = run(*(word.replace("EMPTY", str(tmp_path)) for word in words))
    assert done.returncode == 2
    assert said.replace("EMPTY", str(tmp_path)) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_package_that_a_checkout_imports_and_that_is_missing_is_named_before_anything_is_measured(tmp_path):
    for module in ("src/utils/config_manager.py", "src/core/vpr_datamodule.py"):
        (tmp_path / module).parent.mkdir(parents=True)
        (tmp_path / module).write_text("import no_such_package\n")
    done = run("--openvprlab", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path}: imports no_such_package, which is not installed" in done.stderr
    assert done.stderr.count("\n") == 1
