"""A loaded checkpoint's answers: forms of scores, confidence, uncertainty, and checkpoints that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from tiny import class_table, photo, write_queries
from tiny_run import write_run

from evaluation.localiser import Localiser
from evaluation.ranking import RANKING_FORMS, GroupScores
from shards.console import JobError
from training.checkpoint import load_for_evaluation
from training.queries import find_photos

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def localiser(tmp_path_factory: pytest.TempPathFactory) -> Localiser:
    return Localiser.load(write_run(tmp_path_factory.mktemp("run") / "run"), CPU)


def descriptors(localiser: Localiser, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.normalize(torch.randn(count, localiser.model.descriptor_dim, generator=generator), dim=1)


def test_forms_are_those_of_their_formulas_in_float64(localiser: Localiser) -> None:
    vectors = descriptors(localiser)
    scores = GroupScores(localiser.heads, localiser.ranker.norms, vectors)
    weights = [head.weight.detach().double() for head in localiser.heads.values()]
    raw = [vectors.double() @ w.T for w in weights]
    cosine = [r / w.norm(dim=1) for r, w in zip(raw, weights, strict=True)]
    expected = {
        "raw": raw,
        "cosine": cosine,
        "zscore": [(c - c.mean(1, keepdim=True)) / c.std(1, keepdim=True, correction=0) for c in cosine],
        "softmax": [torch.log((30 * c).exp() / (30 * c).exp().sum(1, keepdim=True)) for c in cosine],
    }
    for form in RANKING_FORMS:
        torch.testing.assert_close(scores.scores(form).double(), torch.cat(expected[form], 1), rtol=1e-4, atol=1e-4)
    everything = (30 * torch.cat(cosine, 1)).softmax(1)
    torch.testing.assert_close(scores.probability().double(), everything, rtol=1e-4, atol=1e-6)


def test_confidence_is_the_probability_of_the_cells_within_the_threshold(localiser: Localiser) -> None:
    vectors = descriptors(localiser)
    answers = localiser.answer(vectors, threshold=25.0, top_k=3)["cosine"]
    probability = GroupScores(localiser.heads, localiser.ranker.norms, vectors).probability().detach().numpy()
    centers = localiser.classes.centers()
    for i, row in enumerate(answers.rows[:, 0]):
        near = np.hypot(*(centers - centers[row]).T) <= 25
        assert answers.confidence[i, 0] == pytest.approx(probability[i, near].sum(), abs=1e-5)


def test_uncertainty_is_the_radius_that_holds_68_percent(localiser: Localiser) -> None:
    vectors = descriptors(localiser)
    answers = localiser.answer(vectors, top_k=2)["cosine"]
    probability = GroupScores(localiser.heads, localiser.ranker.norms, vectors).probability().detach().numpy()
    centers = localiser.classes.centers()
    for i in range(len(vectors)):
        for k in range(2):
            apart = np.hypot(*(centers - centers[answers.rows[i, k]]).T)
            radius = answers.uncertainty[i, k]
            assert probability[i, apart <= radius + 0.01].sum() >= 0.68 - 1e-5
            assert radius == pytest.approx(20 / 2**0.5) or probability[i, apart < radius - 0.01].sum() < 0.68


def test_photos_in_batches_score_as_they_do_one_at_a_time(localiser: Localiser, tmp_path: Path) -> None:
    folder = write_queries(tmp_path / "q")
    for east in range(3):
        wide = np.concatenate([photo(east, 0, 32, 0)] * 2, axis=1)
        (folder / f"wide{east}.jpg").write_bytes(simplejpeg.encode_jpeg(wide, quality=90))
    paths = find_photos(folder)
    together = localiser.answer(localiser.describe(paths, batch_size=5).vectors)[localiser.form]
    for i, path in enumerate(paths):
        alone = localiser.answer(localiser.describe([path], batch_size=1).vectors)[localiser.form]
        np.testing.assert_allclose(together.scores[i], alone.scores[0], atol=1e-5)
        np.testing.assert_array_equal(together.rows[i], alone.rows[0])


def test_a_single_class_and_more_answers_than_classes_are_fine(tmp_path: Path) -> None:
    classes = class_table(1)
    localiser = Localiser.load(write_run(tmp_path / "run", classes), CPU)
    answers = localiser.answer(descriptors(localiser), forms=RANKING_FORMS, top_k=20)
    for form in RANKING_FORMS:
        assert answers[form].rows.shape == (6, 1)
        assert np.isfinite(answers[form].scores).all()
        np.testing.assert_allclose(answers[form].confidence, 1, atol=1e-6)


def test_logits_with_bias_are_scored_for_a_plain_linear_head(tmp_path: Path) -> None:
    localiser = Localiser.load(write_run(tmp_path / "run", head="FC_CE", form="raw"), CPU)
    vectors = descriptors(localiser)
    heads = localiser.heads.values()
    logits = torch.cat([vectors @ head.weight.T + head.bias for head in heads], dim=1)
    torch.testing.assert_close(
        GroupScores(localiser.heads, localiser.ranker.norms, vectors).probability(), logits.softmax(1)
    )


def test_a_checkpoint_whose_parts_do_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    weights = load_for_evaluation(write_run(tmp_path / "run"))
    with pytest.raises(JobError, match="do not fit a resnet18"):
        Localiser(replace(weights, config=weights.config | {"backbone": "resnet18"}), CPU)
    with pytest.raises(JobError, match="class map of groups"):
        Localiser(replace(weights, heads={0: weights.heads[0]}), CPU)
    with pytest.raises(JobError, match="group 0 does not fit the class map"):
        Localiser(replace(weights, classes=class_table(8)), CPU)
    with pytest.raises(JobError, match="no configuration of this project"):
        Localiser(replace(weights, config={"epochs": "many"}), CPU)


def test_a_folder_that_is_no_checkpoint_or_is_damaged_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no checkpoint of this project"):
        Localiser.load(tmp_path, CPU)
    run = write_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "cut")
    file = next((tmp_path / "cut").rglob("heads.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(JobError, match=r"heads\.safetensors: truncated"):
        Localiser.load(tmp_path / "cut", CPU)
