"""The model: input, descriptors, precision."""

import numpy as np
import pytest
import torch

from training.backbones import BackboneName
from training.model import GeoModel, fold_batch_norms, to_input


def test_descriptors_are_unit_length_float32_under_any_autocast() -> None:
    torch.manual_seed(0)
    model = GeoModel("small_cnn", "none", descriptor_dim=48)
    images = to_input(torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            descriptors = model(images)
        assert descriptors.shape == (4, 48)
        assert descriptors.dtype == torch.float32
        torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(4), rtol=1e-6, atol=1e-6)


def test_a_descriptor_has_as_many_numbers_as_the_backbone_channels() -> None:
    model = GeoModel("resnet18", "none")
    assert model.descriptor_dim == model.backbone.out_channels == 512
    assert model.projection.weight.shape == (512, 512)


def test_model_is_pool_then_linear_then_normalisation() -> None:
    torch.manual_seed(0)
    model = GeoModel("small_cnn", "none", descriptor_dim=7).double().eval()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = model.backbone(images).numpy()
        weight, bias = model.projection.weight.numpy(), model.projection.bias.numpy()
        projected = features.reshape(3, features.shape[1], -1).mean(2) @ weight.T + bias
        expected = projected / np.sqrt((projected**2).sum(1, keepdims=True))
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_input_is_imagenet_normalised_and_channels_last(dtype: torch.dtype, tolerance: float) -> None:
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    pixels = images.numpy().astype(np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = to_input(images, dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), rtol=tolerance, atol=5 * tolerance)


def test_input_that_is_no_photos_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[B, H, W, 3\], not torch.uint8 \[1, 3, 4, 4\]"):
        to_input(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        to_input(torch.zeros(1, 4, 4, 3))


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18", "resnet50", "small_cnn"])
def test_folding_batch_norms_leaves_none_and_changes_no_answer(name: BackboneName) -> None:
    torch.manual_seed(0)
    model = GeoModel(name, "none", descriptor_dim=16).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(module.bias)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        fold_batch_norms(model)
        torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-12)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
