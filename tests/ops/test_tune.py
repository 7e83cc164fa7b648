"""bench/tune.py writes a table that select_config reads; a dry run in the interpreter."""

import json

import pytest
import torch
from rich.console import Console

from trady_triton.bench import tune
from trady_triton.ops import select_config
from trady_triton.ops.select_config import Arch, Config


def test_a_dry_run_writes_entries_that_are_found_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuned.json"
    file.write_text('{"other": {"backend": "mm"}}')
    tune.main(file, dry_run=True)
    table = json.loads(file.read_text())
    assert len(table) == 1 + len(tune.TINY)
    assert "library" in capsys.readouterr().out
    monkeypatch.setattr(select_config, "TABLE_FILE", file)
    caches = select_config._tuned_table, select_config._select
    for cache in caches:
        cache.cache_clear()
    shape = {"T": 80, "O": 32, "K": 16, "PQ": 1, "bits": 0}
    found = select_config.select_config("token_wgrad", shape, torch.float32, Arch("cpu"))
    for cache in caches:
        cache.cache_clear()
    assert found == Config(**table[select_config.table_key("token_wgrad", shape, torch.float32, Arch("cpu"))])


def test_candidates_keep_the_limits():
    base = Config({"BM": 256, "BN": 64, "BK": 64}, num_warps=8, num_stages=3, split=4)
    found = tune.candidates(base)
    assert base in found
    assert {config.split for config in found} == {1, 2, 4}
    for config in found:
        accumulators = config.meta["BM"] * config.meta["BN"] / (32 * config.num_warps)
        assert accumulators <= select_config.MAX_ACCUMULATORS_PER_THREAD


def test_a_wrong_result_is_an_error():
    with pytest.raises(ValueError, match="it was not written"):
        tune._check(tune.TINY[0], Config(), torch.ones(3), torch.tensor([1.0, 1.0, 2.0]))


def test_what_does_not_compile_is_left_out(capsys):
    def run():
        raise RuntimeError("PassManager::run failed")

    assert list(tune._timed(tune.TINY[0], run, [Config()], torch.ones(1), "cpu", Console(width=200))) == []
    assert "left out: PassManager" in capsys.readouterr().out


def test_an_entry_has_a_workspace_for_every_shape_that_shares_it():
    shape = {"T": 25216, "O": 2304, "K": 48, "PQ": 1, "bits": 0}
    assert tune.serves_entry(Config(split=8), shape)
    assert not tune.serves_entry(Config(split=9), shape), "64 x 4096 numbers nine times are more than 8 MiB"
    assert tune.serves_entry(Config(split=9, backend="mm"), shape)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        tune.main(tmp_path / "tuned.json")
