"""Checkpoints of the reference code: class order, weights and LR@N after the import."""

import glob
import os
import random
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import SOUTH, WEST, class_table, write_queries
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import efficientnet_b0

from evaluation import import_reference
from evaluation.localiser import Localiser
from evaluation.reference_classes import _OldPair, reference_groups, reference_table
from shards.console import JobError, WrongArguments
from training.queries import list_queries
from training.scoring import cell_distances, recall_at


def training_paths(seed: int = 0, cells: int = 300) -> list[str]:
    """Names of 2 to 14 photos in each of `cells` scattered cells, in folders, shuffled."""
    rng = random.Random(seed)
    paths = []
    for cell in range(cells):
        east, north = WEST + 20 * rng.randrange(60), SOUTH + 20 * rng.randrange(60)
        for i in range(rng.randrange(2, 15)):
            place = f"@0{east + rng.random() * 20:.2f}@{north + rng.random() * 20:.2f}@10@S@37.7@-122.4@{cell}_{i}@.jpg"
            paths.append(f"/37.{rng.randrange(70, 80)}/{place}")
    rng.shuffle(paths)
    return paths


def as_the_reference(paths: list[str], M: int, N: int, least: int) -> list[list[tuple[int, int]]]:
    """Its `initialize`, in its own words: sorted paths, a dict of sets, lists of these."""
    places = [(float(p.split("@")[1]), float(p.split("@")[2])) for p in sorted(paths)]
    cells = [(int(east // M * M), int(north // M * M)) for east, north in places]
    per_class = defaultdict(list)
    for cell in cells:
        per_class[cell].append(cell)
    per_group = defaultdict(set)
    for cell in cells:
        if len(per_class[cell]) >= least:
            per_group[cell[0] % (M * N) // M, cell[1] % (M * N) // M].add(cell)
    return [list(group) for group in per_group.values()]


@pytest.mark.parametrize(("M", "N"), [(20, 2), (10, 5)])
def test_classes_and_groups_stand_in_the_order_of_the_reference(M: int, N: int) -> None:
    paths = training_paths()
    _, cells, _ = reference_groups(random.Random(1).sample(paths, len(paths)), M, N, 3)
    assert cells == as_the_reference(paths, M, N, 3)
    assert len(cells) == N * N


def test_hashes_are_those_that_the_two_pythons_print() -> None:
    assert hash((1, 2)) == -3550055125485641917
    assert hash(_OldPair((1, 2))) == 3713081631934410656
    paths = training_paths()
    new, old = (reference_groups(paths, 20, 2, 3, hashing)[1] for hashing in ("3.8+", "3.7"))
    assert new != old
    assert [sorted(group) for group in new] == [sorted(group) for group in old]


def test_the_class_table_keeps_that_order_as_labels() -> None:
    paths = training_paths()
    order, table = reference_table(paths, 20, 2, 3)
    for group, cells in zip(order, as_the_reference(paths, 20, 2, 3), strict=True):
        some = table.of_group(group)
        assert list(zip(some.cell_east.tolist(), some.cell_north.tolist(), strict=True)) == cells
        assert some.label.tolist() == list(range(len(cells)))
    assert table.zone == 10


@pytest.mark.parametrize("root", ["", "./", "/", "/data/.cache/train/", "../train/"])
def test_hidden_photos_and_folders_of_a_list_count_as_little_as_in_the_reference_s_glob(root: str) -> None:
    paths = [root + path.lstrip("/") for path in training_paths()]
    hidden = [path.replace("37.7", ".37.7") for path in paths if "37.7" in path]
    hidden += [path.replace("/@", "/._@") for path in paths]
    assert reference_groups(paths + hidden, 20, 2, 3) == reference_groups(paths, 20, 2, 3)


def test_the_photos_below_a_folder_are_those_that_the_reference_s_glob_finds(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "train"
    names = ["37.7/@1@2@.jpg", "37.7/@1@2@b.JPG", "37.7/._@1@2@.jpg", ".trash/@1@2@.jpg", "@1@2@[x].jpg"]
    for path in [elsewhere / "@3@4@.jpg", *(root / name for name in names)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "37.8").symlink_to(elsewhere)
    found = glob.glob(f"{root}/**/*.jpg", recursive=True)
    assert sorted(import_reference.read_train_list(root)) == sorted(path.removeprefix(f"{root}/") for path in found)
    assert len(found) == 3


@pytest.mark.parametrize(("place", "southern"), [("10@S", False), ("56@H", True), ("@", False)])
def test_the_class_table_takes_its_hemisphere_from_the_names(place: str, southern: bool) -> None:
    _, table = reference_table([path.replace("10@S", place) for path in training_paths()], 20, 2, 3)
    assert (table.zone, table.southern) == (int(place.split("@")[0] or 0), southern)


def test_a_training_path_without_coordinates_or_too_few_photos_is_a_clear_error() -> None:
    with pytest.raises(JobError, match=r"plain\.jpg: no @EAST@NORTH@"):
        reference_groups(["plain.jpg"], 20, 2, 1)
    with pytest.raises(JobError, match=r"@nan@4178000@\.jpg: no @EAST@NORTH@"):
        reference_groups(["@nan@4178000@.jpg"], 20, 2, 1)
    with pytest.raises(JobError, match="no cell of 20 m has 10 of the 1"):
        reference_groups([f"@{WEST}@{SOUTH}@.jpg", f"@{WEST}@{SOUTH}@.JPG"], 20, 2, 10)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training list and a random checkpoint in the reference's own form."""
    folder = tmp_path_factory.mktemp("reference")
    classes = class_table()
    names = [
        f"37.7/@0{east + 3}.00@{north + i}.00@10@S@@@{i}@.jpg"
        for east, north in zip(classes.cell_east.tolist(), classes.cell_north.tolist(), strict=True)
        for i in range(10)
    ]
    (folder / "list.txt").write_text("\n".join(names))
    torch.manual_seed(0)
    backbone, layer = efficientnet_b0().features, torch.nn.Linear(1280, 1280)
    model = OrderedDict({f"module.backbone.{k}": v for k, v in backbone.state_dict().items()})
    model |= {f"module.classifier.0.{k}": v for k, v in layer.state_dict().items()}
    heads = [OrderedDict(weight=torch.randn(len(cells), 1280)) for cells in as_the_reference(names, 20, 2, 10)]
    torch.save({"model_state_dict": model, "classifiers_state_dict": heads}, folder / "best_model.pth")
    return folder / "list.txt", folder / "best_model.pth"


def import_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["import_reference.py", *map(str, words)])
    import_reference.main()


@pytest.mark.slow
def test_lr_at_n_after_the_import_is_the_reference_s_own(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, checkpoint = imported
    queries = list_queries(write_queries(tmp_path / "queries", size=64), 10)
    import_here(monkeypatch, "--checkpoint", checkpoint, "--train-list", names, "--out", tmp_path / "run")
    localiser = Localiser.load(tmp_path / "run", torch.device("cpu"))
    assert (localiser.form, localiser.shorter_side) == ("raw", 256)
    answers = localiser.answer(localiser.describe(queries.paths).vectors, top_k=16)["raw"]
    ours = recall_at(cell_distances(answers.rows, localiser.classes, queries.east, queries.north))

    saved = torch.load(checkpoint, weights_only=True)
    backbone, layer = efficientnet_b0().features.eval(), torch.nn.Linear(1280, 1280)
    state = saved["model_state_dict"]
    backbone.load_state_dict({k.removeprefix("module.backbone."): v for k, v in state.items() if "backbone" in k})
    layer.load_state_dict({k.removeprefix("module.classifier.0."): v for k, v in state.items() if "classifier" in k})
    centers = [c for g in as_the_reference(names.read_text().splitlines(), 20, 2, 10) for c in g]
    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    distances = torch.zeros(len(queries), 16)
    with torch.no_grad():
        for i, path in enumerate(queries.paths):
            pooled = backbone(prepare(Image.open(path).convert("RGB"))[None]).mean((2, 3))
            descriptor = F.normalize(layer(pooled))
            scores = torch.cat([descriptor @ head["weight"].T for head in saved["classifiers_state_dict"]], 1)[0]
            best = torch.tensor(centers)[scores.argsort(descending=True)] + 10
            here = torch.tensor([[queries.east[i], queries.north[i]]])
            distances[i] = torch.cdist(here, best.double())[0]
    theirs = {n: float((distances[:, :n] <= 25).any(1).float().mean() * 100) for n in ours}
    assert {n: f"{v:.1f}" for n, v in ours.items()} == {n: f"{v:.1f}" for n, v in theirs.items()}


def test_a_list_that_does_not_fit_the_heads_is_a_clear_error(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, checkpoint = imported
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("\n".join(names.read_text().splitlines()[5:]))
    words = ["--checkpoint", checkpoint, "--out", tmp_path / "run"]
    with pytest.raises(JobError, match="has 4 classes, the training list gives 3"):
        import_here(monkeypatch, *words, "--train-list", fewer)
    with pytest.raises(JobError, match="4 heads, but the training list gives 1 groups"):
        import_here(monkeypatch, *words, "--train-list", names, "--N", 1)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_checkpoint_of_the_reference_is_a_clear_error(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--train-list", imported[0], "--out", tmp_path / "run"]
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth", "absent.pth"):
        with pytest.raises(JobError, match=f"{name}: no checkpoint of the reference"):
            import_here(monkeypatch, *words, "--checkpoint", tmp_path / name)


class Hostile:
    """What runs a command once it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Hostile(), "classifiers_state_dict": []}, "best_model.pth")
    words = ["--train-list", imported[0], "--out", tmp_path / "run", "--checkpoint", tmp_path / "best_model.pth"]
    with pytest.raises(JobError, match="no checkpoint of the reference"):
        import_here(monkeypatch, *words)
    assert not Path("ran").exists()


@pytest.mark.parametrize("words", [["--M", "0"], ["--N", "0"], ["--min-images", "0"], ["--s", "0"], ["--m", "2"]])
def test_wrong_arguments_are_named(
    imported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    names, checkpoint = imported
    places = ("--checkpoint", checkpoint, "--train-list", names, "--out", tmp_path / "run")
    with pytest.raises(WrongArguments, match=words[0]):
        import_here(monkeypatch, *places, *words)
