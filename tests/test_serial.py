"""Files that are written whole or not at all."""

import os

import pytest

from trady_triton.serial import written_whole


def test_the_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted():
        with written_whole(path, keep=".previous") as scratch:
            scratch.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_the_older_file_is_kept_on_request(tmp_path):
    path = tmp_path / "x"
    for text in ("one", "two", "three"):
        with written_whole(path, keep=".previous") as scratch:
            scratch.write_text(text)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"x": "three", "x.previous": "two"}
    with written_whole(path) as scratch:
        scratch.write_text("four")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"x": "four", "x.previous": "two"}


def test_the_new_file_reaches_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            f"trady_triton.serial.os.{name}",
            lambda *a, name=name, original=original: (events.append(name), original(*a)),
        )
    with written_whole(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder
