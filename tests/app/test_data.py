import io
import sys

import numpy as np
import pytest
from app_files import jpeg, write_npz
from PIL import Image

from trady_triton.app.data import load_data


def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=3):
    for part in parts:
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").write_bytes(jpeg(100 * label + i))
    return root


def test_npz_gives_the_images_of_each_half(npz):
    data = load_data(str(npz))
    assert (len(data.train.labels), len(data.test.labels)) == (24, 8)
    assert data.class_names == ("class0", "class1", "class2")
    assert data.test.labels == tuple(i % 3 for i in range(24, 32))
    image = data.test.open(2)
    assert (image.mode, image.size) == ("RGB", (40, 40))


def test_npz_image_is_the_jpeg_at_its_offset(npz):
    expected = np.asarray(Image.open(io.BytesIO(jpeg(26))))
    assert np.array_equal(np.asarray(load_data(str(npz)).test.open(2)), expected)


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_folder_with_two_halves(tmp_path, test_name):
    data = load_data(str(write_folder(tmp_path, ("train", test_name))))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels == data.test.labels == (0, 0, 0, 1, 1, 1)
    assert data.train.open(0).mode == "RGB"


def test_a_test_folder_goes_before_a_validation_folder(tmp_path):
    write_folder(tmp_path, ("train", "test"))
    write_folder(tmp_path, ("val",), count=5)
    assert len(load_data(str(tmp_path)).test.labels) == 6


@pytest.mark.parametrize(("name", "dtype"), [("x.png", np.uint16), ("x.tiff", np.float32)])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, name, dtype):
    root = write_folder(tmp_path, ("train", "test"), count=1)
    Image.fromarray(np.ones((8, 8), dtype)).save(root / "train" / "cat" / name)
    with pytest.raises(ValueError, match=r"cat.x\.\w+: the pixels are of PIL's mode '[IF].*', wanted 8 bits a channel"):
        load_data(str(root)).train.open(1)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_other_images_become_rgb(tmp_path, mode):
    root = write_folder(tmp_path, ("train", "test"), count=1)
    Image.open(io.BytesIO(jpeg(0))).convert(mode).save(root / "train" / "cat" / "x.tiff")
    image = load_data(str(root)).train.open(1)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 20


def test_folder_of_classes_gives_a_fifth_of_every_class_to_the_test(tmp_path):
    data = load_data(str(write_folder(tmp_path, ("",), count=10)))
    assert sorted(data.test.labels) == [0, 0, 1, 1]
    assert sorted(data.train.labels) == [0] * 8 + [1] * 8


def test_digits_are_split_once_and_for_all():
    pytest.importorskip("sklearn")
    first, second = load_data("digits"), load_data("digits")
    assert first.test.labels == second.test.labels
    assert len(first.train.labels) + len(first.test.labels) == 1797
    assert {np.asarray(first.train.open(i)).tobytes() for i in range(50)}.isdisjoint(
        np.asarray(first.test.open(i)).tobytes() for i in range(50)
    )
    assert not first.is_photo


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"scikit-learn.*pip install 'trady-triton\[demo\]'"):
        load_data("digits")


def test_missing_source_is_named():
    with pytest.raises(FileNotFoundError, match="'/no/such': no such file or folder"):
        load_data("/no/such")


def test_folder_without_test_half_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="beside train/ wanted one of test, val, validation, found none"):
        load_data(str(write_folder(tmp_path, ("train",))))


def test_halves_with_different_classes_are_an_error(tmp_path):
    write_folder(tmp_path, ("train",))
    write_folder(tmp_path, ("test",), classes=("cat", "emu"))
    with pytest.raises(ValueError, match="class 'dog' is in one of train, test only"):
        load_data(str(tmp_path))


def test_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="wanted one folder of images per class"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, "not an .npz with"),
        ({"label": np.zeros(3, np.int16)}, "do not fit together"),
        ({"label": np.full(32, 7)}, "labels up to 7, but 3 class names"),
        ({"split": np.zeros(32, np.uint8)}, "0 to test on"),
    ],
)
def test_npz_with_wrong_content_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_data(str(write_npz(tmp_path / "bad.npz", **changes)))


def test_truncated_npz_is_an_error(tmp_path, npz):
    (tmp_path / "cut.npz").write_bytes(npz.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a folder, and not an"):
        load_data(str(tmp_path / "cut.npz"))


def test_damaged_image_is_named(tmp_path):
    path = write_npz(tmp_path / "bad.npz", data=np.zeros(100_000, np.uint8))
    with pytest.raises(ValueError, match=r"bad\.npz, image 1: the image cannot be read"):
        load_data(str(path)).train.open(1)
