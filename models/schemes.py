"""The Sparse Update schemes of Lin et al. 2022 for the paper's nets, as data: layers and parts of layers.

A layer is its index in the order of call of the convolutions, a ratio r the part of its C input channels: int(C * r) of
them. Source: the published configurations of tiny-training; TraDy (arXiv 2510.19675) takes its three budgets from them.
"""

from trady_triton.models.paper_archs import conv_names

_MOBILENETV2_LAYERS = (27, 30, 33, 36, 39, 42, 45, 48)
_MCUNET_LAYERS = (21, 24, 27, 30, 36, 39)
_PROXYLESSNAS_LAYERS = (36, 39, 42, 45, 48, 51, 54, 57)

# net -> scheme -> (layers, ratios); s1, s3, s5 are the small, middle and large budget
SCHEMES: dict[str, dict[str, tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "mobilenetv2_w035": {
        "s1": ((36, 39, 40, 41, 42, 45, 48, 49), (1, 1, 0, 0.25, 0.125, 0.125, 0.125, 0.125)),
        "s3": (_MOBILENETV2_LAYERS, (1, 1, 1, 1, 1, 0.125, 0.5, 1)),
        "s5": (_MOBILENETV2_LAYERS, (1, 1, 1, 1, 1, 1, 1, 1)),
    },
    "mcunet_in1": {
        "s1": ((23, 24, 27, 30, 33, 39), (0, 0.25, 0.5, 0.5, 0, 0)),
        "s3": (_MCUNET_LAYERS, (1, 1, 1, 1, 0.125, 0.25)),
        "s5": (_MCUNET_LAYERS, (1, 1, 1, 1, 1, 0.5)),
    },
    "proxylessnas_w03": {
        "s1": ((39, 42, 44, 45, 50, 51, 54, 57), (0.25, 1, 0, 1, 0, 0.125, 0.25, 0.25)),
        "s3": (_PROXYLESSNAS_LAYERS, (1, 0.5, 1, 1, 0.25, 0.5, 1, 1)),
        "s5": (_PROXYLESSNAS_LAYERS, (1, 1, 1, 1, 1, 1, 1, 1)),
    },
}


# The paper's budgets in elements, each that of a scheme as the paper counts it (depthwise channels at one weight).
BUDGETS: dict[str, dict[int, str]] = {
    "mobilenetv2_w035": {27_946: "s1", 66_592: "s3", 93_696: "s5"},
    "mcunet_in1": {15_936: "s1", 64_832: "s3", 112_640: "s5"},
    "proxylessnas_w03": {25_984: "s1", 72_960: "s3", 101_376: "s5"},
}


def scheme_of_budget(net_name: str, budget: object) -> str:
    """Name of the scheme from which the paper took a budget. Raises ValueError where it took it from none."""
    known = BUDGETS.get(net_name, {})
    if budget not in known:
        found = ", ".join(map(str, known)) or f"none for it, but for {', '.join(BUDGETS)}"
        raise ValueError(f"net {net_name!r} has no Sparse Update scheme of {budget} elements; known: {found}")
    return known[budget]  # type: ignore[index]


def su_layers(net_name: str, scheme: str) -> dict[str, float]:
    """Ratio of input channels that a scheme trains, by module name, in order of call; layers of ratio 0 are left out.

    Raises ValueError for a net or a scheme that has no entry.
    """
    if net_name not in SCHEMES:
        raise ValueError(f"net {net_name!r} has no Sparse Update scheme; known nets: {', '.join(SCHEMES)}")
    if scheme not in SCHEMES[net_name]:
        known = ", ".join(SCHEMES[net_name])
        raise ValueError(f"net {net_name!r} has no Sparse Update scheme {scheme!r}; known schemes: {known}")
    names = conv_names(net_name)
    return {names[layer]: ratio for layer, ratio in zip(*SCHEMES[net_name][scheme], strict=True) if ratio > 0}
