"""A loaded checkpoint's answers: forms of scores, confidence, uncertainty, and checkpoints that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from present import present
from tiny import class_table, photo, write_queries
from tiny_run import write_run

from evaluation import ranking
from evaluation.localiser import Localiser
from evaluation.ranking import RANKING_FORMS
from shards.console import JobError, exit_code
from training.checkpoint import load_for_evaluation
from training.heads import Head, ScoreForm
from training.queries import find_photos

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def localiser(tmp_path_factory: pytest.TempPathFactory) -> Localiser:
    return Localiser.load(write_run(tmp_path_factory.mktemp("run") / "run"), CPU)


def descriptors(localiser: Localiser, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.normalize(torch.randn(count, localiser.model.descriptor_dim, generator=generator), dim=1)


def cosines(localiser: Localiser, vectors: torch.Tensor) -> list[torch.Tensor]:
    """float64 [q, classes of the group] for each group."""
    weights = [head.weight.detach().double() for head in localiser.heads.values()]
    return [vectors.double() @ torch.nn.functional.normalize(w, dim=1).T for w in weights]


def probabilities(localiser: Localiser, vectors: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    """float64 [q, C] over the classes of all groups: the softmax of 30 times the cosines."""
    return (30 / temperature * torch.cat(cosines(localiser, vectors), 1)).softmax(1).numpy()


@pytest.mark.parametrize("side", [4, 21])  # with 441 classes, groups have several strips and blocks
def test_forms_are_those_of_their_formulas_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    monkeypatch.setattr("training.scoring._SCORES_IN_CACHE", 6 * 64)
    localiser = Localiser.load(write_run(tmp_path / "run", class_table(side)), CPU)
    vectors = descriptors(localiser)
    cosine = cosines(localiser, vectors)
    norms = [head.weight.detach().double().norm(dim=1) for head in localiser.heads.values()]
    expected = {
        "raw": [c * n for c, n in zip(cosine, norms, strict=True)],
        "cosine": cosine,
        "zscore": [(c - c.mean(1, keepdim=True)) / c.std(1, keepdim=True, correction=0) for c in cosine],
        "softmax": [torch.log((30 * c).exp() / (30 * c).exp().sum(1, keepdim=True)) for c in cosine],
    }
    for top_k in (5, len(localiser.classes)):
        answers = localiser.answer(vectors, forms=RANKING_FORMS, top_k=top_k)
        for form in RANKING_FORMS:
            scores, rows = torch.cat(expected[form], 1).topk(top_k, dim=1)
            np.testing.assert_array_equal(answers[form].rows, rows)
            np.testing.assert_allclose(answers[form].scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_memory", [ranking.SCORES_IN_MEMORY, 1])  # or one answer of one photo
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_confidence_is_the_probability_of_the_cells_within_the_threshold(
    localiser: Localiser, temperature: float, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "SCORES_IN_MEMORY", in_memory)
    vectors = descriptors(localiser)
    answers = localiser.ranker.rank(
        vectors, forms=["raw", "cosine"], threshold=25.0, top_k=3, temperatures={"cosine": temperature}
    )
    centers = localiser.classes.centers()
    divisors: dict[ScoreForm, float] = {"raw": 1.0, "cosine": temperature}
    for form, divisor in divisors.items():
        probability = probabilities(localiser, vectors, divisor)
        for (i, k), row in np.ndenumerate(answers[form].rows):
            near = np.hypot(*(centers - centers[row]).T) <= 25
            assert answers[form].confidence[i, k] == pytest.approx(probability[i, near].sum(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 30.0])  # at 30 the likeliest 256 cells hold a third of it
def test_uncertainty_is_the_radius_that_holds_68_percent_of_the_whole_probability(temperature: float) -> None:
    torch.manual_seed(0)
    classes = class_table(side=50)
    heads = {group: Head("AAMC", 16, classes.count(group)) for group in classes.groups}
    vectors = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
    answers = ranking.ClassRanker(heads, classes, CPU).rank(
        vectors, forms=["cosine"], top_k=4, temperatures={"cosine": temperature}, radii_of=lambda rows: (0, 2)
    )["cosine"]
    weights = torch.cat([head.weight.detach().double() for head in heads.values()])
    logits = 100 / temperature * vectors.double() @ torch.nn.functional.normalize(weights, dim=1).T
    centers = classes.centers()
    for i, probability in enumerate(logits.softmax(1).numpy()):
        for rank in (0, 2):
            apart = np.hypot(*(centers - centers[answers.rows[i, rank]]).T)
            nearest = np.argsort(apart)
            radius = apart[nearest][(probability[nearest].cumsum() < 0.68).sum()]
            assert 0 <= answers.uncertainty[i, rank] - max(radius, 20 / 2**0.5) < 1 + 1e-3
    assert np.isnan(answers.uncertainty[:, [1, 3]]).all()


def test_confidences_at_temperatures_are_those_of_the_first_answers(localiser: Localiser) -> None:
    vectors, temperatures = descriptors(localiser), [0.5, 1.0, 3.0]
    found = localiser.ranker.confidences(vectors, forms=RANKING_FORMS, temperatures=temperatures, threshold=25.0)
    for form in RANKING_FORMS:
        rows, confidence = found[form]
        for i, temperature in enumerate(temperatures):
            answers = localiser.ranker.rank(vectors, forms=[form], threshold=25.0, temperatures={form: temperature})
            np.testing.assert_array_equal(rows, answers[form].rows[:, 0])
            np.testing.assert_allclose(confidence[:, i], answers[form].confidence[:, 0], rtol=1e-5)
        assert confidence.shape == (len(vectors), 3)


def test_ranking_a_hundred_queries_at_once_gives_the_scores_of_one_at_a_time() -> None:
    torch.manual_seed(0)
    classes = class_table(side=70)
    heads = {group: Head("AAMC", 64, classes.count(group)) for group in classes.groups}
    ranker = ranking.ClassRanker(heads, classes, CPU)
    vectors = torch.nn.functional.normalize(torch.randn(100, 64), dim=1)
    together = ranker.rank(vectors, forms=RANKING_FORMS)
    for i in range(0, 100, 7):
        alone = ranker.rank(vectors[i : i + 1], forms=RANKING_FORMS)
        for form in RANKING_FORMS:
            scale = 100 if form == "softmax" else 1  # whose scores are cosines times s
            np.testing.assert_allclose(together[form].scores[i], alone[form].scores[0], rtol=0, atol=1e-5 * scale)
            np.testing.assert_allclose(together[form].confidence[i], alone[form].confidence[0], atol=1e-5)


def test_ranking_many_queries_takes_the_memory_of_their_scores_once() -> None:
    classes = class_table(side=120)
    heads = {group: Head("AAMC", 4, classes.count(group), 30.0, 0.1) for group in classes.groups}
    ranker = ranking.ClassRanker(heads, classes, CPU)
    vectors = torch.nn.functional.normalize(torch.randn(600, 4), dim=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ranker.rank(vectors, forms=("cosine",), top_k=1)
    scores = 4 * 256 * len(ranker.row_of_column)
    assert sum(event.self_cpu_memory_usage == scores for event in profile.events()) == 1


def test_calibrating_at_many_temperatures_takes_no_memory_of_the_scores_size_for_each() -> None:
    classes = class_table(side=40)
    heads = {group: Head("AAMC", 4, classes.count(group), 30.0, 0.1) for group in classes.groups}
    ranker = ranking.ClassRanker(heads, classes, CPU)
    vectors = torch.nn.functional.normalize(torch.randn(200, 4), dim=1)
    large = []
    for temperatures in ([1.0], [1.0 + i for i in range(40)]):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ranker.confidences(vectors, forms=("cosine",), temperatures=temperatures, threshold=25.0)
        large.append(sum(event.self_cpu_memory_usage >= 4 * 200 * 400 for event in profile.events()))
    assert large[0] == large[1]


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


@pytest.mark.filterwarnings("error")
def test_no_photos_get_no_answers(localiser: Localiser) -> None:
    answers = localiser.answer(torch.zeros(0, localiser.model.descriptor_dim), forms=RANKING_FORMS, top_k=3)
    assert all(answers[form].rows.shape == answers[form].confidence.shape == (0, 3) for form in RANKING_FORMS)


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
    logits = torch.cat([vectors @ head.weight.T + present(head.bias) for head in heads], dim=1)
    answers = localiser.answer(vectors, threshold=0.0, top_k=5)["raw"]
    scores, rows = logits.topk(5, dim=1)
    np.testing.assert_array_equal(answers.rows, rows)
    np.testing.assert_allclose(answers.scores, scores.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answers.confidence, logits.softmax(1).gather(1, rows).detach(), rtol=1e-4)


def test_a_checkpoint_whose_parts_do_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    weights = load_for_evaluation(write_run(tmp_path / "run"))
    with pytest.raises(JobError, match="do not fit a resnet18"):
        Localiser(replace(weights, config=weights.config | {"backbone": "resnet18"}), CPU)
    with pytest.raises(JobError, match="class map of groups"):
        Localiser(replace(weights, heads={0: weights.heads[0]}), CPU)
    with pytest.raises(JobError, match="group 0 does not fit the class map"):
        Localiser(replace(weights, classes=class_table(8)), CPU)
    for config in ({"epochs": "many"}, weights.config | {"lr": -1.0}):
        with pytest.raises(JobError, match="no configuration of this project") as refused:
            Localiser(replace(weights, config=config), CPU)
        assert exit_code(refused.value) == 1


def test_a_folder_that_is_no_checkpoint_or_is_damaged_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no checkpoint of this project"):
        Localiser.load(tmp_path, CPU)
    run = write_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "cut")
    file = next((tmp_path / "cut").rglob("heads.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(JobError, match=r"heads\.safetensors: truncated"):
        Localiser.load(tmp_path / "cut", CPU)
