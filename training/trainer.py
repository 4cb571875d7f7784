"""The training loop: epochs of steps, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn, TextIO

import numpy as np

from shards.console import JobError, describe_os_error, format_count, format_duration, in_words
from shards.dataset import Dataset
from shards.loader import Batch
from shards.sample_photos import SamplePhotos
from shards.workers import cores_of_process
from training.advice import warnings_of
from training.assembly import (
    check_against_world,
    make_accelerator,
    make_engine,
    make_loader,
    make_profiler,
    make_world,
    profile_folder,
)
from training.batch_norms import averaged_batch_norms
from training.checkpoint import best_checkpoint, list_checkpoints
from training.curves import epoch_curves, step_curves
from training.distributed import to_device
from training.engine import StepOutcome
from training.interruption import AskedToStop, Interruption
from training.presets import TrainConfig
from training.progress import Progress, Timing
from training.run_folder import begin_run, check_run_folder, lock_run, start_from
from training.schedules import make_schedule
from training.snapshot import resume_latest, save_run
from training.tracking import Tracker, batch_picture, check_tracker, epoch_line, error_map, pace
from training.validation import Validator

_SILENCE_SECONDS = 30.0  # of an epoch, after which a line says that it goes on


class Trainer:
    """One training run of this process among those of its launch. `run` trains to the end or to a signal."""

    def __init__(self, config: TrainConfig, interruption: Interruption | None = None) -> None:
        self.interruption = interruption or Interruption()  # one that is not entered receives nothing
        check_tracker(config.tracker)
        check_run_folder(config.out, config.resume)
        dataset = Dataset.open(config.shards)
        self.accelerator, self.config = make_accelerator(config)
        config = self.config
        self.world = make_world(self.accelerator)
        self.dataset, self.classes = dataset, dataset.classes
        self.groups = dataset.classes.groups
        check_against_world(config, self.world, len(self.groups))
        self.schedule = make_schedule(
            config.schedule,
            self.groups,
            batch_size=config.batch_size,
            iterations_per_epoch=config.iterations_per_epoch,
        )
        self.validator: Validator | None = None
        if config.val_queries is not None:
            self.validator = Validator(
                config, self.classes, self.world, config.threads or cores_of_process(), self.interruption
            )
        self.engine = make_engine(config, self.classes, self.accelerator, self.world)
        self.loader = make_loader(config, dataset, self.schedule, self.accelerator, self.world)
        self.total_steps = config.epochs * config.iterations_per_epoch
        self.lock = self._lock()
        self.progress = self._begin()
        self.loss_file = self.world.made_on(
            self.world.is_main, lambda: begin_run(config.out, config, self.progress.step)
        )
        self.tracker = Tracker(self.accelerator, config, self.progress.step, self.say)
        self.metrics: dict[str, float] = {}
        self.timing = Timing(config.batch_size, self.world.device)
        self.skipped_in_row = 0
        self.said_at = time.monotonic()

    def _begin(self) -> Progress:
        """Go on where the run was left, start from another run's weights, or start anew."""
        progress = resume_latest(self.engine, self.say) if self.config.resume else None
        if progress is None and self.config.init_from is not None:
            self.say(start_from(self.config.init_from, self.engine.model, self.engine.bank, self.classes))
            self.engine.start_averages()
        progress = progress or Progress()
        photos = self.validator.queries.fingerprint() if self.validator else ""
        if progress.val_photos and photos and progress.val_photos != photos:
            self.say("other validation queries than before: the best checkpoint is chosen anew")
            progress.best = None
        progress.val_photos = photos
        return progress

    def _lock(self) -> TextIO | None:
        """Keep other trainings out of the folder; JobError on every rank where rank 0 is kept out."""

        def lock() -> TextIO | None:
            file = lock_run(self.config.out)
            check_run_folder(self.config.out, self.config.resume)  # a run may have come and gone since the first
            return file

        return self.world.made_on(self.world.is_main, lock)

    def say(self, message: str) -> None:
        """Print a line on the main process."""
        if self.world.is_main:
            print(message, flush=True)
        self.said_at = time.monotonic()

    def run(self) -> None:
        """Train to the last epoch, until the rate is exhausted, or until a signal asks to stop; then say so."""
        self.say(self._description())
        begun_at, first_step = time.monotonic(), self.progress.step
        stopped = False
        with ExitStack() as stack:
            stack.callback(self._close)
            profiler = stack.enter_context(make_profiler(self.config)) if self._profiles() else None
            batches = self.loader.batches(first_step, self.total_steps)
            self.interruption.begin()
            while not stopped and not self._finished():
                if not self._at_end_of_epoch():  # where a signal cut a run short there, its end comes first
                    stopped = self._run_epoch(batches, profiler)
                if not stopped:
                    done = max(1, self.progress.step - first_step)
                    left = (time.monotonic() - begun_at) / done * (self.total_steps - self.progress.step)
                    stopped = self._end_epoch(left)
            if stopped:
                self._save()
                name = self.interruption.received or "a signal to another process"
                self.say(
                    f"stopped by {name} after step {self.progress.step:,}; saved in "
                    f"{list_checkpoints(self.config.out)[0] if self.world.is_main else ''}; go on with --resume"
                )
            elif 0 < self.progress.step - first_step == self.skipped_in_row:
                self._give_up("no step of this start had a finite loss")
            else:
                self._say_end(time.monotonic() - begun_at)
            self._say_replaced()
            self.tracker.finish(self.metrics)

    def _at_end_of_epoch(self) -> bool:
        return self.progress.step % self.config.iterations_per_epoch == 0 and bool(self.progress.counts)

    def _finished(self) -> bool:
        ended = self.progress.step >= self.total_steps or self.engine.rates.exhausted
        return ended and not self._at_end_of_epoch()

    def _run_epoch(self, batches: Iterator[Batch], profiler: Any) -> bool:
        """Train to the end of the epoch; True where a signal cut it short."""
        config, progress = self.config, self.progress
        epoch = progress.step // config.iterations_per_epoch
        end = (epoch + 1) * config.iterations_per_epoch
        self.engine.bank.place(int(g) for g in np.unique(self.schedule(progress.step)))
        self.timing = Timing(config.batch_size, self.world.device)
        while progress.step < end:
            step = progress.step
            batch, asked_to_stop = self._next_batch(batches, step)
            self.timing.begin_step()
            log = step % config.log_every == 0
            outcome = self.engine.step(
                step,
                batch.images.to(self.world.device, non_blocking=True),
                to_device(batch.labels, self.world.device),
                batch.groups,
                asked_to_stop=asked_to_stop,
                want_norm=log,
            )
            if outcome.stop:
                return True
            self.timing.add(batch.wait_seconds)
            progress.step += 1
            if self.loss_file is not None:
                self.loss_file.add(step, outcome.loss / config.batch_size)
            if outcome.finite:
                progress.add(self.groups, self.schedule(step), outcome)
                self.skipped_in_row = 0
            else:
                progress.skipped += 1
                self.skipped_in_row += 1
                self._note_skipped(step, self.skipped_in_row)
            if log:
                self._log_step(step, batch, outcome)
            if time.monotonic() - self.said_at > _SILENCE_SECONDS:
                self._say_on_the_way(outcome)
            if profiler is not None:
                profiler.step()
            due = config.save_every and progress.step % config.save_every == 0 and progress.step < end
            if due and not self.skipped_in_row:
                self._save()
        return False

    def _next_batch(self, batches: Iterator[Batch], step: int) -> tuple[Batch, bool]:
        """The batch of a step; where a signal comes before it, a blank one and True: other ranks may be in the step."""
        try:
            with self.interruption.ends_wait():
                return next(batches), False
        except AskedToStop:
            return self.loader.blank(step), True

    def _say_on_the_way(self, outcome: StepOutcome) -> None:
        rate, left = self.timing.rate(), self.total_steps - self.progress.step
        self.say(
            f"step {self.progress.step:,}/{self.total_steps:,}  loss {outcome.loss / self.config.batch_size:7.4f}  "
            + pace(rate, self.timing.wait_share(), left * self.config.batch_size / rate)
        )

    def _note_skipped(self, step: int, in_row: int) -> None:
        self.say(f"step {step:,}: the loss or its gradient is not finite; skipped")
        if in_row >= self.config.nan_patience:
            self._give_up(f"{format_count(in_row, 'step')} in a row had a loss that is not finite")

    def _give_up(self, reason: str) -> NoReturn:
        found = list_checkpoints(self.config.out)
        good = f"the last good checkpoint is {found[0]}" if found else "no checkpoint was saved before"
        raise JobError(f"{reason}; {good}; lower --lr or --head-lr, or use --grad-clip or --precision fp32")

    def _end_epoch(self, seconds_left: float) -> bool:
        """Validate, save and tell; True where a signal cut the validation short, and nothing was done."""
        config, progress = self.config, self.progress
        epoch = progress.step // config.iterations_per_epoch - 1
        groups = "all groups" if config.schedule == "joint" else f"group {next(iter(progress.counts), '-')}"
        loss, accuracy = progress.mean_loss(), progress.accuracy()
        rate, wait_share = self.timing.rate(), self.timing.wait_share()
        values = epoch_curves(progress)
        recall, last = None, progress.step >= self.total_steps or self.engine.rates.ends_after(loss)
        if self.validator is not None and (last or (epoch + 1) % config.val_every == 0):
            recall, stopped = self._validate(values)
            if stopped:
                return True
        self.engine.rates.end_epoch(loss)
        progress.end_epoch()
        self.tracker.scalars(values, progress.step)
        self.metrics |= {"loss": loss, "accuracy": accuracy}
        sound = not self.skipped_in_row  # else the weights may be spoilt
        better = sound and self._is_better(recall)
        if better or last or (sound and (epoch + 1) % config.save_every_epochs == 0):
            self._save(better)
        self.say(
            epoch_line(
                epoch,
                config.epochs,
                groups,
                loss=loss,
                accuracy=accuracy,
                rate=rate,
                wait_share=wait_share,
                recall=recall,
                seconds_left=seconds_left,
            )
        )
        return False

    def _validate(self, values: dict[str, float]) -> tuple[float | None, bool]:
        """LR@1 in percent on every rank, and whether a signal cut it short; adds LR@N to `values`."""
        assert self.validator is not None
        model = self.engine.model
        with self.engine.averaged(), averaged_batch_norms(model, self.world), self.accelerator.autocast():
            outcome, stopped = self.validator.validate(model, self.engine.bank)
        if stopped:
            return None, True
        if (unreadable := self.validator.describe_unreadable()) is not None:
            self.say(unreadable)
        recall = None
        if outcome is not None:
            recall = outcome.recall[1]
            for n, value in outcome.recall.items():
                values[f"val/LR@{n}"] = value
                self.metrics[f"LR@{n}"] = value
            errors = outcome.distances[outcome.scored, 0]
            values["val/median_error_m"] = float(np.median(errors)) if len(errors) else math.nan
            picture = error_map(self.classes, self.validator.queries, outcome)
            self.tracker.picture("val/error_map", picture, self.progress.step)
        return self.world.gather(recall)[0], False

    def _is_better(self, recall: float | None) -> bool:
        """Whether this epoch is the best so far: by LR@1, or without validation queries by the groups' mean loss.

        Groups differ in loss, so the mean is over the latest epoch of every group, once each has had one.
        """
        progress = self.progress
        if self.validator is not None:
            value = recall
        elif len(progress.latest) < len(self.groups):
            value = None
        else:
            value = -progress.mean_of_groups()
        if value is None or math.isnan(value) or (progress.best is not None and value <= progress.best):
            return False
        progress.best = value
        return True

    def _save(self, best: bool = False) -> None:
        if self.skipped_in_row and not all(self.world.gather(self.engine.has_finite_weights())):
            self._give_up(f"the weights after step {self.progress.step:,} are not finite and were not saved")
        metric = "LR@1 on the validation queries" if self.validator else "minus the groups' mean loss"
        save_run(self.engine, self.progress, self.loss_file, best_by=metric if best else None)

    def _log_step(self, step: int, batch: Batch, outcome: StepOutcome) -> None:
        values = step_curves(self.engine, outcome, self.schedule(step), self.timing)
        self.tracker.scalars(values, step + 1)
        if step % self.config.iterations_per_epoch == 0:
            self.tracker.picture("batch", batch_picture(batch.images), step + 1)

    def _familiar_queries(self) -> list[str]:
        """A warning where validation queries seem to be training photos, or where tables cannot tell."""
        if self.validator is None or not self.world.is_main:
            return []
        queries = self.validator.queries
        try:
            said = SamplePhotos(self.dataset).familiar(queries.east[queries.located], queries.north[queries.located])
        except (JobError, OSError) as error:
            return [f"warning: {in_words(error)}"]
        return [f"warning: {queries.source}: {said}"] if said else []

    def _description(self) -> str:
        config, model = self.config, self.engine.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        begins = self.progress.step == 0 and config.init_from is None
        lines = [
            *warnings_of(config, self.classes, self.dataset.manifest.image_size, self.world, begins=begins),
            *self._familiar_queries(),
            f"{config.backbone}, {config.head} heads of {format_count(len(self.groups), 'group')} "
            f"with {format_count(len(self.classes), 'class')}, {trained:,} trained parameters in the model",
            f"{config.schedule} schedule, {format_count(self.world.size, 'process')} on {self.world.device.type}, "
            f"{config.precision}, batch {config.batch_size}, {format_count(self.total_steps, 'step')}",
        ]
        if self.validator is None:
            lines.append(
                "no validation queries (--val-queries): the best checkpoint is the one of the lowest mean loss"
            )
        else:
            lines.append(f"{self.validator.describe_set()}; the best checkpoint is the one of the highest LR@1")
        return "\n".join(lines)

    def _say_end(self, seconds: float) -> None:
        if self.engine.rates.exhausted:
            self.say("the learning rate fell under 1e-6: training ends")
        best = best_checkpoint(self.config.out) if self.world.is_main else None
        value = ""
        if self.progress.best is not None:
            loss = self.validator is None
            value = f" (mean loss {-self.progress.best:.4g})" if loss else f" (LR@1 {self.progress.best:.1f} %)"
        which = f"best checkpoint {best}{value}" if best else "no checkpoint is marked as the best"
        self.say(f"trained to step {self.progress.step:,} in {format_duration(seconds)}; {which}")
        if self.progress.skipped:
            self.say(f"skipped {format_count(self.progress.skipped, 'step')} whose loss was not finite")
        if self._profiles() and not profile_folder(self.config.out).is_dir():
            self.say("--profile: no trace, since this start ended before its step 15")

    def _say_replaced(self) -> None:
        if replaced := sum(self.world.gather(self.loader.failures)):
            self.say(f"replaced {format_count(replaced, 'sample')} that could not be read by other draws")

    def _profiles(self) -> bool:
        return self.config.profile and self.world.is_main

    def _close(self) -> None:
        self.loader.close()
        if self.loss_file is not None:
            try:
                self.loss_file.flush()
            except OSError as error:
                self.say(f"the last losses are lost: {describe_os_error(error)}")
        if self.lock is not None:
            self.lock.close()
