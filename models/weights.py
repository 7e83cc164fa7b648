"""Reads the public ImageNet weights of the paper's nets: safetensors, with BatchNorm folded into the convolutions."""

from os import PathLike, fspath
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_HEAD = ("fc.weight", "fc.bias")


def load_folded_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Load a file of folded weights into `timm.create_model(name, norm_layer=nn.Identity, feature_mix=False)`.

    The file's keys are the net's own, so timm's `checkpoint_path=` and `pretrained_cfg_overlay={"file": path}` read it
    as well; this function checks the whole file before it touches the net, and says what is wrong with it. A head that
    the file lacks, or holds for another number of classes, keeps the weights it has.

    Raises FileNotFoundError for a missing file, ValueError for one that cannot be read or belongs to another net.
    """
    tensors, wanted = _read(path), model.state_dict()
    if not _same_shape(tensors, wanted, "fc.weight"):
        tensors = {key: tensor for key, tensor in tensors.items() if key not in _HEAD}
        tensors |= {key: wanted[key] for key in _HEAD if key in wanted}
    wrong = [key for key in {**wanted, **tensors} if not _same_shape(tensors, wanted, key)]
    if wrong:
        raise ValueError(
            f"weights file {fspath(path)!r} does not fit this net: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, first {wrong[0]!r}; build the net that the file belongs to, with norm_layer=nn.Identity, "
            "feature_mix=False"
        )
    model.load_state_dict(tensors)


def _read(path: str | PathLike[str]) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {fspath(path)!r} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights file {fspath(path)!r} is not a readable safetensors file: {error}") from error


def _same_shape(one: dict[str, Tensor], other: dict[str, Tensor], key: str) -> bool:
    return key in one and key in other and one[key].shape == other[key].shape
