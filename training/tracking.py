"""What a person sees of a run: curves and pictures in a tracker (TensorBoard), one console line an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw

from shards.classes import ClassTable
from shards.console import JobError, WrongArguments, first_line, format_duration
from training.presets import TrainConfig
from training.queries import Queries
from training.scoring import QueryScores

PROJECT = "tensorboard"
_MAP_PIXELS = 640
_MANY = 3000  # queries on a map, from which on their dots are small: large ones hide each other


class Tracker:
    """Curves and pictures of a run, through Accelerate's tracker named by `--tracker`; silent for "none".

    A point lies at the number of steps done. Going on after `first_step` steps takes back the points beyond it, which a
    killed run left. Where they can no longer be written, `say` gets one line, and training goes on without them.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, first_step: int, say: Callable[[str], None]
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.say = say
        self.active = config.tracker != "none"
        if not self.active:
            return
        hparams = {name: _plain(value) for name, value in config.to_json().items()}
        options = {"tensorboard": {"purge_step": first_step + 1}} if config.tracker == "tensorboard" else {}
        # TensorBoard gets the hyper-parameters at the end, beside the final metrics.
        start_with = None if config.tracker == "tensorboard" else hparams
        try:
            accelerator.init_trackers(PROJECT, config=start_with, init_kwargs=options)
        except OSError:
            raise
        except Exception as error:  # of the tracker's package: no account, a server that does not answer
            raise JobError(f"--tracker {config.tracker}: {first_line(error)}") from error
        self.hparams = hparams

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add points to curves."""
        if self.active:
            if self.config.tracker == "mlflow":
                values = {name.replace("@", "-"): value for name, value in values.items()}  # it refuses LR@1
            with self._going_on_without():
                self.accelerator.log(values, step=step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Add a picture, uint8 [H, W, 3] RGB, where the tracker takes pictures."""
        writer = self._tensorboard()
        if writer is not None:
            with self._going_on_without():
                writer.add_image(name, image, global_step=step, dataformats="HWC")

    def finish(self, metrics: dict[str, float]) -> None:
        """Write the hyper-parameters with the run's final metrics, close the tracker and leave the process group."""
        writer = self._tensorboard()
        if writer is not None:
            finals = {f"final/{name}": value for name, value in metrics.items()}
            with self._going_on_without():
                writer.add_hparams(self.hparams, finals, run_name=".")
        with self._going_on_without():
            self.accelerator.end_training()

    @contextmanager
    def _going_on_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # trackers raise errors of their own, also for a server that does not answer
            if self.active:
                reason = error.strerror if isinstance(error, OSError) else None
                self.say(f"the curves stop here, training goes on ({reason or first_line(error)})")
            self.active = False

    def _tensorboard(self) -> Any:
        if not self.active or self.config.tracker != "tensorboard" or not self.accelerator.is_main_process:
            return None
        return self.accelerator.get_tracker("tensorboard").tracker


def check_tracker(name: str) -> None:
    """WrongArguments where Accelerate knows no such tracker, JobError where its package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import LoggerType

    known = {kind.value for kind in LoggerType} - {"all"}
    if name != "none" and name not in known:
        raise WrongArguments(f"--tracker {name}: none of {', '.join(sorted(known))}, none")
    if name != "none":
        from accelerate.tracking import get_available_trackers

        if LoggerType(name) not in get_available_trackers() or name not in LOGGER_TYPE_TO_CLASS:
            raise JobError(f"--tracker {name}: its package is not installed; pip install {name}")


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def batch_picture(images: torch.Tensor) -> np.ndarray:
    """The first 32 images of a batch, uint8 [b, S, S, 3], as one picture uint8 [H, W, 3]."""
    shown = images[:32].cpu().numpy()
    count, side = len(shown), shown.shape[1]
    columns = min(8, count)
    rows = -(-count // columns)
    canvas = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
    for i, image in enumerate(shown):
        top, left = i // columns * side, i % columns * side
        canvas[top : top + side, left : left + side] = image
    return canvas


def error_map(classes: ClassTable, queries: Queries, outcome: QueryScores) -> np.ndarray:
    """A map in UTM: cells grey, queries green where the best cell is near, over yellow to red where it is far.

    The colour is the error on a logarithmic scale: 25 m is light green, 1 km and more red. uint8 [H, W, 3].
    """
    west, south = classes.cell_east.min(), classes.cell_north.min()
    east, north = classes.cell_east.max() + classes.M, classes.cell_north.max() + classes.M
    scale = (_MAP_PIXELS - 20) / max(east - west, north - south)
    height = round((north - south) * scale) + 20
    image = Image.new("RGB", (round((east - west) * scale) + 20, height), "white")
    draw = ImageDraw.Draw(image)

    def place(easting: float, northing: float) -> tuple[float, float]:
        return 10 + (easting - west) * scale, height - 10 - (northing - south) * scale

    for cell_east, cell_north in zip(classes.cell_east.tolist(), classes.cell_north.tolist(), strict=True):
        left, bottom = place(cell_east, cell_north)
        right, top = place(cell_east + classes.M, cell_north + classes.M)
        corner = (max(left, right - 1), max(top, bottom - 1))  # in a city of 12 km and more a cell is less than a pixel
        draw.rectangle((left, top, *corner), fill=(235, 235, 235), outline=(215, 215, 215))
    radius = 3 if outcome.scored.sum() <= _MANY else 1
    for i in np.flatnonzero(outcome.scored):
        x, y = place(queries.east[i], queries.north[i])
        colour = error_colour(float(outcome.distances[i, 0]))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.asarray(image)


def error_colour(metres: float) -> tuple[int, int, int]:
    """Green up to 10 m, yellow at 100 m, red from 1 km."""
    badness = float(np.clip(np.log10(max(metres, 1.0)) / 2 - 0.5, 0, 1))
    return round(255 * min(1, 2 * badness)), round(200 * min(1, 2 - 2 * badness)), 40


def epoch_line(
    epoch: int,
    epochs: int,
    groups: str,
    *,
    loss: float,
    accuracy: float,
    rate: float,
    wait_share: float,
    recall: float | None,
    seconds_left: float,
) -> str:
    """The console's line of an epoch; accuracy and LR@1 in percent, rate in images a second."""
    parts = [
        f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}",
        groups,
        f"loss {loss:7.4f}",
        f"train acc {accuracy:5.1f} %",
    ]
    if recall is not None:
        parts.append(f"val LR@1 {recall:5.1f} %")
    return "  ".join([*parts, pace(rate, wait_share, seconds_left)])


def pace(rate: float, wait_share: float, seconds_left: float) -> str:
    """How fast a run goes, for its console lines; rate in images a second."""
    return f"{rate:,.0f} images/s  data wait {wait_share:.0%}  left {format_duration(seconds_left)}"
