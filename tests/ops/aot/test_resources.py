"""The compiled kernels stay within their limits and do not need more than the checked-in table says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")


def run_harness(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, HARNESS, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.aot
def test_the_ci_subset_compiles_within_its_limits():
    done = run_harness("--ci")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.aot
@pytest.mark.slow
def test_every_shipped_config_compiles_within_its_limits():
    done = run_harness()
    assert done.returncode == 0, done.stdout + done.stderr
