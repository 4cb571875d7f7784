"""What a run shows: the real TensorBoard serves its curves and pictures."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import class_table, configure, fill, small_disk, train_here, write_dataset, write_queries

from shards.cell_index import CellIndex
from shards.console import JobError, WrongArguments
from training.progress import Timing
from training.queries import list_queries
from training.scoring import assess_ranking
from training.tracking import Tracker, batch_picture, check_tracker, epoch_line, error_colour, error_map


def test_waiting_for_data_counts_on_a_gpu_only_while_it_stands_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 4.0, 4.0, 7.0, 7.25, 9.0])  # in seconds, when the GPU gets to a step's begin and its end

    class Moment:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.seconds = next(moments)

        def elapsed_time(self, later: "Moment") -> float:
            return 1000 * (later.seconds - self.seconds)

    monkeypatch.setattr(torch.cuda, "Event", Moment)
    timing = Timing(64, torch.device("cuda"))
    waited = []
    for seconds in (1.0, 2.0, 0.5):  # the first before any work, the second beside that of the step before
        timing.begin_step()
        timing.add(seconds)
        waited.append(timing.waited)
    assert waited == [1.0, 1.0, 1.25]
    on_cpu = Timing(64, torch.device("cpu"))
    on_cpu.begin_step()
    on_cpu.add(0.5)
    assert on_cpu.waited == 0.5


def test_the_batch_picture_lays_the_images_out_in_rows() -> None:
    images = torch.stack([torch.full((4, 4, 3), i, dtype=torch.uint8) for i in range(10)])
    picture = batch_picture(images)
    assert picture.shape == (8, 32, 3)
    assert (picture[0, 4], picture[4, 4]) == (pytest.approx([1] * 3), pytest.approx([9] * 3))


def test_colours_go_from_green_over_yellow_to_red() -> None:
    assert [error_colour(metres) for metres in (1, 100, 5000)] == [(0, 200, 40), (255, 200, 40), (255, 0, 40)]


@pytest.mark.parametrize("span", [0, 20_000, 10_000_000])  # metres
def test_the_error_map_shows_near_queries_green_and_far_ones_red(tmp_path: Path, span: int) -> None:
    classes = class_table()
    classes = replace(classes, cell_north=classes.cell_north + span * (np.arange(len(classes)) == 0))
    queries = list_queries(write_queries(tmp_path / "q", classes), classes.zone)
    ranked = CellIndex(classes).holding(queries.east, queries.north)[:, None]
    readable = np.ones(len(queries), dtype=bool)
    outcome = assess_ranking(ranked, readable, classes, queries)
    picture = error_map(classes, queries, outcome)
    assert (picture == error_colour(3)).all(axis=2).any()
    assert not (picture == error_colour(5000)).all(axis=2).any()


def test_thousands_of_queries_are_smaller_dots_on_the_error_map(tmp_path: Path) -> None:
    classes = class_table()
    few = list_queries(write_queries(tmp_path / "q", classes), classes.zone)
    dots = []
    for times in (1, 200):
        east, north = np.tile(few.east, times), np.tile(few.north, times)
        queries = replace(few, paths=few.paths * times, names=few.names * times, east=east, north=north)
        ranked = CellIndex(classes).holding(east, north)[:, None]
        outcome = assess_ranking(ranked, np.ones(len(east), bool), classes, queries)
        dots.append((error_map(classes, queries, outcome) == error_colour(3)).all(axis=2).sum())
    assert 0 < dots[1] < dots[0] / 2


def test_an_epochs_line_says_all_in_one_line() -> None:
    line = epoch_line(
        1, 10, "group 1", loss=2.5, accuracy=12.34, rate=1234.5, wait_share=0.031, recall=56.78, seconds_left=200
    )
    assert line == "epoch  2/10  group 1  loss  2.5000  train acc  12.3 %  val LR@1  56.8 %  1,234 images/s  data wait 3%  left 3 min 20 s"  # fmt: skip  # noqa: E501


def test_an_unknown_or_missing_tracker_is_a_clear_error() -> None:
    with pytest.raises(WrongArguments, match="none of"):
        check_tracker("notebook")
    with pytest.raises(JobError, match="not installed"):
        check_tracker("aim")


class ServerError(Exception):
    """As trackers' packages raise: no OSError."""


class StrictTracker(GeneralTracker):
    """Accelerate's view of a server that takes MLflow's names only, and goes away at step 20."""

    name = "strict"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.began_with: dict = {}
        self.points: list[tuple[int | None, dict]] = []

    @property
    def tracker(self) -> list:
        return self.points

    def store_init_configuration(self, values: dict) -> None:
        self.began_with = values

    def log(self, values: dict, step: int | None = None, **options: object) -> None:
        for name in values:
            if not re.fullmatch(r"[/\w.\- :]+", name):
                raise ServerError(f"Invalid value {name}")
        if step == 20:
            raise ServerError("connection refused\nand more")
        self.points.append((step, values))


