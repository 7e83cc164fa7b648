"""Labelled images for fine-tuning: a folder of classes, one .npz file of JPEGs, or scikit-learn's handwritten digits.

Every source gives the same thing: PIL images by index, labels, and a fixed split into train and test.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

_TEST_FOLDERS = ("test", "val", "validation")
_TEST_SHARE = 0.2
_NPZ_KEYS = ("data", "offset", "label", "split", "class_names")


@dataclass(frozen=True)
class Pictures:
    """One half of a data set: `open(i)` decodes image i, an RGB PIL image, and `labels[i]` is its class.

    `marks[i]` tells images apart without decoding them: a file's place below its folder, or a number of bytes.
    """

    open: Callable[[int], Image.Image]
    labels: tuple[int, ...]
    marks: tuple[str | int, ...]

    def subset(self, indices: list[int]) -> Pictures:
        """The pictures at `indices`, in that order."""
        labels, marks = tuple(self.labels[i] for i in indices), tuple(self.marks[i] for i in indices)
        return Pictures(lambda i: self.open(indices[i]), labels, marks)


@dataclass(frozen=True)
class Data:
    """A data set. `is_photo` says whether a random crop or a mirror image still shows the same class."""

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    is_photo: bool = True

    @property
    def fingerprint(self) -> str:
        """What it holds, as far as labels, names and sizes of images tell; the same wherever its files lie."""
        halves = [(half.labels, half.marks) for half in (self.train, self.test)]
        content = repr((halves, self.class_names))
        sizes = f"{len(self.train.labels)} + {len(self.test.labels)} images of {len(self.class_names)} classes"
        return f"{sizes} ({sha256(content.encode()).hexdigest()[:8]})"


def load_data(source: str) -> Data:
    """Open a data set: "digits", an .npz file, or a folder.

    A folder holds train/ and test/ (or else val/), each with one folder per class; or the class folders themselves, of
    which every class then gives a fifth for the test, always the same.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the content is not what it should be, or an extra package is missing.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"data {source!r}: no such file or folder (wanted a folder of classes, an .npz, or 'digits')"
        )
    data = _folder(path) if path.is_dir() else _npz(path)
    if not data.train.labels or not data.test.labels:
        raise ValueError(f"data {source!r}: {len(data.train.labels)} images to train on, {len(data.test.labels)} to "
                         "test on: wanted some of both")  # fmt: skip
    if len(set(data.train.labels)) < 2:
        raise ValueError(f"data {source!r}: one class to train on, {data.class_names[data.train.labels[0]]!r}: wanted "
                         "two or more")  # fmt: skip
    return data


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError("data 'digits' needs scikit-learn: pip install 'trady-triton[demo]'") from error
    digits = load_digits()
    grey = (digits.images * (255 / 16)).astype(np.uint8)
    labels = tuple(map(int, digits.target))
    pictures = Pictures(lambda i: Image.fromarray(grey[i]).convert("RGB"), labels, labels)
    return _held_out(pictures, tuple("0123456789"), is_photo=False)


def _folder(root: Path) -> Data:
    parts = {name: root / name for name in ("train", *_TEST_FOLDERS) if (root / name).is_dir()}
    if "train" not in parts:
        found = _image_folder(root)
        return _held_out(_from_files(found), tuple(found.classes))
    if len(parts) == 1:
        raise ValueError(f"data {str(root)!r}: beside train/ wanted one of {', '.join(_TEST_FOLDERS)}, found none")
    train, test = (_image_folder(path) for path in list(parts.values())[:2])
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"data {str(root)!r}: class {odd[0]!r} is in one of {', '.join(list(parts)[:2])} only")
    return Data(_from_files(train), _from_files(test), tuple(train.classes))


def _image_folder(path: Path) -> Any:
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"data {str(path)!r}: wanted one folder of images per class ({shorten(str(error), 120)})"
        ) from error


def _from_files(folder: Any) -> Pictures:
    files = [file for file, _ in folder.samples]
    names = tuple(Path(file).relative_to(folder.root).as_posix() for file in files)
    return Pictures(lambda i: _decode(files[i], files[i]), tuple(folder.targets), names)


def _npz(path: Path) -> Data:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data {str(path)!r}: not a folder, and not an .npz file either")
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in _NPZ_KEYS}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data {str(path)!r}: not an .npz with {', '.join(_NPZ_KEYS)} ({error})") from error
    jpegs, offset, split = content["data"], content["offset"].tolist(), content["split"]
    if len(offset) != len(split) + 1 or len(content["label"]) != len(split) or offset[-1] > jpegs.size:
        raise ValueError(f"data {str(path)!r}: {len(split)} images, {len(content['label'])} labels and {len(offset)} "
                         f"offsets into {jpegs.size} bytes do not fit together")  # fmt: skip
    pictures = Pictures(
        lambda i: _decode(io.BytesIO(jpegs[offset[i] : offset[i + 1]].tobytes()), f"{path}, image {i}"),
        tuple(map(int, content["label"])),
        tuple(end - start for start, end in pairwise(offset)),
    )
    train, test = (pictures.subset(np.flatnonzero(split == part).tolist()) for part in (0, 1))
    names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in content["class_names"].tolist())
    if not all(0 <= label < len(names) for label in pictures.labels):
        raise ValueError(f"data {str(path)!r}: labels up to {max(pictures.labels)}, but {len(names)} class names")
    return Data(train, test, names)


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # PIL would cut them off at 255: all white, or all black
                raise ValueError(f"{name}: the pixels are of PIL's mode {image.mode!r}, wanted 8 bits a channel")
            decoded: Image.Image = image.convert("RGB")
            return decoded
    except OSError as error:
        raise ValueError(f"{name}: the image cannot be read ({error})") from error


def _held_out(pictures: Pictures, class_names: tuple[str, ...], is_photo: bool = True) -> Data:
    """Hold out a fifth of every class, at least one image, chosen once and for all."""
    generator = torch.Generator().manual_seed(0)
    train: list[int] = []
    test: list[int] = []
    for label in range(len(class_names)):
        members = [i for i, own in enumerate(pictures.labels) if own == label]
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        count = max(1, round(_TEST_SHARE * len(members)))
        test += shuffled[:count]
        train += shuffled[count:]
    return Data(pictures.subset(sorted(train)), pictures.subset(sorted(test)), class_names, is_photo)
