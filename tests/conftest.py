"""Fixtures shared by all tests. Kernels run in triton's interpreter unless TRITON_INTERPRET=0 says otherwise.

The variable must be set before triton is imported for the first time, which the library does.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real images and weights: $TRADY_DATA, else ../shared/data beside the repository, else a skip."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TRADY_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set TRADY_DATA")
    return folder