def test_another_tracker_gets_settings_and_points_and_its_errors_do_not_end_the_training() -> None:
    said: list[str] = []
    AcceleratorState._reset_state(reset_partial_state=True)
    strict = StrictTracker()
    config = configure(Path("shards"), Path("r"), tracker="mlflow")
    tracker = Tracker(Accelerator(cpu=True, log_with=[strict]), config, 0, said.append)
    assert strict.began_with["backbone"] == "small_cnn"
    tracker.scalars({"val/LR@1": 50.0, "loss/group-00": 1.5}, 10)
    tracker.picture("batch", np.zeros((4, 4, 3), np.uint8), 10)  # which only TensorBoard gets
    assert said == []
    for step in (20, 30):
        tracker.scalars({"loss/all": 1.0}, step)
    tracker.finish({"loss": 1.0})
    assert strict.points == [(10, {"val/LR-1": 50.0, "loss/group-00": 1.5})]
    assert said == ["the curves stop here, training goes on (connection refused)"]


def test_a_tracker_that_cannot_begin_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StrictTracker, values: dict) -> None:
        raise ServerError("no API key configured")

    monkeypatch.setattr(StrictTracker, "store_init_configuration", refuse)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with=[StrictTracker()])
    with pytest.raises(JobError, match="--tracker wandb: no API key configured"):
        Tracker(accelerator, configure(Path("shards"), Path("r"), tracker="wandb"), 0, print)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that of TensorBoard's thread
def test_where_the_curves_cannot_be_written_a_line_says_so_and_training_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk") as folder:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = configure(Path("shards"), folder / "r", tracker="tensorboard")
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(config.out))
        tracker = Tracker(accelerator, config, 0, said.append)
        fill(folder, leave=0)
        for step in range(1000):
            tracker.scalars({"loss": 1.0}, step)
            tracker.picture("batch", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), step)
            time.sleep(0.01)
            if said:
                break
        tracker.scalars({"loss": 1.0}, step + 1)
        tracker.finish({"loss": 1.0})
    assert said == ["the curves stop here, training goes on (No space left on device)"]


def test_a_run_that_goes_on_keeps_its_curves_and_takes_back_what_lies_beyond(
    shards: Path, queries: Path, tmp_path: Path
) -> None:
    settings = {"tracker": "tensorboard", "log_every": 4, "val_queries": queries}
    train_here(configure(shards, tmp_path / "r", epochs=2, **settings))
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000016")  # as if a kill had come before it
    train_here(configure(shards, tmp_path / "r", epochs=3, resume=True, **settings))
    curves = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    for name, steps in (
        ("val/LR@1", [8, 16, 24]),
        ("epoch/loss/all", [8, 16, 24]),
        ("loss/all", [1, 5, 9, 13, 17, 21]),
    ):
        assert [point.step for point in curves.Scalars(name)] == steps
    assert [point.step for point in curves.Images("val/error_map")] == [8, 16, 24]


def fetch(address: str) -> Any:
    for _ in range(300):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.loads(answer.read())
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.slow
def test_the_real_tensorboard_serves_curves_pictures_and_hyperparameters(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards").path
    queries = write_queries(tmp_path / "q")
    trainer = train_here(configure(shards, tmp_path / "r", tracker="tensorboard", log_every=4, val_queries=queries))
    port = 30000 + np.random.default_rng().integers(20000)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "r"), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://localhost:{port}/data/plugin"
        tags: set[str] = set()
        while "final/loss" not in tags:  # TensorBoard reads its files in the background
            tags = set(fetch(f"{address}/scalars/tags").get("tensorboard", {}))
        wanted = {"loss/all", "loss/group-00", "accuracy/group-01", "rate/model", "rate/head-03", "gradient_norm/model"}
        wanted |= {"memory/host_peak_bytes", "epoch/loss/group-00", "epoch/loss/all", "val/median_error_m"}
        wanted |= {"gradient_norm/head-00", "speed/images_per_second", "speed/data_wait_share"}
        wanted |= {f"val/LR@{n}" for n in (1, 5, 10, 20)}
        assert wanted <= tags
        points = fetch(f"{address}/scalars/scalars?run=tensorboard&tag=val/LR@1")
        assert [point[1] for point in points] == [8, 16]
        assert {"batch", "val/error_map"} <= set(fetch(f"{address}/images/tags")["tensorboard"])
        pictures = {}
        for tag in ("batch", "val/error_map"):
            (shown,) = fetch(f"{address}/images/images?run=tensorboard&tag={tag}&sample=0")[-1:]
            with urllib.request.urlopen(f"{address}/images/individualImage?{shown['query']}", timeout=10) as answer:
                pictures[tag] = np.asarray(Image.open(answer))
        assert pictures["batch"].shape == (2 * 32, 8 * 32, 3)  # 16 photos of 32 pixels
        assert trainer.metrics["LR@1"] > 0
        assert (pictures["val/error_map"] == error_colour(3)).all(axis=2).any()
        wish = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS"], "sliceSize": 9}
        request = urllib.request.Request(
            f"{address}/hparams/session_groups", json.dumps(wish).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            (session,) = json.loads(answer.read())["sessionGroups"]
        assert session["hparams"]["backbone"] == "small_cnn"
        finals = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
        for name in ("loss", "LR@1"):
            assert finals[f"final/{name}"] == pytest.approx(trainer.metrics[name])
    finally:
        server.terminate()
        server.wait()
