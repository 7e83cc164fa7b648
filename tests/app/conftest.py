"""A small data set, and a network small enough for a test."""

import pytest
import timm
import torch
from app_files import write_npz

NET = "test_efficientnet"


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    return write_npz(tmp_path_factory.mktemp("data") / "noise.npz")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return timm.create_model(NET, num_classes=3)
