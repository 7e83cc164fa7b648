"""Policy: what the layers around the trained ones keep for the backward, and how exactly. Data only."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_NORM = ("eval", "affine", "train")
ACTIVATIONS = ("exact", 8, 2)  # each keeps less than the one before
ATTENTION = ("keep", "recompute")


@dataclass(frozen=True)
class Policy:
    """How the frozen part of the network is treated. The default is exact and costs no second forward.

    Attributes:
        batch_norm: "eval" normalises with the running statistics even in train mode and keeps nothing. "affine" does
            so too and trains weight and bias of BatchNorm alone (`make_plan(train_norm=True)` those of every kind of
            normalisation), outside the budget, for which every input is kept, in 4 bytes an element or, by
            `activations`, in one. "train" leaves the mode to `model.train()`: the batch's own statistics, and every
            input kept, in 4 bytes an element.
        activations: "exact" keeps what an exact derivative needs: a bit an element for ReLU and its kin, the input
            (4 or 2 bytes) for SiLU, GELU, Hardswish, LayerNorm and gates. 8 keeps one byte instead, an error of some
            0.3 % a layer. 2 keeps two bits of the derivative of SiLU, GELU and Hardswish and a byte elsewhere: an
            APPROXIMATION whose error grows with the depth.
        attention: "keep" keeps q, k, v and the output; "recompute" the input alone, exactly, for a second forward.
        recompute: names of modules that keep their inputs alone and run again in the backward, exactly; "blocks.4:10"
            are the children 4 to 9 of the Sequential "blocks", as one.
        recompute_parts: how many parts of the batch such a unit runs one after another, if its first argument alone
            is of the batch: what it needs for a moment is divided by as much. Smaller products may round otherwise.
    """

    batch_norm: str = "eval"
    activations: str | int = "exact"
    attention: str = "keep"
    recompute: tuple[str, ...] = ()
    recompute_parts: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.recompute, str):
            raise ValueError(f"recompute {self.recompute!r}: wanted a sequence of module names")
        object.__setattr__(self, "recompute", tuple(self.recompute))
        for name, choices in (("batch_norm", BATCH_NORM), ("activations", ACTIVATIONS), ("attention", ATTENTION)):
            if (value := getattr(self, name)) not in choices or isinstance(value, bool):
                raise ValueError(f"{name} {value!r}: wanted one of {', '.join(map(repr, choices))}")
        if (
            isinstance(self.recompute_parts, bool)
            or not isinstance(self.recompute_parts, int)
            or self.recompute_parts < 1
        ):
            raise ValueError(f"recompute_parts {self.recompute_parts!r}: wanted an integer of at least 1")
        if self.recompute and self.batch_norm == "train":
            raise ValueError("recompute with batch_norm 'train': the second run would update the running statistics "
                             "again; wanted batch_norm 'eval'")  # fmt: skip

    @property
    def derivative_bits(self) -> int | None:
        """Bits of a smooth activation's derivative; None keeps its input."""
        return self.activations if isinstance(self.activations, int) else None

    @property
    def is_exact(self) -> bool:
        """Whether gradients are those of the plain network, up to the order of the sums."""
        return self.activations == "exact"
