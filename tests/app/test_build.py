from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from trady_triton.app.build import build_model, load_weights, parse_options

NET = "test_efficientnet"


def make(classes):
    return timm.create_model(NET, num_classes=classes)


def save(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_of_a_file_are_the_model_s(net, tmp_path, name):
    save(make(3).state_dict(), tmp_path / name)
    source = make(3)
    save(source.state_dict(), tmp_path / name)
    assert load_weights(net, str(tmp_path / name)) == ()
    assert all(torch.equal(t, source.state_dict()[key]) for key, t in net.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"module." + k: t for k, t in s.items()}])
def test_wrapped_and_prefixed_states_are_understood(net, tmp_path, wrap):
    source = make(3)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    assert load_weights(net, str(tmp_path / "w.pth")) == ()
    assert torch.equal(net.conv_stem.weight, source.conv_stem.weight)


@pytest.mark.parametrize("classes", [0, 1000])
def test_a_classifier_of_another_size_keeps_its_weights_and_is_told(net, tmp_path, classes):
    source, own = make(classes), net.classifier.weight.clone()
    save(source.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(net, str(tmp_path / "w.safetensors")) == ("classifier.weight", "classifier.bias")
    assert torch.equal(net.classifier.weight, own)
    assert torch.equal(net.conv_stem.weight, source.conv_stem.weight)


def test_weights_of_another_network_are_refused_and_nothing_is_changed(net, tmp_path):
    before = net.conv_stem.weight.clone()
    save(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"do not fit EfficientNet: \d+ tensors differ, such as 'conv_stem.weight'"):
        load_weights(net, str(tmp_path / "w.safetensors"))
    assert torch.equal(net.conv_stem.weight, before)


def test_one_tensor_of_another_size_is_named(net, tmp_path):
    state = make(3).state_dict() | {"conv_stem.weight": torch.zeros(1, 3, 3, 3)}
    save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"1 tensors differ, such as 'conv_stem.weight' \(\(1, 3, 3, 3\) in the file"):
        load_weights(net, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_truncated_weights_are_an_error(net, tmp_path, name):
    save(make(3).state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_weights(net, str(tmp_path / name))


def test_missing_weights_are_named(net):
    with pytest.raises(FileNotFoundError, match=r"'none\.pth': no such file"):
        load_weights(net, "none.pth")


def test_an_unknown_network_is_an_error_with_near_matches():
    with pytest.raises(ValueError, match=r"unknown model 'mobilenetv2_35': did you mean mobilenetv2_035 or "):
        build_model("mobilenetv2_35")


def test_a_network_without_pretrained_weights_says_so():
    with pytest.raises(ValueError, match="No pretrained weights exist for mobilenetv2_035"):
        build_model("mobilenetv2_035", pretrained=True)


def test_networks_built_for_one_size_get_the_size_asked_for():
    net = build_model("test_vit", num_classes=3, image_size=64)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_options_reach_timm():
    net = build_model(NET, num_classes=3, options=parse_options('{"drop_rate": 0.25}'))
    assert net.drop_rate == 0.25


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_options_that_are_no_object_are_an_error(text):
    with pytest.raises(ValueError, match="model arguments"):
        parse_options(text)


@pytest.mark.parametrize("options", [{"no_such_option": 1}, {"act_layer": "none_such"}])
def test_an_option_that_timm_refuses_is_an_error(options):
    with pytest.raises(ValueError, match=r"'test_efficientnet' cannot be built: .*(no|none)_such"):
        build_model(NET, options=options)


def test_weights_that_cannot_be_fetched_name_the_network(monkeypatch):
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=OSError("no network")))
    with pytest.raises(OSError, match=r"'test_efficientnet': its weights could not be fetched; .*\(no network\)"):
        build_model(NET, pretrained=True)
