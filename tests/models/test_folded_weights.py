"""Files of folded weights: what loads, what is refused, and the accuracy of the public ones on real images."""

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from trady_triton.models import load_folded_weights

# file, right answers of the 250 images as measured with timm's transform, torch 2.15, CPU: 54.0 / 63.2 / 54.0 %
# (another rounding of resize and crop, that of the script which made the files, gives 131 / 156 / 138)
PUBLIC = {
    "mobilenetv2_w035": ("mcu_mbv2_w035_in1k", 135),
    "mcunet_in1": ("mcu_mcunet_5fps_in1k", 158),
    "proxylessnas_w03": ("mcu_proxyless_w03_in1k", 135),
}


def folded_net(name: str = "mcunet_in1", **kwargs) -> nn.Module:
    return timm.create_model(name, norm_layer=nn.Identity, feature_mix=False, **kwargs).eval()


@pytest.fixture
def source() -> nn.Module:
    return folded_net(num_classes=5)


@pytest.fixture
def weights_file(source, tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    return path


def test_all_tensors_come_from_the_file(source, weights_file):
    net = folded_net(num_classes=5)
    load_folded_weights(net, weights_file)
    torch.testing.assert_close(dict(net.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


def test_timms_own_loaders_read_the_same_file(source, weights_file):
    overlay = {"file": str(weights_file), "num_classes": 5}
    for kwargs in ({"checkpoint_path": str(weights_file)}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
        net = folded_net(num_classes=5, **kwargs)
        torch.testing.assert_close(dict(net.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_head_of_another_size_keeps_its_weights(source, weights_file, num_classes):
    net = folded_net(num_classes=num_classes)
    head = {key: tensor.clone() for key, tensor in net.get_classifier().state_dict().items()}
    load_folded_weights(net, weights_file)
    torch.testing.assert_close(dict(net.get_classifier().state_dict()), head, rtol=0, atol=0)
    assert torch.equal(net.blocks[-1].pw2.weight, source.blocks[-1].pw2.weight)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_folded_weights(folded_net(), tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_corrupt_file(weights_file, keep):
    weights_file.write_bytes(weights_file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"weights\.safetensors.*not a readable"):
        load_folded_weights(folded_net(), weights_file)


@pytest.mark.parametrize(
    "other",
    [
        lambda: folded_net("mobilenetv2_w035", num_classes=5),
        lambda: timm.create_model("mcunet_in1", num_classes=5),
        lambda: folded_net(num_classes=5, in_chans=1),
    ],
    ids=["another net", "with norms", "grey images"],
)
def test_file_of_another_net_is_refused_and_the_net_untouched(weights_file, other):
    net = other()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit this net: \d+ tensors .* first '"):
        load_folded_weights(net, weights_file)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def imagenet_sample(data_folder) -> tuple[list[Image.Image], torch.Tensor]:
    pack = np.load(data_folder / "images" / "imagenet_sample250a_s256.npz")
    jpegs = np.split(pack["data"], pack["offset"][1:-1])
    return [Image.open(io.BytesIO(j.tobytes())).convert("RGB") for j in jpegs], torch.from_numpy(pack["label"]).long()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_weights_reach_the_stated_accuracy(name, data_folder, imagenet_sample):
    file, expected = PUBLIC[name]
    net, (images, labels) = folded_net(name), imagenet_sample
    load_folded_weights(net, data_folder / "weights" / f"{file}.safetensors")
    transform = create_transform(**resolve_data_config(model=net))
    with torch.inference_mode():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in loader(images, labels, transform))
    assert abs(right - expected) <= 3, f"{right} of {len(labels)} right, {expected} stated"


def loader(images, labels, transform, batch_size=64):
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        yield torch.stack([transform(image) for image in images[part]]), labels[part]
