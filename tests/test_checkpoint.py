"""Checkpoints: whole or not at all, nothing pickled, and the previous one used where the last is damaged."""

import errno
import json
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import class_table

import training.checkpoint as checkpoint_module
from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    best_checkpoint,
    drop_old,
    list_checkpoints,
    load_checkpoint,
    load_for_evaluation,
    load_latest,
    mark_best,
    save_checkpoint,
    training_state,
    training_values,
)

FILES = [
    "model.safetensors",
    "heads.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.json",
    "classes.parquet",
    "optimizer.json",
    "provenance.json",
]


def make_checkpoint(step: int) -> Checkpoint:
    torch.manual_seed(step)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.randn(3, 2))])
    return Checkpoint(
        model={"weight": torch.randn(3, 2), "count": torch.tensor(step)},
        heads={0: {"weight": torch.randn(4, 2)}, 3: {"weight": torch.randn(5, 2), "bias": torch.randn(5)}},
        classes=class_table(),
        config={"backbone": "small_cnn"},
        training=training_state({"optimizer": optimizer.state_dict()}),
        state={"step": step},
        provenance={},
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = make_checkpoint(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert loaded.state == saved.state
    assert loaded.config == saved.config
    assert loaded.classes.fingerprint() == saved.classes.fingerprint()
    for name, tensor in saved.model.items():
        assert torch.equal(loaded.model[name], tensor)
    assert loaded.heads.keys() == saved.heads.keys()
    assert torch.equal(loaded.heads[3]["bias"], saved.heads[3]["bias"])


def test_heads_come_back_in_the_order_of_their_groups(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(1)
    checkpoint.heads.update({group: {"weight": torch.full((1, 2), float(group))} for group in (10, 2, 11, 1)})
    heads = load_checkpoint(save_checkpoint(tmp_path, checkpoint)).heads
    assert list(heads) == [0, 1, 2, 3, 10, 11]
    assert all((heads[group]["weight"] == group).all() for group in (1, 2, 10, 11))


def test_weights_are_saved_without_a_copy_of_them_in_memory_but_for_those_that_share_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(7)
    large = torch.randn(1000, 1000)
    checkpoint.model.update({"large": large, "row": large[5]})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        path = save_checkpoint(tmp_path, checkpoint)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 100_000
    loaded = load_checkpoint(path).model
    assert torch.equal(loaded["large"], large)
    assert torch.equal(loaded["row"], large[5])


@pytest.mark.parametrize("fault", ["full disk", "kill"])
def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    old = save_checkpoint(tmp_path, make_checkpoint(7))
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    after = make_checkpoint(7)
    after.model["count"] = torch.tensor(8)

    def fails(descriptor: int) -> None:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        if fault == "full disk":
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(tmp_path, after)
        elif (child := os.fork()) == 0:
            save_checkpoint(tmp_path, after)
        else:
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert list_checkpoints(tmp_path) == [old]
    assert load_checkpoint(save_checkpoint(tmp_path, after)).model["count"] == 8


def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(7))
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_optimizer_state_survives_without_pickle(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.randn(3)
    optimizer.step()
    state = training_values(training_state({"optimizer": optimizer.state_dict(), "rates": {"best": float("inf")}}))
    other = torch.optim.Adam([torch.nn.Parameter(parameter.detach().clone())], lr=0.5)
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(next(iter(other.state.values()))[key], value)
    assert state["rates"]["best"] == float("inf")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    names = {file.name for file in save_checkpoint(tmp_path, make_checkpoint(1)).iterdir()}
    assert names == {*FILES, "optimizer.json", "provenance.json", "files.json"}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1))
    last = save_checkpoint(tmp_path, make_checkpoint(2))
    cut(last / name)
    found = load_latest(tmp_path)
    assert found is not None
    path, loaded, passed_over = found
    assert loaded.state["step"] == 1
    assert path.name == "step-00000001"
    assert str(last / name) in passed_over[0]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1)) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": "x", "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"state.json": 3}}',
        '{"format": 1, "files": {"state.json": {"bytes": 3, "crc31": 4}}}',
    ],
)
def test_a_foreign_folder_is_no_checkpoint(tmp_path: Path, content: str) -> None:
    foreign = tmp_path / "checkpoints" / "step-00000009"
    foreign.mkdir(parents=True)
    (foreign / "files.json").write_text(content)
    with pytest.raises(CheckpointError, match="no checkpoint of this project"):
        load_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        load_latest(tmp_path)


