"""Loading, heads and a training step beside CosPlace, OpenVPRLab and arcface_torch, whose own code runs: one core, in
turn, medians.

    python tests/benchmarks/peers.py [--cosplace DIR] [--openvprlab DIR] [--arcface DIR]
                                     [--part loading|heads|step] [--photos DIR] [--json FILE]

DIR is a checkout of gmberton/CosPlace, of amaralibey/OpenVPRLab, or recognition/arcface_torch in one of
deepinsight/insightface; name at least one. Nothing of theirs is copied: their modules are imported from there.
CosPlace and arcface_torch need no package beside ours; OpenVPRLab needs `pip install pandas rich lightning`, and
FAISS (our extra `retrieval`). arcface_torch's loader is left out: it needs mxnet, and CUDA for the folder of files too.

loading  photos in the page cache to float32 batches of 64, ImageNet-normalised, in images a second. A row says from
         photos of how many pixels (512: as CosPlace asserts; 224: what our data sets keep, made once), to images of how
         many pixels, and what was done to them. No worker processes, as one core is all there is.
  loading-ours        this project's loader and what its training makes of a batch: `crop` a random crop of 0.66 to 1
                      of the area, resized to 224; `colour` brightness, contrast and saturation changed by up to 0.7
                      too; `crop, as bytes` what the loader itself hands over, uint8, for a device to normalise
  loading-cosplace    TrainDataset in InfiniteDataLoader: `none` the decoded photos of 512 pixels and no more (not even
                      normalised), its default, which leaves the rest to a GPU; `crop` its augmentation on the CPU with
                      the same range of areas and no change of colours; `colour` with its 0.7 for the same three,
                      changed before the crop; `colour, hue` with its 0.5 for the hue too, its default (ours has none)
  loading-openvprlab  the DataLoader of VPRDataModule over GSVCitiesDataset, four photos a place: `resize` its transform
                      to 224 pixels without RandAugment (so without any augmentation); `RandAugment` all of it
heads    forward and backward of a head with its loss: batch 64, 1280 dimensions, 35,000 classes, float32, s 100, m 0.2;
         milliseconds, peak bytes (see training.py), the loss of the same weights and descriptors, and how far the
         gradients lie from ours (norm of the difference beside the norm of ours). The run fails where losses, or
         LMCC's gradients, are not the same function.
  head-ours      Head
  head-cosplace  MarginCosineProduct and CrossEntropyLoss (LMCC)
  head-arcface   PartialFC_V2 of all classes, one process over gloo, with CombinedMarginLoss (AAMC: m2, LMCC: m3). Its
                 `.cuda()` of two small buffers is answered by the buffers themselves. Its AAMC takes the margin's slope
                 for 1, so that the gradients differ.
step     a training step of EfficientNet-B0 whose first five blocks are frozen, 64 images of 224 pixels that lie in
         memory, 8,750 classes of 1280 dimensions, LMCC, float32, random weights (none is downloaded); images a second
  step-ours      an engine's step of the preset paper-b0 (uint8 images; converts and normalises them, checks its losses)
  step-cosplace  GeoLocalizationNet, MarginCosineProduct, CrossEntropyLoss and two Adams as its train.py calls them, on
                 float32 images; `kept` memory is what our training sets for the process (see training/memory.py),
                 `plain` what CosPlace has by itself
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import paths  # noqa: F401

from shards.console import JobError, WrongArguments, check_arguments, entry
from shards.provenance import provenance

Row = dict[str, object]
MARKERS = {  # a file that tells the folder
    "cosplace": "cosface_loss.py",
    "openvprlab": "src/core/vpr_datamodule.py",
    "arcface": "partial_fc_v2.py",
}
NEAREST = {"none": "crop", "resize": "crop", "colour, hue": "colour", "RandAugment": "colour"}  # of ours
MODULES: dict[str, dict[str, tuple[str, ...]]] = {  # of theirs, by what they are measured in
    "loading": {
        "cosplace": ("datasets.train_dataset", "commons"),
        "openvprlab": ("src.utils.config_manager", "src.core.vpr_datamodule"),
    },
    "heads": {"cosplace": ("cosface_loss",), "arcface": ("losses", "partial_fc_v2")},
    "step": {"cosplace": ("cosplace_model.cosplace_network", "cosface_loss")},
}


class Checkout:
    """A folder of a peer's code. Raises `WrongArguments` where it is not that."""

    def __init__(self, peer: str, folder: Path) -> None:
        if not (folder / MARKERS[peer]).is_file():
            raise WrongArguments(f"--{peer} {folder}: holds no {MARKERS[peer]}; name a checkout (see --help)")
        self.peer, self.folder = peer, folder.resolve()

    def modules(self, *names: str) -> list[Any]:
        """Modules of it, by name. Raises `JobError` that names a package they need."""
        sys.path.insert(0, str(self.folder))
        try:
            return [importlib.import_module(name) for name in names]
        except ModuleNotFoundError as error:
            raise JobError(
                f"{self.folder}: imports {error.name}, which is not installed; `pip install {error.name}` into an "
                f"environment of its own, or leave --{self.peer} out"
            ) from None
        finally:
            sys.path.remove(str(self.folder))

    def commit(self) -> str:
        """Its commit, or "unknown" outside git."""
        command = ["git", "-C", str(self.folder), "rev-parse", "--short=8", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or "unknown"


def beside(row: Row, rows: list[Row]) -> list[tuple[Row, float]]:
    """Our rows that do what a peer's row does, or what comes nearest, and how many times as fast they are."""
    part = str(row["name"]).split("-")[0]
    done = NEAREST.get(str(row.get("done")), row.get("done"))
    same = {"name": f"{part}-ours"} | {k: v for k, v in (("head", row.get("head")), ("done", done)) if v is not None}
    mine = [] if row["name"] == f"{part}-ours" else [other for other in rows if same.items() <= other.items()]
    if part == "head":
        return [(other, float(str(row["milliseconds"])) / float(str(other["milliseconds"]))) for other in mine]
    return [(other, float(str(other["images_per_second"])) / float(str(row["images_per_second"]))) for other in mine]


def print_rows(rows: list[Row]) -> None:
    """A line a row, with how many times as fast ours are."""
    for row in rows:
        facts = [
            f"{fact.replace('_', ' ')} {format(value, ',.4g' if isinstance(value, float) else '')}"
            for fact, value in row.items()
            if fact != "name"
        ]
        times = [
            f"{ratio:.2f}" + (f" (from {mine['photo_pixels']})" if "photo_pixels" in mine else "")
            for mine, ratio in beside(row, rows)
        ]
        print(f"{row['name']:20}{', '.join(facts)}" + (f"; ours {', '.join(times)} times as fast" if times else ""))


def main() -> None:
    """Read the arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in MARKERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="DIR", help="checkout of its code")
    parser.add_argument("--part", choices=MODULES, help="one part only (default: all that the checkouts allow)")
    parser.add_argument(
        "--photos", type=Path, metavar="DIR", help="512-pixel photos named as SF-XL's (default: a small rendered city)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    named = {peer: getattr(arguments, peer) for peer in MARKERS if getattr(arguments, peer) is not None}
    parts = (arguments.part,) if arguments.part else tuple(MODULES)
    wanted = sorted({peer for part in parts for peer in MODULES[part]})
    check_arguments(
        {
            f"no peer to measure: name the checkout of one by --{', --'.join(wanted)}": not named.keys() & set(wanted),
            f"--photos {arguments.photos}: is no folder": bool(arguments.photos and not arguments.photos.is_dir()),
        }
    )
    peers = {peer: Checkout(peer, folder) for peer, folder in named.items()}
    code = {
        part: {peer: peers[peer].modules(*names) for peer, names in MODULES[part].items() if peer in peers}
        for part in parts
    }
    import torch  # late: wrong arguments are told at once

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(pin_memory|CUDA|cuda).*")  # what their code says without a GPU
    from peers_computing import head_rows, step_rows
    from peers_loading import loading_rows

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        if code.get("loading"):
            rows += loading_rows(code["loading"], arguments.photos, Path(name))
    if code.get("heads"):
        rows += head_rows(code["heads"])
    if code.get("step"):
        rows += step_rows(*code["step"]["cosplace"])
    print_rows(rows)
    of_peers = ", ".join(f"{peer} {checkout.commit()}" for peer, checkout in peers.items())
    print(f"\n{' '.join(sys.argv)}: torch {torch.__version__}, commit {provenance()['commit']}; {of_peers}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    entry(main)
