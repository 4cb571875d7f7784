"""Backbones: shapes, freezing as the reference freezes, and weights that come from somewhere else."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from present import present
from safetensors.torch import save_file
from torch import nn

from shards.console import JobError
from training import backbones
from training.backbones import make_backbone


@pytest.mark.parametrize(("name", "children"), [("efficientnet_b0", 9), ("resnet18", 8), ("small_cnn", 5)])
def test_a_backbone_gives_a_feature_map_of_its_channels(name: str, children: int) -> None:
    backbone = make_backbone(name, "none").eval()  # type: ignore[arg-type]
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 96))
    assert len(backbone) == children
    assert features.shape[:2] == (2, backbone.out_channels)
    assert features.shape[2] < features.shape[3] < 16


LARGE = [
    ("efficientnet_b5", 2048),
    pytest.param("efficientnet_b7", 2560, marks=pytest.mark.slow),
    ("resnet50", 2048),
]


@pytest.mark.parametrize(("name", "channels"), LARGE)
def test_a_large_backbone_says_its_channels(name: str, channels: int) -> None:
    with torch.device("meta"):
        backbone = make_backbone(name, "none")  # type: ignore[arg-type]
        assert backbone(torch.empty(1, 3, 64, 64)).shape[1] == backbone.out_channels == channels


def test_frozen_children_take_no_gradient_and_keep_their_statistics_moving() -> None:
    torch.manual_seed(0)
    backbone = make_backbone("efficientnet_b0", "none", freeze_until=5).train()
    first = backbone[0]
    assert isinstance(first, nn.Sequential)
    norm = first[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = present(norm.running_mean).clone()
    backbone(torch.randn(4, 3, 32, 32)).mean().backward()
    assert not torch.equal(present(norm.running_mean), before)
    for number, child in enumerate(backbone):
        for parameter in child.parameters():
            assert parameter.requires_grad == (number >= 5)
            assert (parameter.grad is not None) == (number >= 5)


def test_stochastic_depth_drops_in_frozen_children() -> None:
    torch.manual_seed(0)
    frozen = nn.Sequential(*list(make_backbone("efficientnet_b0", "none", freeze_until=5))[:5]).train()
    images = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for module in frozen.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # so that only the dropping of blocks differs between two calls
        assert not torch.equal(frozen(images), frozen(images))
        assert torch.equal(frozen.eval()(images), frozen(images))


def test_only_a_number_of_children_can_be_frozen() -> None:
    with pytest.raises(ValueError, match="small_cnn has 5 children"):
        make_backbone("small_cnn", "none", freeze_until=6)
    with pytest.raises(ValueError, match="none of efficientnet_b0"):
        make_backbone("vgg16", "none")  # type: ignore[arg-type]


def _pickle(state: object, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def _safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("save", [_pickle, _safetensors])
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_a_file_of_torchvisions_classifier_gives_its_features(
    name: str, save: Callable[[dict[str, torch.Tensor], Path], Path], tmp_path: Path
) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=3).eval()
    backbone = make_backbone(name, str(save(model.state_dict(), tmp_path))).eval()  # type: ignore[arg-type]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        head = model.classifier if name == "efficientnet_b0" else model.fc
        assert torch.equal(head(backbone(images).mean((2, 3))), model(images))


def test_our_own_names_and_wrapped_states_are_read(tmp_path: Path) -> None:
    given = make_backbone("small_cnn", "none").state_dict()
    renamed = {f"module.backbone.{key}": value for key, value in given.items()}
    path = _pickle({"model_state_dict": renamed}, tmp_path)
    read = make_backbone("small_cnn", str(path)).state_dict()
    assert all(torch.equal(read[key], given[key]) for key in given)


def test_old_files_without_batch_counters_are_read(tmp_path: Path) -> None:
    given = make_backbone("small_cnn", "none").state_dict()
    state = {key: value for key, value in given.items() if not key.endswith("num_batches_tracked")}
    assert make_backbone("small_cnn", str(_pickle(state, tmp_path)))


class Payload:
    """What a pickle could do if it were let."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": Payload()}, "not readable as weights"),
        ([1, 2], "holds a list"),
        ({7: torch.zeros(3)}, "holds no tensor for 0.0.weight of small_cnn"),
        ({"0.0.weight": torch.zeros(3)}, r"0.0.weight has shape \[3\], small_cnn needs \[32, 3, 3, 3\]"),
        ({"0.0.weight": torch.zeros(32, 3, 3, 3).log()}, "0.0.weight holds numbers that are no weights"),
        ({"0.0.weight": torch.zeros(32, 3, 3, 3, dtype=torch.int64)}, "0.0.weight holds numbers that are no weights"),
        ({"fc.weight": torch.zeros(3)}, "holds no tensor for 0.0.weight of small_cnn"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    state: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _pickle(state, tmp_path)
    with pytest.raises(JobError, match=message) as error:
        make_backbone("small_cnn", str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off", b"root:x:0:0:root"])
def test_a_file_that_is_no_weights_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=f"{name}: not readable as weights"):
        make_backbone("small_cnn", str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(JobError, match=r"no-such\.pth: no such file"):
        make_backbone("small_cnn", "no-such.pth")


def test_without_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    with pytest.raises(JobError) as error:
        make_backbone("efficientnet_b0", "imagenet")
    url = backbones._torchvision("efficientnet_b0").pretrained.url
    place = tmp_path / "checkpoints" / url.rsplit("/", 1)[1]
    for part in ("Name or service not known", url, str(place), "--weights FILE", "--weights none"):
        assert part in str(error.value)
    with pytest.raises(JobError, match="small_cnn has no ImageNet weights"):
        make_backbone("small_cnn", "imagenet")


def test_imagenet_weights_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    source = backbones._torchvision("resnet18")
    place = tmp_path / "checkpoints" / source.pretrained.url.rsplit("/", 1)[1]
    place.parent.mkdir()
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), place)
    backbone = make_backbone("resnet18")
    assert torch.equal(backbone[0].weight, model.conv1.weight)  # type: ignore[arg-type]
    place.write_bytes(b"cut off")
    with pytest.raises(JobError, match=r"remove it and try again"):
        make_backbone("resnet18")
