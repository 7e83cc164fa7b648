"""A small data set of JPEGs in one file."""

import io

import numpy as np
from PIL import Image


def jpeg(seed, size=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_npz(path, *, train=24, test=8, classes=3, first=0, **changes):
    files = [jpeg(seed) for seed in range(first, first + train + test)]
    content = {
        "data": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": np.arange(train + test, dtype=np.int16) % classes,
        "split": np.array([0] * train + [1] * test, np.uint8),
        "class_names": np.array([f"class{i}".encode() for i in range(classes)]),
    }
    content.update(changes)
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path
