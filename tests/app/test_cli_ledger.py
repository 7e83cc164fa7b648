"""`trady plan` on memory: recomputed blocks, a promise for the whole step, the ledger and its plot."""

import json

from test_cli import SMALL, error_of, trady

from trady_triton import Plan

VIT = ("test_vit", "--batch-size", 4)


def test_blocks_are_recomputed_where_that_keeps_less_unless_declined(tmp_path):
    plans = []
    for flag in ("--recompute", "--no-recompute"):
        result = trady("plan", *VIT, "--budget", "64KiB", flag, "--out", tmp_path / "plan.json")
        assert result.exit_code == 0, result.output
        plans.append((Plan.load(tmp_path / "plan.json"), result.stdout))
    assert plans[0][0].policy.recompute
    assert "run again in the backward" in plans[0][1]
    assert not plans[1][0].policy.recompute
    assert "run again in the backward" not in plans[1][1]


def test_the_ledger_of_a_recomputed_plan_keeps_less():
    kept = []
    for flag in ("--recompute", "--no-recompute"):
        result = trady("plan", *VIT, "--budget", "64KiB", flag, "--ledger", "--json")
        kept.append(sum(json.loads(result.stdout)["ledger"]["kept_by_kind"].values()))
    assert 2 * kept[0] < kept[1]


def test_a_memory_is_a_promise_that_the_ledger_keeps(tmp_path):
    arguments = ("plan", "test_efficientnet", *SMALL, "--batch-size", 4, "--memory", "4MiB")
    result = trady(*arguments, "--ledger", "--plot", tmp_path / "kept.png", "--out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "4,194,304 bytes for a whole step" in result.stdout
    assert "in all" in result.stdout
    assert Plan.load(tmp_path / "plan.json").memory == 4 << 20
    assert (tmp_path / "kept.png").stat().st_size > 0


def test_a_memory_too_small_names_the_smallest_that_works():
    message = error_of(trady("plan", "test_efficientnet", *SMALL, "--memory", "1KiB"))
    assert "smallest workable memory" in message


def test_a_bad_memory_is_told_before_the_work():
    result = trady("plan", "test_efficientnet", *SMALL, "--memory", "lots")
    assert "memory 'lots': wanted bytes" in error_of(result)
    assert "quick ranking" not in result.stderr


def test_a_plan_wants_a_budget_or_a_memory():
    assert "wanted one of them" in error_of(trady("plan", "test_efficientnet", *SMALL))
    both = trady("plan", "test_efficientnet", *SMALL, "--budget", 3000, "--memory", "4MiB")
    assert "wanted one of them" in error_of(both)
