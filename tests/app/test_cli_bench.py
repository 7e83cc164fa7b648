"""`trady bench`: a table for a network of one's own, and mistakes that are told before anything runs."""

import pytest
from test_cli import error_of, trady

from trady_triton.bench.store import KIND
from trady_triton.serial import read_json

NET = ("--model", "test_efficientnet", "--batch", 2, "--image-size", 32)


def test_the_table_of_a_net_and_its_numbers(tmp_path):
    out = tmp_path / "bench.json"
    more = ("--budget", "16KiB", "--methods", "head, paca,trady", "--repeats", 1, "--device", "cpu", "--out", out)
    result = trady("bench", *NET, *more)
    assert result.exit_code == 0, result.output
    assert "test_efficientnet, batch 2, 32 px, cpu" in result.stdout
    assert "head only" in result.stdout
    assert "PaCA trains Linear layers only" in " ".join(result.stdout.split())
    rows = read_json(out, KIND)["cases"]
    assert rows["test_efficientnet/trady"]["budget_bytes"] == 16 << 10
    assert [row["status"] for row in rows.values()] == ["ok", "unavailable", "ok"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "resnet5"), "did you mean"),
        ((*NET, "--budget", "5"), "or bytes such as '256KiB'"),
        ((*NET, "--budget", "much"), "budget 'much'"),
        ((*NET, "--methods", "full,magic"), "--methods 'magic': wanted some of full, full-ckpt"),
        ((*NET, "--device", "abacus"), "--device 'abacus'"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments, told):
    assert told in error_of(trady("bench", *arguments))
