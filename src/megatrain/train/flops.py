"""Floating-point operations of a training step of a decoder-only transformer, from its shape. Pure arithmetic.

Matrix products are counted, two operations for each multiplication with its addition:

    projections, gated MLP, head    2 per weight and token
    attention                       4 x heads x head_dim per pair of positions (scores, and their sum over values);
                                    of a sequence's length^2 pairs half with a causal mask
    backward                        twice the forward: gradients of inputs and of weights

Left out: norms, activations, softmax, rotary embeddings, the embedding's look-up, the optimizer (on the host).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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

    def layer_forward(self, length: int, *, causal: bool = True) -> int:
        """One layer over one sequence."""
        return 2 * self.layer_weights * length + self.attention_forward(length, causal=causal)

    def attention_forward(self, length: int, *, causal: bool = True) -> int:
        """Of that, attention itself."""
        whole = 4 * self.heads * self.head_dim * length**2
        return whole // 2 if causal else whole

    def head_forward(self, length: int) -> int:
        return 2 * self.hidden * self.vocabulary * length


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
    model = repeated = 0
    for length in lengths:
        forward = shape.layer_forward(length, causal=causal)
        model += 3 * (shape.layers * forward + shape.head_forward(length))
        repeated += again * forward
        if scores_repeated:
            repeated += shape.layers * (shape.attention_forward(length, causal=causal) // 2)
    return StepFlops(model, model + repeated)
