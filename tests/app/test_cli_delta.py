"""`trady export` and `trady apply`."""

import pytest
import torch
from app_files import write_npz
from safetensors.torch import load_file
from test_cli import NET, SMALL, error_of, trady


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A finished run of 4 epochs, from a base in a file whose classifier has another size."""
    folder = tmp_path_factory.mktemp("delta")
    npz = write_npz(folder / "noise.npz")
    start = trady("finetune", NET, "--data", write_npz(folder / "five.npz", classes=5), "--method", "head", *SMALL,
                  "--epochs", 1, "--seed", 3, "--out", folder / "start")  # fmt: skip
    assert start.exit_code == 0, start.output
    base = folder / "start" / "model.safetensors"
    run = trady("finetune", NET, "--data", npz, "--weights", base, "--budget", 3000, *SMALL,
                "--epochs", 2, "--out", folder / "run")  # fmt: skip
    assert run.exit_code == 0, run.output
    return folder, base


def test_an_exported_run_is_applied_bit_for_bit(files):
    folder, base = files
    exported = trady("export", NET, "--run", folder / "run", "--weights", base, "--out", folder / "d.safetensors")
    assert exported.exit_code == 0, exported.output
    assert "% of the " in exported.stdout
    assert (folder / "d.safetensors").stat().st_size < base.stat().st_size / 4
    out = folder / "again.safetensors"
    applied = trady("apply", NET, folder / "d.safetensors", "--weights", base, "--seed", 9, "--out", out)
    assert applied.exit_code == 0, applied.output
    tuned = load_file(folder / "run" / "model.safetensors")
    again = load_file(out)
    assert again.keys() == tuned.keys()
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)
    assert len(tuned["classifier.weight"]) == 3


def test_another_base_is_an_error_and_writes_nothing(files):
    folder, base = files
    other, out = folder / "other.safetensors", folder / "wrong.safetensors"
    message = error_of(trady("export", NET, "--run", folder / "run", "--out", out))
    assert "differs from this base, and the run's plan does not train it" in message
    good = trady("export", NET, "--run", folder / "run", "--weights", base, "--out", other)
    assert good.exit_code == 0
    assert "made for the base" in error_of(trady("apply", NET, other, "--out", out))
    assert not out.exists()


def test_a_folder_without_a_finished_run_is_an_error(tmp_path):
    message = error_of(trady("export", NET, "--run", tmp_path, "--out", tmp_path / "d.safetensors"))
    assert "model.safetensors': no such file" in message
