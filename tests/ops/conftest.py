"""Op tests force the kernels: in the interpreter on the CPU, or with `TRITON_INTERPRET=0 pytest -m gpu` on a device."""

import os

import pytest
import torch

from trady_triton.ops import dispatch

torch.set_num_threads(1)


def _teach_old_interpreter_run_time_bounds() -> None:
    """Triton 3.6 calls int() on a 1-d array for `range(tensor)`, which numpy >= 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if dispatch.INTERPRET:
    _teach_old_interpreter_run_time_bounds()


def pytest_collection_modifyitems(items):
    on_device = torch.cuda.is_available() and not dispatch.INTERPRET
    skip_gpu = pytest.mark.skip(reason="needs a GPU and TRITON_INTERPRET=0")
    skip_cpu = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the first import of triton on")
    for item in items:
        needs_gpu = item.get_closest_marker("gpu") is not None  # names of folders are among an item's keywords
        if needs_gpu and not on_device:
            item.add_marker(skip_gpu)
        elif "tests/ops" in item.path.as_posix() and not needs_gpu and not dispatch.INTERPRET:
            item.add_marker(skip_cpu)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    """Forces the kernels; a test that wants another backend sets TRADY_TRITON_BACKEND itself."""
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "triton")


@pytest.fixture
def generator():
    """A generator with the seed of TRADY_TEST_SEED: another seed is another draw of all data."""
    return torch.Generator().manual_seed(int(os.environ.get("TRADY_TEST_SEED", "0")))
