"""Small networks, batches and rankings for tests, all in float64 unless asked otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady_triton import Plan, Ranking, make_plan, rank_layers


class ToyNet(nn.Module):
    """A stem, a depthwise and a grouped convolution, a pointwise with bias, a Linear on 3-D input, a head."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 12, 3, padding=2, dilation=2, groups=4)
        self.pointwise = nn.Conv2d(12, 10, 1, stride=2)
        self.tokens = nn.Linear(10, 9)
        self.head = nn.Linear(9, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.gelu(self.grouped(F.relu(self.depthwise(x))))
        x = self.pointwise(x).flatten(2).transpose(1, 2)
        return self.head(F.silu(self.tokens(x)).mean(1))


def toy_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> ToyNet:
    torch.manual_seed(seed)
    return ToyNet().to(dtype).eval()


def toy_batches(count: int = 1, size: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 3, 12, 12, generator=generator, dtype=dtype),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def toy_ranking(net: nn.Module) -> Ranking:
    dtype = next(net.parameters()).dtype
    return rank_layers(net, toy_batches(dtype=dtype), F.cross_entropy)


def toy_plan(net: nn.Module, budget: int | str | None = 1200, **options: object) -> Plan:
    coverage = {} if options.keys() & {"k", "layers"} else {"coverage": 1.0}
    return make_plan(toy_ranking(net), budget=budget, **{**coverage, **options})
