"""The package as a stranger installs it: a wheel, used from another directory; nothing imported before it is needed."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT

ROOMS = ("shards", "preprocessing", "training", "evaluation")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
ENTRY_POINTS = sorted(
    str(path.relative_to(ROOT)) for path in MODULES if re.search(r" entry\(main[,)]", path.read_text())
)
BENCHMARKS = sorted(f"tests/benchmarks/{path.name}" for path in (ROOT / "tests" / "benchmarks").glob("*.py")
                    if "__main__" in path.read_text())  # fmt: skip
# Optional, slow to import, or for one command only.
LAZY = ("nvidia.dali", "ray", "faiss", "onnx", "onnxruntime", "onnxscript", "matplotlib", "scipy", "tensorboard",
        "torchvision", "webdataset", "http.server", "starlette", "uvicorn", "s3fs")  # fmt: skip


def dotted(path: Path) -> str:
    """`evaluation/report.py` as `evaluation.report`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_by(modules: list[str], candidates: tuple[str, ...]) -> list[str]:
    """Those of `candidates` that are in sys.modules after importing `modules` in a new process."""
    code = (
        "import importlib, json, sys; modules, candidates = json.loads(sys.argv[1]);"
        "[importlib.import_module(m) for m in modules];"
        "print(json.dumps([c for c in candidates if c in sys.modules]))"
    )
    command = [sys.executable, "-c", code, json.dumps([modules, candidates])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_importing_every_module_imports_nothing_that_only_some_commands_need() -> None:
    modules = [dotted(path) for path in MODULES if path.stem != "web_app"]  # that one is the server itself
    assert imported_by(modules, LAZY) == []


def test_preprocessing_starts_without_torch() -> None:
    modules = [dotted(path) for path in MODULES if path.parts[len(ROOT.parts)] == "preprocessing"]
    assert imported_by(modules, ("torch", "torchvision", "accelerate", *LAZY)) == []


def test_every_package_that_the_code_imports_is_declared() -> None:
    declared = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[^\w.-]", d)[0].lower().replace("_", "-") for d in declared}
    of_module = importlib.metadata.packages_distributions()
    missing = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {name.split(".")[0] for name in imported} - set(ROOMS) - set(sys.stdlib_module_names):
                if not names & {name.lower().replace("_", "-") for name in of_module.get(top, [top])}:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git knows or that are new (setuptools writes beside them)."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] in (*ROOMS, "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel alone was installed."""
    folder = tmp_path_factory.mktemp("installed") / "packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = wheel.parent / "source"
    there = {str(p.relative_to(source)) for room in ROOMS for p in (source / room).rglob("*") if p.is_file()}
    assert inside == {name for name in there if "__pycache__" not in name and not name.endswith(".pyc")}


def run_module(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in another folder, with the installed wheel before anything else on the path."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_directory(installed: Path, city: Path, tmp_path: Path) -> None:
    where = run_module(installed, tmp_path, "timeit", "-n1", "-r1", "import shards.layout as m; print(m.__file__)")
    assert where.stdout.startswith(str(installed))
    source = str(city / "train" / "database")
    built = run_module(
        installed, tmp_path, "preprocessing.build_shards", "--source", source, "--out", "shards", "--image-size", "64"
    )
    assert built.returncode == 0, built.stderr
    checked = run_module(installed, tmp_path, "shards.verify", "shards")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "sound" in checked.stdout
    told = run_module(installed, tmp_path, "shards.verify", "--help")
    assert told.stdout.startswith("usage: python -m shards.verify ")


@pytest.mark.slow
@pytest.mark.parametrize("path", [*ENTRY_POINTS, *BENCHMARKS])
def test_an_entry_point_prints_its_options_from_any_directory(path: str, tmp_path: Path) -> None:
    as_script = subprocess.run(
        [sys.executable, ROOT / path, "--help"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert as_script.returncode == 0, as_script.stderr
    assert "usage:" in as_script.stdout
    assert "--help" in as_script.stdout
    if path in ENTRY_POINTS and path != "training/train.py":
        said = " ".join((ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").split())
        assert said in " ".join(as_script.stdout.split())  # what it does, its exit codes, an example


PRESSES = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
sys.exit("went on")
"""


@pytest.mark.parametrize("path", ENTRY_POINTS)
def test_ctrl_c_at_the_first_import_of_a_package_is_no_traceback(path: str, tmp_path: Path) -> None:
    for package in ("cv2", "numpy", "PIL", "pyarrow", "torch", "tqdm", "tyro"):
        (tmp_path / f"{package}.py").write_text(PRESSES)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for command in ([str(ROOT / path)], ["-m", dotted(ROOT / path)]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_every_entry_point_of_the_design_is_there() -> None:
    wanted = {"preprocessing/build_shards.py", "preprocessing/make_city.py", "shards/verify.py", "shards/show.py",
              "training/train.py", "evaluation/evaluate.py", "evaluation/predict.py", "evaluation/retrieve.py",
              "evaluation/export.py", "evaluation/import_reference.py"}  # fmt: skip
    assert wanted <= set(ENTRY_POINTS)
