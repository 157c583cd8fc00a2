"""Floating-point operations of a training step of a decoder-only transformer. Pure arithmetic.

Matrix products are counted, two operations for each multiplication with its addition:

    projections, MLP, head    2 per weight and token; of routed experts the share that a token passes
    attention                 2 x heads x (width of a key + width of a value) per pair of positions (scores, and their
                              sum over values); of a sequence's length^2 pairs half with a causal mask, and with a
                              sliding window only those inside it
    backward                  twice the forward: gradients of inputs and of weights; of what is frozen those of inputs
                              alone, and none where nothing before it is trained

Left out: norms, activations, softmax, rotary embeddings, the embedding's look-up, the optimizer (on the host).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class UnitFlops:
    """What decides how much one unit computes: elements of its matrices that a token passes; of attention heads x
    (width of a key + width of a value), 0 without, and the positions that its window reaches back (None: all).
    `trained`: its weights get a gradient; `passes`: its inputs do."""

    matrix_elements: int
    attention_width: int = 0
    window: int | None = None
    trained: bool = True
    passes: bool = True

    def products_forward(self, length: int) -> int:
        """Products with weights, over one sequence."""
        return 2 * self.matrix_elements * length

    def attention_forward(self, length: int, *, causal: bool = True) -> int:
        """Products of activations with each other, over one sequence."""
        return 2 * self.attention_width * attended_pairs(length, self.window, causal=causal)

    def forward(self, length: int, *, causal: bool = True) -> int:
        return self.products_forward(length) + self.attention_forward(length, causal=causal)

    @property
    def differentiated(self) -> bool:
        return self.trained or self.passes

    def backward(self, length: int, *, causal: bool = True) -> int:
        products = (self.trained + self.passes) * self.products_forward(length)
        return products + 2 * self.differentiated * self.attention_forward(length, causal=causal)


def attended_pairs(length: int, window: int | None = None, *, causal: bool = True) -> int:
    """Pairs of positions of one sequence. A causal mask leaves half of them (the diagonal is not counted apart); a
    window cuts off those that lie farther back."""
    if not causal:
        return length**2
    beyond = max(0, length - window) if window is not None else 0
    return (length**2 - beyond**2) // 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much a model of the llama or qwen kind computes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices: queries, keys, values, output, and the MLP's three."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> UnitFlops:
        return UnitFlops(self.layer_weights, 2 * self.heads * self.head_dim)

    @property
    def head(self) -> UnitFlops:
        return UnitFlops(self.hidden * self.vocabulary)

    def layer_forward(self, length: int, *, causal: bool = True) -> int:
        """One layer over one sequence."""
        return self.layer.forward(length, causal=causal)

    def attention_forward(self, length: int, *, causal: bool = True) -> int:
        """Of that, attention itself."""
        return self.layer.attention_forward(length, causal=causal)

    def head_forward(self, length: int) -> int:
        return self.head.forward(length)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """`model`: what a step takes without any repetition. `hardware`: what is carried out, repetitions included."""

    model: int
    hardware: int


def step_flops(
    shape: Shape,
    lengths: Iterable[int],
    *,
    causal: bool = True,
    recomputed_layers: int | None = None,
    scores_repeated: bool = True,
) -> StepFlops:
    """Of one step over sequences of these `lengths`, whatever the micro-batches.

    recomputed_layers: whose forward runs a second time in backward; None: all. The head is never run again.
    scores_repeated:   the backward of attention computes the scores again, as fused kernels do: half of its forward.
    """
    again = shape.layers if recomputed_layers is None else recomputed_layers
    units = [(shape.layer, n < again) for n in range(shape.layers)] + [(shape.head, False)]
    return flops_of_units(units, lengths, causal=causal, scores_repeated=scores_repeated)


def flops_of_units(
    units: Sequence[tuple[UnitFlops, bool]],
    lengths: Iterable[int],
    *,
    causal: bool = True,
    scores_repeated: bool = True,
) -> StepFlops:
    """As `step_flops`, of any units: (what one computes, whether its forward runs a second time)."""
    model = repeated = 0
    for length in lengths:
        for unit, again in units:
            forward = unit.forward(length, causal=causal)
            model += forward + unit.backward(length, causal=causal)
            repeated += forward if again else 0
            if scores_repeated and unit.differentiated:
                repeated += unit.attention_forward(length, causal=causal) // 2
    return StepFlops(model, model + repeated)
