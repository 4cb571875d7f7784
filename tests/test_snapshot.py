"""What of a run comes back from a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import configure, train_here

from training.batch_norms import running_statistics
from training.checkpoint import TrainingState, list_checkpoints, load_checkpoint, training_state
from training.snapshot import _restore


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_another_number_of_processes_goes_on_with_the_batch_norms_of_all_that_saved(
    shards: Path, tmp_path: Path, ema: float
) -> None:
    trainer = train_here(configure(shards, tmp_path / "r", ema=ema, epochs=1))
    first = running_statistics(trainer.engine.model).double()
    second = torch.stack([first[0] + 2, first[1] + 1])
    saved = load_checkpoint(list_checkpoints(tmp_path / "r")[0])
    of_ranks = training_state({"batch_norms": [first.float(), second.float()]})
    assert saved.training is not None
    training = TrainingState(saved.training.tensors | of_ranks.tensors, saved.training.values | of_ranks.values)
    _restore(replace(saved, training=training), trainer.config, trainer.engine)
    # The variance of two samples of one size: the mean of theirs, and one for means that lie two apart.
    expected = torch.stack([first[0] + 1, first[1] + 0.5 + 1])
    torch.testing.assert_close(running_statistics(trainer.engine.model).double(), expected, rtol=1e-5, atol=1e-5)
