"""Networks by timm name, with weights from a file or from timm."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import trady_triton.models  # noqa: F401  (registers the paper's networks with timm)
from trady_triton.app.checkpoint import load_tensors
from trady_triton.ranking import find_head


def build_model(
    net: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """`timm.create_model`, with the image size passed on to networks that are built for one size.

    Raises:
        ValueError: timm does not know the network, has no weights for it, or refuses an option.
        OSError: the weights could not be fetched.
    """
    check_name(net)
    options = dict(options or {})
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_size is not None and timm.get_pretrained_cfg_value(net, "fixed_input_size"):
        options.setdefault("img_size", image_size)
    try:
        model: nn.Module = timm.create_model(net, pretrained=pretrained, **options)
    except OSError as error:
        if not pretrained:
            raise
        raise OSError(f"model {net!r}: its weights could not be fetched; --weights takes a file ({error})") from error
    except (TypeError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
        raise ValueError(f"model {net!r} cannot be built: {error!r}") from error
    return model


def check_name(net: str) -> None:
    """Raises ValueError, with near matches, where timm does not know the network."""
    name = net.partition(".")[0]
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=4)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists what there is"
    raise ValueError(f"unknown model {net!r}: {hint}")


def parse_options(text: str | None) -> dict[str, Any]:
    """Arguments of `timm.create_model` from JSON such as {"pad_type": "same"}.

    Raises:
        ValueError: the text is no JSON object.
    """
    try:
        options = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"model arguments {text!r}: not JSON ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"model arguments {text!r}: wanted a JSON object")
    if options.get("in_chans", 3) != 3:
        raise ValueError(f"model arguments {text!r}: images are RGB, wanted 3 as in_chans")
    return options


def input_size(model: nn.Module, image_size: int | None) -> int:
    """The image size asked for, or what timm's configuration of the model says."""
    config: dict[str, Any] = resolve_model_data_config(model)
    return image_size or int(config["input_size"][-1])


def count_classes(net: str, state: Mapping[str, Tensor], options: dict[str, Any], image_size: int | None) -> int | None:
    """Classes that a network must be built with for its classifier to take these weights; None if they hold none."""
    model = build_model(net, image_size=image_size, options=options)
    found = (state.get(f"{name}.weight") for name in find_head(model, []))
    return next((len(weight) for weight in found if weight is not None), None)


def load_weights(model: nn.Module, path: str) -> tuple[str, ...]:
    """Load a .safetensors file or a torch file of tensors; a classifier of another size keeps its own weights.

    Returns:
        names of the model's tensors that the file did not give, all of them of the classifier.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its tensors are not those of the model.
    """
    state = read_tensors(path)
    own = model.state_dict()
    head = tuple(f"{name}." for name in find_head(model, []))
    usable = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    refused = [name for name in own | state if name not in usable and not name.startswith(head)]
    refused = [name for name in refused if not name.endswith("num_batches_tracked")]
    if refused:
        name = refused[0]
        sizes = (str(tuple(place[name].shape)) if name in place else "missing" for place in (state, own))
        raise ValueError(f"weights {path!r} do not fit {type(model).__name__}: {len(refused)} tensors differ, such as "
                         f"{name!r} ({next(sizes)} in the file, {next(sizes)} in the model)")  # fmt: skip
    model.load_state_dict(usable, strict=False)
    return tuple(name for name in own if name not in usable and name.startswith(head))


def read_tensors(path: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a torch file, that of a training checkpoint too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path!r}: no such file")
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights {path!r}: truncated, or not a safetensors file ({error})") from error
    content = load_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights {path!r}: wanted a dictionary of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
