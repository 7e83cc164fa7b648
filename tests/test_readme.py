"""The README's code runs as it stands."""

import re
from pathlib import Path

import timm
import torch

from trady_triton.nn import LeanConv2d

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_of_the_readme_trains_a_network(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create_model(name, **{**options, "pretrained": False})
    )
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 9]))]
    names = {"batches": batches, "loader": batches}
    exec(code.replace("range(20)", "range(2)"), names)
    assert names["optimizer"].epoch == 1
    assert isinstance(names["model"].conv_head, LeanConv2d)
