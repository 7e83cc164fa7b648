"""Whole training steps on a pretended CUDA device: the host code of every op, and each kernel variant that it asks for.

export TRITON_INTERPRET=0
python tests/ops/aot/dry_run.py                      # all cases: runs the steps, compiles every variant for sm_90
python tests/ops/aot/dry_run.py --ci                 # the cases with ci=True; one variant of each kernel
python tests/ops/aot/dry_run.py --match vit_base --no-compile
"""

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field
from unittest.mock import patch

import timm
import torch
from harness import arguments, compile_all, spills
from nn.nets import shapes_in_order
from pretended import pretended_cuda
from torch.utils._python_dispatch import _disable_current_modes

from trady_triton import Plan, Ranking, TraDyOptimizer, apply_plan, make_plan
from trady_triton.policy import Policy
from trady_triton.ranking import LayerNorms, find_head


@dataclass(frozen=True)
class Step:
    """A net of timm, how it is trained, and on how many images of which size."""

    net: str
    batch: int
    size: int
    budget: str
    options: dict[str, object] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    channels_last: bool = False
    optimizer: str = "sgd"
    store: str = "same"
    policy: Policy = field(default_factory=Policy)
    device: str = "cuda"
    ci: bool = False

    @property
    def name(self):
        words = [self.net, f"{self.batch}x{self.size}", self.optimizer, self.store, str(self.policy.activations)]
        words += [str(self.autocast).removeprefix("torch.")] * (self.autocast is not None)
        words += ["channels_last"] * self.channels_last + [self.policy.attention] * (self.policy.attention != "keep")
        return " ".join(words + [self.device] * (self.device != "cuda"))


def run(step):
    """The launches of two epochs of two steps each."""
    drawn, net = Plan.sample, timm.create_model(step.net, num_classes=10, **step.options)
    if step.channels_last:
        net = net.to(memory_format=torch.channels_last)

    def draw(plan, *arguments):
        with _disable_current_modes():
            return drawn(plan, *arguments)

    with patch.object(Plan, "sample", draw), pretended_cuda() as recorded:
        net, x = _on_device(net, step.device), torch.empty(step.batch, 3, step.size, step.size, device=step.device)
        y = torch.empty(step.batch, dtype=torch.int64, device=step.device)
        if step.channels_last:
            x = x.to(memory_format=torch.channels_last)
        plan = _plan(step, net.eval(), x)
        options = {"momentum": {"momentum": 0.9, "nesterov": True}, "adamw": {"algorithm": "adamw"}, "sgd": {}}
        optimizer = TraDyOptimizer(apply_plan(net.train(), plan).parameters(), plan, lr=0.1, **options[step.optimizer])
        for epoch in range(2):
            optimizer.resample(epoch)
            for _ in range(2):
                recorded.begin_step()
                optimizer.zero_grad()
                with torch.autocast("cuda", step.autocast or torch.bfloat16, enabled=step.autocast is not None):
                    loss = torch.nn.functional.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                recorded.end_step()
    return recorded


def _on_device(net, device):
    """A copy of a net, on fake tensors of that device."""

    def moved(tensor):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake

    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(tensor): moved(tensor) for tensor in tensors})


def _plan(step, net, x):
    shapes = shapes_in_order(net, x)
    layers = tuple(LayerNorms(name, shape, (1.0,) * shape.in_channels) for name, shape in shapes.items())
    return make_plan(
        Ranking(layers, find_head(net, list(shapes)), 1), budget=step.budget, batch_size=step.batch, coverage=1.0,
        activation_dtype=step.autocast, optimizer=step.optimizer, store=step.store, policy=step.policy, fill="skip",
    )  # fmt: skip


BF16 = torch.bfloat16
VIT = {"img_size": 48, "depth": 2}
STEPS = [
    Step("resnet18", 8, 64, "1MiB", autocast=BF16, channels_last=True, optimizer="adamw", ci=True),
    Step("resnet18", 8, 64, "1MiB"),
    Step("resnet18", 4, 64, "1MiB", autocast=BF16, device="cuda:1"),
    Step("resnet50", 8, 64, "2MiB", autocast=BF16, optimizer="momentum", store="int8"),
    Step("mobilenetv2_w035", 8, 64, "1MiB", autocast=BF16, channels_last=True),
    Step("mobilenetv2_w035", 8, 64, "1MiB", optimizer="adamw"),
    Step("mobilenetv2_w035", 8, 64, "1MiB", autocast=BF16, store="int4"),
    Step("convnext_atto", 8, 64, "1MiB", autocast=BF16, store="int8", policy=Policy(activations=8)),
    Step("convnext_atto", 8, 64, "1MiB", autocast=BF16, channels_last=True, store="int4", policy=Policy(activations=2)),
    Step("vit_tiny_patch16_224", 8, 48, "1MiB", VIT, autocast=BF16, optimizer="adamw", store="int4",
         policy=Policy(activations=8, attention="recompute"), ci=True),
    Step("vit_tiny_patch16_224", 8, 48, "1MiB", VIT, store="int8", policy=Policy(recompute=("blocks.0",))),
    Step("swin_tiny_patch4_window7_224", 4, 112, "1MiB", {"img_size": 112}, autocast=BF16,
         policy=Policy(activations=8)),
    Step("regnety_002", 8, 64, "1MiB", autocast=BF16, channels_last=True),
    Step("resnext26ts", 8, 64, "1MiB", autocast=BF16, store="int8"),
    Step("efficientnet_b0", 4, 64, "1MiB", autocast=torch.float16, policy=Policy(activations=8)),
    Step("resnet50", 128, 224, "256MiB", autocast=BF16, channels_last=True),
    Step("vit_base_patch16_224", 128, 224, "512MiB", autocast=BF16),
    Step("resnet18", 1024, 384, "4GiB", autocast=BF16),  # activations of more than 2^31 elements
]  # fmt: skip


def main():
    """Run, compile, print what was launched; exits 1 with one line a problem."""
    parser = arguments(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="run the steps only")
    options = parser.parse_args()
    found, variants = [], {}
    for step in (step for step in STEPS if options.match in step.name and (step.ci or not options.ci)):
        recorded = run(step)
        found += [f"{step.name}: {sentence}" for sentence in dict.fromkeys(recorded.problems)]
        for launch in recorded.launches:
            variants.setdefault(launch.variant, (f"{launch.name} {launch.constants} of {step.name}", launch))
        counts = Counter(launch.name for launch in recorded.launches)
        print(f"{step.name}: {len({launch.variant for launch in recorded.launches})} variants, {dict(counts)}")
    first = {launch.name: (name, launch) for name, launch in reversed(variants.values())}
    chosen = [] if options.no_compile else list((first if options.ci else variants).values())
    found += [line for row in compile_all(chosen, options.jobs) for line in spills(row)]
    print(f"{len(variants)} variants, {len(chosen)} compiled, {len(found)} problems", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