def test_what_is_no_checkpoint_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, reason in {"empty": "it has no files.json", "file": "a file", "nowhere": "no such folder"}.items():
        with pytest.raises(CheckpointError, match=rf"{name}: no checkpoint of this project \({reason}\)"):
            load_for_evaluation(tmp_path / name)


def test_folders_whose_names_hold_no_step_are_no_checkpoints(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1))
    for name in ("step-", "step-x", "step-\u00b2", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert list_checkpoints(tmp_path) == [path]


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    with pytest.raises(CheckpointError):
        load_for_evaluation(tmp_path)


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_save_leaves_the_previous_checkpoint_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1))
    written = []

    def full_disk(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, make_checkpoint(step))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_checkpoint(list_checkpoints(tmp_path)[0]).state["step"] == 1


def test_the_latest_k_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        path = save_checkpoint(tmp_path, make_checkpoint(step))
        if step == 2:
            mark_best(tmp_path, path, "LR@1", 50.0)
    drop_old(tmp_path, keep=2, step=5)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000004", "step-00000002"]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_checkpoints_that_a_resumed_run_passed_over_do_not_push_out_its_own(tmp_path: Path) -> None:
    for step in (2, 7, 8):
        path = save_checkpoint(tmp_path, make_checkpoint(step))
        if step > 2:
            (path / "files.json").unlink()
    save_checkpoint(tmp_path, make_checkpoint(3))
    drop_old(tmp_path, keep=2, step=3)
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000003"
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["8", "7", "3", "2"]


def test_evaluation_takes_the_best_of_a_run_else_the_latest_whole_one(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, make_checkpoint(1))
    second = save_checkpoint(tmp_path, make_checkpoint(2))
    assert load_for_evaluation(tmp_path).path == second
    assert load_for_evaluation(tmp_path).passed_over == ()
    cut(second / "heads.safetensors")
    assert load_for_evaluation(tmp_path).path == first
    (reason,) = load_for_evaluation(tmp_path).passed_over
    assert reason.startswith(f"{second / 'heads.safetensors'}: truncated or changed")
    save_checkpoint(tmp_path, make_checkpoint(3))
    mark_best(tmp_path, first, "LR@1", 50.0)
    assert load_for_evaluation(tmp_path).path == first
    assert load_for_evaluation(first).heads[0]["weight"].shape == (4, 2)


def test_evaluation_reads_no_optimizer_state(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1))
    for name in ("optimizer.safetensors", "optimizer.json", "state.json"):
        (path / name).unlink()
    assert np.isfinite(load_for_evaluation(path).model["weight"].numpy()).all()


def test_a_checkpoint_of_a_later_format_says_so(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1))
    listing = json.loads((path / "files.json").read_text())
    (path / "files.json").write_text(json.dumps(listing | {"format": 99}))
    with pytest.raises(CheckpointError, match="later version"):
        load_checkpoint(path)


def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1))
    weights = path / "heads.safetensors"
    data = b"\xff" * 7 + weights.read_bytes()[7:]  # no safetensors file, but one that its listing describes
    weights.write_bytes(data)
    listing = json.loads((path / "files.json").read_text())
    listing["files"][weights.name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (path / "files.json").write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=r"heads\.safetensors: cannot be read \(.*header"):
        load_for_evaluation(tmp_path)
