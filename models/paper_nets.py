"""The paper's three networks as modules, registered with timm, which lacks them, under the names of `ARCHS`.

N batch, C channels, H x W pixels. In the form that the paper counts they have 52 / 42 / 61 convolutions without bias,
each with a BatchNorm, and ReLU6 after all but the projections. Convolutions are registered in the order in which
forward calls them, which is the order that the layer indices of the paper count.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

from trady_triton.models.paper_archs import ARCHS, STEM_CHANNELS, Arch, Stage


class InvertedResidual(nn.Module):
    """x [N, C, H, W] -> [N, C', H/stride, W/stride]: expand, depthwise, project; plus x where the shapes agree."""

    def __init__(self, in_channels: int, block: Stage, norm_layer: type[nn.Module]):
        super().__init__()
        k, mid = block.kernel_size, in_channels * block.expansion
        conv = partial(nn.Conv2d, bias=norm_layer is nn.Identity)
        self.has_skip = block.stride == 1 and in_channels == block.channels
        self.has_expansion = block.expansion > 1
        if self.has_expansion:
            self.pw1 = conv(in_channels, mid, 1)
            self.pw1_norm = norm_layer(mid)
            self.pw1_act = nn.ReLU6(inplace=True)
        self.dw = conv(mid, mid, k, block.stride, k // 2, groups=mid)
        self.dw_norm = norm_layer(mid)
        self.dw_act = nn.ReLU6(inplace=True)
        self.pw2 = conv(mid, block.channels, 1)
        self.pw2_norm = norm_layer(block.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block; the projection has no activation."""
        y = self.pw1_act(self.pw1_norm(self.pw1(x))) if self.has_expansion else x
        y = self.dw_act(self.dw_norm(self.dw(y)))
        y = self.pw2_norm(self.pw2(y))
        return x + y if self.has_skip else y


class PaperNet(nn.Module):
    """Image [N, in_chans, H, W] -> logits [N, num_classes], with timm's model protocol.

    With `norm_layer=nn.Identity` the convolutions carry biases, and with `feature_mix=False` the last 1x1 convolution
    is left out: both together are the form of the public ImageNet weights, whose BatchNorm is folded.
    """

    def __init__(
        self,
        cfg: Arch,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        feature_mix: bool = True,
    ):
        super().__init__()
        norm_layer = _norm_type(norm_layer)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        conv = partial(nn.Conv2d, bias=norm_layer is nn.Identity)
        self.stem = conv(in_chans, STEM_CHANNELS, 3, 2, 1)
        self.stem_norm = norm_layer(STEM_CHANNELS)
        self.stem_act = nn.ReLU6(inplace=True)
        rows = cfg.blocks()
        widths = [STEM_CHANNELS, *(row.channels for row in rows)]
        blocks = [InvertedResidual(width, row, norm_layer) for width, row in zip(widths, rows, strict=False)]
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = _feature_info(rows)
        self.num_features = self.head_hidden_size = widths[-1]
        self.has_feature_mix = feature_mix and cfg.mix_channels > 0
        if self.has_feature_mix:
            self.feature_mix = conv(widths[-1], cfg.mix_channels, 1)
            self.feature_mix_norm = norm_layer(cfg.mix_channels)
            self.feature_mix_act = nn.ReLU6(inplace=True)
            self.num_features = self.head_hidden_size = cfg.mix_channels
        self.global_pool, self.head_drop, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of layer groups, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^feature_mix", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity for num_classes=0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Put a new head with fresh weights in place."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps before pooling: [N, num_features, H/32, W/32]."""
        x = self.stem_act(self.stem_norm(self.stem(x)))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        if self.has_feature_mix:
            x = self.feature_mix_act(self.feature_mix_norm(self.feature_mix(x)))
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps -> logits [N, num_classes], or the pooled features [N, num_features] with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image -> logits."""
        return self.forward_head(self.forward_features(x))


def _norm_type(norm_layer: str | type[nn.Module]) -> type[nn.Module]:
    """A norm type by its class, or by name, as a command line gives it."""
    named = {"batchnorm2d": nn.BatchNorm2d, "identity": nn.Identity}
    if isinstance(norm_layer, str) and norm_layer not in named:
        raise ValueError(f"norm_layer {norm_layer!r}: wanted a module type, or one of {', '.join(named)}")
    return named[norm_layer] if isinstance(norm_layer, str) else norm_layer


def _feature_info(rows: list[Stage]) -> list[dict[str, Any]]:
    """timm's table of the last block at every resolution."""
    info: list[dict[str, Any]] = []
    reduction = 2
    for i, row in enumerate(rows):
        reduction *= row.stride
        entry = {"num_chs": row.channels, "reduction": reduction, "module": f"blocks.{i}"}
        info = [other for other in info if other["reduction"] != reduction] + [entry]
    return info


def _init_weights(module: nn.Module) -> None:
    """He initialisation over the fan out, as timm does for MobileNets; norms start as the identity by themselves."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 128, 128),
    "pool_size": (4, 4),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "stem",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(ARCHS, _CFG))


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    net: nn.Module = build_model_with_cfg(
        PaperNet, name, pretrained, model_cfg=ARCHS[name], feature_cfg={"flatten_sequential": True}, **kwargs
    )
    return net


@register_model
def mobilenetv2_w035(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of width 0.35: 52 convolutions, 1,252,320 elements of weights and inputs at 128 px."""
    return _create("mobilenetv2_w035", pretrained, **kwargs)


@register_model
def mcunet_in1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MCUNet-in1 (the "5fps" net): 42 convolutions, 1,309,808 elements of weights and inputs at 128 px."""
    return _create("mcunet_in1", pretrained, **kwargs)


@register_model
def proxylessnas_w03(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ProxylessNAS of width 0.3: 61 convolutions, 1,162,032 elements of weights and inputs at 128 px."""
    return _create("proxylessnas_w03", pretrained, **kwargs)
