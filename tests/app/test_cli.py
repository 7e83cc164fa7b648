import json
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from app_files import write_npz
from typer.testing import CliRunner

from trady_triton import Plan, Ranking
from trady_triton.app.cli import COMMANDS, app, load

NET = "test_efficientnet"
SMALL = ("--image-size", "32")


def trady(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def run(npz, tmp_path):
    """`trady finetune` on the small data set, in the folder "run"."""

    def finetune(*arguments, net=NET, data=npz, out="run", epochs=1):
        options = ("--data", data, "--out", tmp_path / out, "--epochs", epochs, "--batch-size", 5, *SMALL)
        return trady("finetune", net, *options, *arguments)

    return finetune


def error_of(result, code=1):
    """The one line of an error: nothing else on stderr but remarks before it, and no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    return last


def test_plan_prints_one_json_object_and_its_remark_on_stderr():
    result = trady("plan", NET, *SMALL, "--batch-size", 1, "--budget", 3000, "--cost-model", "paper", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {"total_elements", "pool", "pool_elements", "expected", "budget", "unit", "fingerprint", "k", "net"} <= set(
        content
    )
    assert {"weight_saving", "activation_saving", "wgrad_flops_saving", "channels"} <= set(content["expected"])
    assert content["pool_elements"] == content["pool_cost"]
    assert content["k"] == len(content["pool"])
    assert "quick ranking" in result.stderr


def test_plan_is_the_same_in_every_call():
    first, second = (trady("plan", NET, *SMALL, "--budget", 3000, "--json").stdout for _ in range(2))
    assert first == second


def test_plan_table_names_every_layer_and_what_fits():
    result = trady("plan", NET, *SMALL, "--budget", "16KiB", "--batch-size", 2)
    ranked = json.loads(trady("plan", NET, *SMALL, "--budget", "16KiB", "--json", "--coverage", 1).stdout)["pool"]
    assert all(f" {name} " in result.stdout for name in ranked)
    assert "16,384 bytes for a batch of 2" in result.stdout
    assert "fits " in result.stdout


def test_plan_and_ranking_files_are_taken_up_again(tmp_path):
    ranking, plan, plot = tmp_path / "r.json", tmp_path / "p.json", tmp_path / "r.png"
    ranked = trady("rank", NET, *SMALL, "--steps", 2, "--out", ranking, "--plot", plot)
    assert ranked.exit_code == 0, ranked.output
    assert ranked.stdout.startswith(Ranking.load(ranking).table())
    assert plot.read_bytes().startswith(b"\x89PNG")
    planned = trady("plan", NET, *SMALL, "--budget", 3000, "--ranking", ranking, "--k", 4, "--out", plan, "--json")
    assert "quick ranking" not in planned.stderr
    assert json.loads(planned.stdout)["fingerprint"] == Plan.load(plan).fingerprint
    assert list(Plan.load(plan).pool) == list(Ranking.load(ranking).order()[:4])


def test_rank_on_data_measures_the_data(npz):
    noise = trady("rank", NET, *SMALL, "--steps", 1)
    images = trady("rank", NET, *SMALL, "--steps", 1, "--data", npz)
    assert images.exit_code == 0, images.output
    assert images.stdout != noise.stdout


@pytest.mark.parametrize("method", ["trady", "full", "head"])
def test_finetune_leaves_log_checkpoint_and_weights(run, tmp_path, method):
    result = run("--budget", 3000, "--method", method, epochs=2)
    assert result.exit_code == 0, result.output
    assert "epoch 2/2" in result.stdout
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    again = run("--method", "head", "--weights", tmp_path / "run" / "model.safetensors", out="again")
    assert again.exit_code == 0, again.output
    assert "loaded" in again.stderr


def test_a_batch_is_at_most_all_images(run):
    result = run("--budget", "16KiB", "--batch-size", 1000)
    assert result.exit_code == 0, result.output
    assert "16,384 bytes for a batch of 24" in result.stdout


def test_finetune_digits(run):
    pytest.importorskip("sklearn")
    result = run("--method", "head", "--batch-size", "200", data="digits")
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.stdout


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    data = write_npz(tmp_path / "long.npz", train=400)
    out = tmp_path / "run"
    arguments = ["finetune", NET, "--data", data, "--out", out, "--budget", 3000, "--batch-size", 4, *SMALL]
    command = [sys.executable, "-c", "from trady_triton.app.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--epochs", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert any(line.startswith("epoch   1/500") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; " in stderr
    assert "Traceback" not in stderr
    assert stderr.strip().endswith("--epochs 500 --resume")
    assert (out / "checkpoint.pt").exists()


def test_finetune_goes_on_after_a_finished_run(run):
    assert run("--budget", 3000).exit_code == 0
    result = run("--budget", 3000, "--resume")
    assert result.exit_code == 0, result.output
    assert "resumed after 1 epochs" in result.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten_unless_asked(run):
    assert run("--method", "head").exit_code == 0
    assert "holds a run: --resume goes on with it" in error_of(run("--method", "head"))
    assert run("--method", "head", "--overwrite").exit_code == 0


def test_resume_without_a_run_is_an_error(run):
    assert "no checkpoint.pt to resume from" in error_of(run("--budget", 3000, "--resume"))


def test_a_corrupt_checkpoint_is_an_error(run, tmp_path):
    assert run("--budget", 3000).exit_code == 0
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert "checkpoint.pt: truncated, damaged" in error_of(run("--budget", 3000, "--resume"))


@pytest.mark.parametrize("foreign", [b"damaged", None])
def test_the_checkpoint_before_a_damaged_one_is_taken_and_said(run, tmp_path, foreign):
    assert run("--budget", 3000, epochs=2).exit_code == 0
    path = tmp_path / "run" / "checkpoint.pt"
    if foreign is None:
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(foreign)
    result = run("--budget", 3000, "--resume", epochs=2)
    assert result.exit_code == 0, result.output
    assert f"{path}: " in result.stderr
    assert f"going back to {path}.previous" in result.stderr
    assert "resumed after 1 epochs and 0 steps" in result.stderr


def test_resume_with_another_setting_is_an_error(run):
    assert run("--budget", 3000).exit_code == 0
    assert "that run had lr = 0.125, this one has 0.5" in error_of(run("--budget", 3000, "--lr", 0.5, "--resume"))


def test_a_run_goes_on_where_its_data_was_moved_but_not_with_other_data(run, npz, tmp_path):
    assert run("--method", "head").exit_code == 0
    moved = run("--method", "head", "--resume", data=shutil.copy(npz, tmp_path / "moved.npz"))
    assert moved.exit_code == 0, moved.output
    for changes in ({"train": 25}, {"first": 100}):
        other = run("--method", "head", "--resume", data=write_npz(tmp_path / "other.npz", **changes))
        assert "that run had data = '24 + 8 images of 3 classes (" in error_of(other)


def test_resume_with_another_plan_is_an_error(run):
    assert run("--budget", 3000).exit_code == 0
    result = run("--budget", 3000, "--sampler", "cyclic", "--resume")
    assert "that run had sampler = 'trady', this one has 'cyclic'" in error_of(result)


def test_a_plan_that_counts_the_bytes_of_fewer_samples_is_an_error(run, tmp_path):
    plan = tmp_path / "p.json"
    assert trady("plan", NET, *SMALL, "--budget", "16KiB", "--batch-size", 4, "--out", plan).exit_code == 0
    assert "p.json: counts the bytes of 4 samples, a batch of 5 would keep more" in error_of(run("--plan", plan))
    assert run("--plan", plan, "--batch-size", 4).exit_code == 0


def test_a_plan_of_another_model_is_an_error(run, tmp_path):
    plan = tmp_path / "p.json"
    assert trady("plan", "test_vit", *SMALL, "--budget", 3000, "--out", plan).exit_code == 0
    assert "p.json: made for another model" in error_of(run("--plan", plan))


@pytest.mark.parametrize("command", [("plan", "--budget", 1), ("rank",), ("finetune", "--data", "digits")])
def test_an_unknown_model_is_an_error_with_near_matches(command):
    name, *options = command
    assert "did you mean mobilenetv2_035 or" in error_of(trady(name, "mobilenetv2_35", *options))


@pytest.mark.parametrize(
    ("budget", "message", "is_early"),
    [
        ("lots", "budget 'lots': wanted a positive integer", True),
        ("-5", "budget -5: wanted a positive integer", True),
        ("1", "the smallest workable budget is", False),
        ("1B", "the smallest workable budget is", False),
    ],
)
def test_a_bad_budget_is_an_error(budget, message, is_early):
    result = trady("plan", NET, *SMALL, "--budget", budget)
    assert message in error_of(result)
    assert ("quick ranking" not in result.stderr) == is_early


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "3000", "--data", "/no/such"), "data '/no/such': no such file or folder"),
        (("--method", "lora"), "--method 'lora': wanted one of trady, full, head"),
        ((), "--budget and --plan: wanted one of them for --sampler trady"),
        (("--budget", "3000", "--plan", "p.json"), "--plan p.json and --budget: the plan says that already"),
        (("--plan", "p.json", "--method", "full"), "--plan p.json: --method full follows none"),
        (("--budget", "3000", "--sampler", "head"), "wanted none of them for --sampler head"),
        (("--budget", "3000", "--sampler", "d-rgn"), "--sampler d-rgn: needs passes or a scheme of its own"),
        (("--budget", "3000", "--k", "3", "--coverage", "0.5"), "--k and --coverage: only one of them"),
        (("--budget", "3000", "--model-args", '{"in_chans": 1}'), "images are RGB, wanted 3 as in_chans"),
        (("--budget", "3000", "--lr", "inf"), "--lr inf: wanted a finite number"),
        (("--budget", "3000", "--resume", "--overwrite"), "--resume and --overwrite: only one of them"),
        (("--budget", "3000", "--device", "abacus"), "--device 'abacus'"),
        (("--budget", "3000", "--weights", "none.pth"), "weights 'none.pth': no such file"),
        (("--weights", "none.pth", "--pretrained"), "only one of them"),
        (("--plan", "none.json"), "none.json"),
        (("--budget", "3000", "--ranking", "none.json"), "none.json"),
        (("--budget", "3000", "--k", "99"), "k 99: wanted an integer from 1 to"),
        (("--budget", "3000", "--optimizer", "lion"), "optimizer 'lion': wanted one of sgd, momentum, adamw"),
        (("--budget", "3000", "--fill", "x"), "fill 'x': wanted one of stop, skip"),
        (("--budget", "3000", "--model-args", "{"), "model arguments '{': not JSON"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    assert message in error_of(run(*arguments))


def test_a_file_that_could_not_be_written_is_told_before_the_work():
    for out in ("/no/such/p.json", "/"):
        result = trady("plan", NET, *SMALL, "--budget", 3000, "--out", out)
        assert result.exit_code == 2
        assert "Invalid value for '--out'" in result.stderr
        assert "quick ranking" not in result.stderr


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_an_error_that_may_be_ours_is_a_line_that_says_how_to_see_where(monkeypatch, kind):
    monkeypatch.setattr("trady_triton.app.cli_rank.rank_on_noise", Mock(side_effect=kind("of ours,\nor of torch's")))
    wanted = "error: of ours, or of torch's (`trady --traceback ...` shows where)"
    assert error_of(trady("rank", NET, *SMALL)) == wanted
    assert type(trady("--traceback", "rank", NET, *SMALL).exception) is kind


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_not_imported_yet_has_its_own_help(name):
    assert load(name).help.startswith(COMMANDS[name])
    assert load(name).name == name


def test_the_help_needs_no_timm():
    code = "import sys; sys.modules['timm'] = None; from trady_triton.app.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f" {name} " in told for name in COMMANDS)


def test_the_versions_are_told():
    result = trady("--version")
    assert result.exit_code == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in result.stdout


def test_a_missing_option_is_told_by_the_parser():
    result = trady("finetune", NET)
    assert result.exit_code == 2
    assert "--data" in result.stderr
