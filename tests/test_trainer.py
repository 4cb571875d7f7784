"""Whole runs on a tiny data set: what is written, going on, stopping, and clear words for what cannot be."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import SOUTH, WEST, arguments, assess_run, class_table, configure, train, train_here, write_dataset
from tiny_run import write_run

import training.trainer as trainer_module
from shards.console import JobError
from shards.names import parse_name
from training.backbones import make_backbone
from training.checkpoint import best_checkpoint, list_checkpoints, load_checkpoint, load_for_evaluation
from training.run_folder import read_losses
from training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden" / "small_cnn_joint.txt"


@pytest.mark.parametrize("schedule", [pytest.param("sequential", marks=pytest.mark.slow), "joint"])
def test_a_run_learns_and_its_best_checkpoint_reproduces_its_recall(
    shards: Path, queries: Path, tmp_path: Path, schedule: str
) -> None:
    config = configure(shards, tmp_path / "r", schedule=schedule, epochs=8, val_queries=queries, lr_schedule="cosine")
    train_here(config)
    losses = read_losses(config.out)
    assert len(losses) == 64
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) / 4
    best = best_checkpoint(config.out)
    assert best is not None
    assert load_for_evaluation(config.out).path == best
    recall = assess_run(config.out, queries).recall
    assert recall[1] == json.loads((config.out / "best.json").read_text())["value"]
    assert recall[20] > 90


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "joint", "ema": 0.9, "lr_schedule": "cosine", "channels_last": True, "colour_jitter": 0.2},
    ],
)
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped_bit_for_bit(
    shards: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    whole = configure(shards, tmp_path / "whole", epochs=3, **settings)
    train_here(whole)
    parts = configure(shards, tmp_path / "parts", epochs=3, save_every=3, keep=50, **settings)
    train_here(parts)
    for path in list_checkpoints(parts.out):
        if load_checkpoint(path).state["step"] > 11:
            (path / "files.json").unlink()  # as if the run had been killed after step 11
    resumed = train_here(configure(shards, tmp_path / "parts", epochs=3, resume=True, **settings))
    assert resumed.progress.step == 24
    assert read_losses(parts.out) == read_losses(whole.out)
    ends = [load_checkpoint(list_checkpoints(out)[0]) for out in (whole.out, parts.out)]
    for name, tensor in ends[0].model.items():
        assert torch.equal(tensor, ends[1].model[name]), name
    for name, tensor in ends[0].training.tensors.items():
        assert torch.equal(tensor, ends[1].training.tensors[name]), name
    assert ends[0].state["progress"]["latest"] == ends[1].state["progress"]["latest"]


@pytest.mark.slow
def test_stochastic_depth_draws_the_same_after_resuming(shards: Path, tmp_path: Path) -> None:
    settings = {"backbone": "efficientnet_b0", "iterations_per_epoch": 2, "batch_size": 4}
    whole = train_here(configure(shards, tmp_path / "whole", epochs=2, **settings))
    train_here(configure(shards, tmp_path / "parts", epochs=1, **settings))
    train_here(configure(shards, tmp_path / "parts", epochs=2, resume=True, **settings))
    assert read_losses(tmp_path / "parts") == read_losses(whole.config.out)


def test_a_long_epoch_says_that_it_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer_module, "_SILENCE_SECONDS", 0.0)
    train_here(configure(shards, tmp_path / "r", epochs=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert re.match(r"step 2/\d+  loss +\d+\.\d{4}  [\d,]+ images/s  data wait \d+%  left ", lines[1])


def test_a_run_that_goes_on_with_other_queries_or_none_chooses_its_best_anew(
    shards: Path, queries: Path, tmp_path: Path
) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1, val_queries=queries, schedule="joint"))
    resumed = train_here(configure(shards, tmp_path / "r", schedule="joint", resume=True))
    assert resumed.progress.best == -resumed.progress.mean_of_groups()
    assert json.loads((tmp_path / "r" / "best.json").read_text())["metric"] == "minus the groups' mean loss"


def test_the_best_is_chosen_anew_where_the_queries_are_others_not_where_they_lie_elsewhere(
    shards: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, object] = {"schedule": "joint", "iterations_per_epoch": 2}
    train_here(configure(shards, tmp_path / "r", epochs=1, val_queries=queries, **settings))
    moved = shutil.copytree(queries, tmp_path / "moved")
    rows = [(path.name, parse_name(path.name)) for path in sorted(moved.iterdir())]
    for epochs, count, anew in ((2, 16, False), (3, 5, True), (4, 5, False)):
        listed = tmp_path / "moved" / "val.csv"
        listed.write_text("\n".join(["path,east,north", *(f"{n},{p.east},{p.north}" for n, p in rows[:count])]))
        capsys.readouterr()
        again = configure(shards, tmp_path / "r", epochs=epochs, val_queries=listed, resume=True, **settings)
        trainer = train_here(again)
        assert ("best checkpoint is chosen anew" in capsys.readouterr().out) == anew
        assert (tmp_path / "r" / "best.json").exists()
        assert trainer.validator is not None
        assert len(trainer.validator.queries) == count


def test_a_cosine_run_that_goes_on_with_the_plateau_schedule_starts_from_the_rate_asked_for(
    shards: Path, tmp_path: Path
) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1, lr_schedule="cosine"))
    resumed = train_here(configure(shards, tmp_path / "r", resume=True, lr=5e-4))
    assert resumed.engine.rates.model_rate == 5e-4


def test_a_resumed_run_says_what_changed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1))
    train_here(configure(shards, tmp_path / "r", epochs=2, head_lr=0.5, resume=True))
    printed = capsys.readouterr().out
    assert "--head-lr 0.01 -> 0.5" in printed
    assert "--epochs 1 -> 2" in printed


def test_a_run_goes_on_where_the_weights_that_it_began_from_are_gone(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(make_backbone("small_cnn", "none").state_dict(), weights)
    train_here(configure(shards, tmp_path / "r", epochs=1, weights=str(weights)))
    weights.unlink()
    resumed = train_here(configure(shards, tmp_path / "r", resume=True, weights=str(weights)))
    assert resumed.progress.step == 16
    capsys.readouterr()
    again = configure(shards, tmp_path / "r", epochs=3, resume=True, weights="none", init_from=tmp_path / "other")
    assert train_here(again).progress.step == 24
    printed = capsys.readouterr().out
    for flag in ("--weights", "--init-from"):
        assert f"{flag} has no effect: the run goes on from its own weights" in printed
        assert f"changed since then: {flag}" not in printed


def test_a_resumed_run_says_that_photos_came_to_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "shards", images=10)
    train_here(configure(tmp_path / "shards", tmp_path / "r", epochs=1))
    shutil.rmtree(tmp_path / "shards")
    write_dataset(tmp_path / "shards", images=12)
    for epochs, said in ((2, True), (3, False)):
        train_here(configure(tmp_path / "shards", tmp_path / "r", epochs=epochs, resume=True))
        assert ("changed since then: the data set, 160 -> 192 photos" in capsys.readouterr().out) == said


def test_a_truncated_and_a_foreign_checkpoint_are_named_and_the_one_before_them_is_taken_up(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=2))
    last = list_checkpoints(tmp_path / "r")[0] / "optimizer.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    foreign = tmp_path / "r" / "checkpoints" / "step-00000099"
    foreign.mkdir()
    (foreign / "best_model.pth").write_bytes(b"")
    resumed = train_here(configure(shards, tmp_path / "r", epochs=2, resume=True))
    printed = capsys.readouterr().out
    assert f"passed over: {foreign}: no checkpoint of this project (it has no files.json)" in printed
    assert f"passed over: {last}: truncated or changed" in printed
    assert f"goes on from {tmp_path / 'r' / 'checkpoints' / 'step-00000008'} after step 8" in printed
    assert resumed.progress.step == 16
    assert len(read_losses(tmp_path / "r")) == 16


def test_an_imported_checkpoint_is_no_run_to_go_on_from(shards: Path, tmp_path: Path) -> None:
    imported = write_run(tmp_path / "r")
    with pytest.raises(JobError, match=rf"step-00000007: holds weights without .* --init-from {imported}$"):
        train_here(configure(shards, imported, descriptor_dim=32, resume=True))
    train_here(configure(shards, tmp_path / "new", descriptor_dim=32, init_from=imported, epochs=1))


def test_golden_losses_are_reproduced(shards: Path, tmp_path: Path) -> None:
    """A library may move them by 1e-3; `python tests/test_trainer.py` writes the file anew."""
    losses = golden_run(shards, tmp_path / "r")
    golden = [float(line.split(" ")[1]) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    np.testing.assert_allclose(losses, golden, rtol=1e-3)


def golden_run(shards: Path, out: Path) -> list[float]:
    settings = {"iterations_per_epoch": 20, "epochs": 1, "lr": 1e-4, "head_lr": 1e-3, "seed": 5}
    train_here(configure(shards, out, schedule="joint", **settings))
    return read_losses(out)


def test_without_queries_the_best_checkpoint_waits_until_every_group_was_trained(shards: Path, tmp_path: Path) -> None:
    trainer = train_here(configure(shards, tmp_path / "r", epochs=3))
    assert best_checkpoint(tmp_path / "r") is None
    assert trainer.progress.best is None
    trainer = train_here(configure(shards, tmp_path / "r", epochs=4, resume=True))
    assert trainer.progress.best == pytest.approx(-np.mean(list(trainer.progress.latest.values())))


def test_another_class_map_is_refused_and_init_from_matches_cells(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train_here(configure(shards, tmp_path / "r", epochs=1))
    grown = class_table(side=4, shift=2)
    other = write_dataset(tmp_path / "grown", grown).path
    with pytest.raises(JobError, match="another class map"):
        train_here(configure(other, tmp_path / "r", resume=True))
    settings = {"epochs": 1, "iterations_per_epoch": 1, "lr": 1e-9, "head_lr": 1e-9, "lr_schedule": "constant"}
    trainer = train_here(configure(other, tmp_path / "new", init_from=tmp_path / "r", **settings))
    assert "8 of 16 classes" in capsys.readouterr().out
    old = class_table()
    for row in range(len(grown)):
        same = (old.cell_east == grown.cell_east[row]) & (old.cell_north == grown.cell_north[row])
        new_weight = trainer.engine.bank.heads[int(grown.group[row])].weight[int(grown.label[row])]
        if same.any():
            match = int(np.flatnonzero(same)[0])
            old_weight = first.engine.bank.heads[int(old.group[match])].weight[int(old.label[match])]
            torch.testing.assert_close(new_weight, old_weight, atol=1e-6, rtol=0)
    abroad = write_dataset(tmp_path / "abroad", replace(old, zone=old.zone + 1)).path
    train_here(configure(abroad, tmp_path / "far", init_from=tmp_path / "r", **settings))
    assert "0 of 16 classes" in capsys.readouterr().out


def test_the_averages_of_a_run_that_starts_from_another_begin_at_its_weights(shards: Path, tmp_path: Path) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1))
    settings = {"epochs": 1, "iterations_per_epoch": 1, "lr": 1e-9, "head_lr": 1e-9, "lr_schedule": "constant"}
    train_here(configure(shards, tmp_path / "new", init_from=tmp_path / "r", ema=0.9, **settings))
    old, new = (load_for_evaluation(tmp_path / name) for name in ("r", "new"))
    for group in old.heads:  # of which one was trained
        torch.testing.assert_close(new.heads[group]["weight"], old.heads[group]["weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(new.model["projection.weight"], old.model["projection.weight"], atol=1e-6, rtol=0)


def test_a_best_checkpoint_that_a_kill_left_unmarked_is_marked_by_the_resumed_run(
    shards: Path, queries: Path, tmp_path: Path
) -> None:
    settings = {"val_queries": queries, "epochs": 1}
    train_here(configure(shards, tmp_path / "r", **settings))
    mark = (tmp_path / "r" / "best.json").read_text()
    (tmp_path / "r" / "best.json").unlink()
    train_here(configure(shards, tmp_path / "r", resume=True, **settings))
    assert (tmp_path / "r" / "best.json").read_text() == mark


def test_a_data_set_of_one_class_a_group_trains_to_no_loss(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards", class_table(side=2)).path
    train_here(configure(shards, tmp_path / "r", schedule="joint", epochs=1))
    assert read_losses(tmp_path / "r") == [0.0] * 8


@pytest.mark.parametrize(
    "flag", [{"backbone": "resnet18"}, {"head": "LMCC"}, {"descriptor_dim": 64}, {"freeze_until": 2}]
)
def test_a_checkpoint_of_another_model_is_refused(shards: Path, tmp_path: Path, flag: dict[str, object]) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1, iterations_per_epoch=1))
    with pytest.raises(JobError, match=f"was trained with --{next(iter(flag)).replace('_', '-')}"):
        train_here(configure(shards, tmp_path / "r", resume=True, **flag))


@pytest.mark.slow
def test_offloaded_heads_train_and_validate_as_resident_ones(shards: Path, queries: Path, tmp_path: Path) -> None:
    runs = [
        train_here(configure(shards, tmp_path / str(offload), offload_heads=offload, val_queries=queries))
        for offload in (False, True)
    ]
    assert read_losses(runs[0].config.out) == read_losses(runs[1].config.out)
    assert runs[0].metrics == runs[1].metrics


def test_an_unreadable_validation_query_is_named_and_left_out(
    shards: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    good, bad = sorted(queries.iterdir())[:2]
    (folder / good.name).write_bytes(good.read_bytes())
    (folder / bad.name).write_bytes(bad.read_bytes()[:-300])
    train_here(configure(shards, tmp_path / "r", val_queries=folder))
    printed = capsys.readouterr().out
    assert printed.count("1 validation query cannot be read") == 1
    assert bad.name in printed


def test_no_usable_validation_query_is_a_clear_error(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "holiday.jpg").write_bytes(b"")
    said = (
        r"no validation query has usable coordinates \(.*/holiday\.jpg: no coordinates in its name\); where names say "
    )
    with pytest.raises(
        JobError, match=said + r"nothing, give a list with path, latitude, longitude \(docs/own-data\.md\)"
    ):
        train_here(configure(shards, tmp_path / "r", val_queries=tmp_path / "q"))
    (tmp_path / "q" / "holiday.jpg").rename(tmp_path / "q" / f"@{WEST}@{SOUTH}@.jpg")
    with pytest.raises(JobError, match=rf"none of its photos can be read \(.*@{WEST}@{SOUTH}@\.jpg: an empty file\)"):
        train_here(configure(shards, tmp_path / "r", val_queries=tmp_path / "q"))
    next((tmp_path / "q").iterdir()).rename(tmp_path / "q" / f"@{WEST}@{SOUTH + 3_000_000}@.jpg")
    away = r"within 25 m of a class's centre \(the nearest: 3,000 km; UTM zone 10 north, metres\)"
    with pytest.raises(JobError, match=away):
        train_here(configure(shards, tmp_path / "r", val_queries=tmp_path / "q"))


def test_validation_queries_that_go_away_are_a_clear_error(
    shards: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.validation.CACHE_BYTES", 0)
    moved = shutil.copytree(queries, tmp_path / "q")
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(configure(shards, tmp_path / "r", epochs=1, val_queries=moved))
    shutil.rmtree(moved)
    with pytest.raises(JobError, match="its photos went away; bring them back and go on with --resume"):
        trainer.run()


@pytest.mark.slow
def test_the_command_trains_refuses_to_overwrite_and_goes_on(shards: Path, tmp_path: Path) -> None:
    words = arguments(shards, tmp_path / "r")
    code, out, err = train(words)
    assert (code, err) == (0, "")
    assert "no validation queries" in out
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 2
    code, _, err = train(words)
    assert code == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    code, out, _ = train([*words, "--resume", "--epochs", "3"])
    assert code == 0
    assert "goes on from" in out


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        written = golden_run(write_dataset(Path(folder) / "shards").path, Path(folder) / "r")
    text = "".join(f"{step} {loss:.7g}\n" for step, loss in enumerate(written))
    GOLDEN.write_text("# step, loss: small_cnn, AAMC, joint schedule, batch 16, seed 5, tests/tiny.py\n" + text)


@pytest.mark.slow
@pytest.mark.parametrize("read", ["indexed", "stream"])
def test_memory_and_open_files_of_a_training_stay_flat_over_200_epochs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    process, seen = psutil.Process(), []
    end_epoch = Trainer._end_epoch

    def end_epoch_and_look(self: Trainer, seconds_left: float) -> bool:
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        return end_epoch(self, seconds_left)

    monkeypatch.setattr(Trainer, "_end_epoch", end_epoch_and_look)
    settings = {"read": read, "stream_run": 4, "stream_window": 64, "lr_schedule": "constant"}
    train_here(
        configure(shards, tmp_path / "r", epochs=220, iterations_per_epoch=2, save_every_epochs=1000, **settings)
    )
    (memory, files, threads), (memory_later, files_later, threads_later) = seen[20], seen[-1]
    assert len(seen) == 220
    assert memory_later - memory < 48 << 20
    assert files_later <= files
    assert threads_later <= threads
