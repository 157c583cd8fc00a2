"""AdamW on split masters, sixteen elements at a time, written as vector operations.

LLVM vectorises the scalar loop as well, but it brings 16-bit halves into the order of 32-bit elements and back with
shuffles across whole registers, and the core's scheduler fills up with them: the update then takes longer than its
memory traffic (docs/LOG.md, "Host AdamW"). Here halves are interleaved within each 128 bits, two instructions for
sixteen elements, and what is added to the weights is brought into that order instead. Values are those of the scalar
update, bit for bit, on every CPU: the same operations in the same order.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # elements at a time
_HALF = LANES // 2
_HALVES, _WORDS = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.IntType(32), _HALF)
_SINGLE = ir.FloatType()
_SINGLES = ir.VectorType(_SINGLE, _HALF)
_INDEX = ir.IntType(64)
# the elements in each of the two vectors that interleaving gives
_ELEMENTS = ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))


@intrinsic
def update_blocks(
    _typing: Any, weight: Any, remainder: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, scale: Any, c: Any
) -> Any:
    """All whole blocks of sixteen elements of 1-D contiguous arrays of one length; the rest is left to the caller.

    `c` as for `adamw_kernels._updated`; `grad` is float32 or the uint16 bits of bf16 and is multiplied by `scale`.
    Writes weight (uint16 bits of bf16), remainder (int16) and both moments.
    """
    kinds = (weight, remainder, exp_avg, exp_avg_sq, grad)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        arrays = [context.make_array(kind)(context, builder, value) for kind, value in zip(kinds, args, strict=False)]
        blocks = builder.udiv(arrays[0].nitems, _INDEX(LANES))
        coefficients = [builder.extract_value(args[6], i) for i in range(len(c))]
        from_grad = coefficients.pop(2)
        pointers = [array.data for array in arrays]
        with builder.if_else(from_grad) as branches:  # outside the loop: LLVM would branch in every round
            for branch, taken in zip(branches, (True, False), strict=True):
                with branch:
                    _Loop(builder, pointers, args[5], coefficients, taken).write(blocks)
        return context.get_dummy_value()

    return types.void(*kinds, types.float32, c), generate


class _Loop:
    """Emits one loop. The arithmetic mirrors `adamw_kernels._updated`.

    Each round begins a block and ends the block before it: a division and a square root wait for each other within a
    block, and a core looks too few instructions ahead to find work in the next one by itself.
    """

    def __init__(self, builder: Any, pointers: list[Any], scale: Any, coefficients: list[Any], from_grad: bool) -> None:
        self.builder = builder
        self.weight, self.remainder, self.exp_avg, self.exp_avg_sq, self.grad = pointers
        self.scale, self.from_grad = self.spread(scale), from_grad
        self.decay, self.lerp, self.beta2, self.rest2, self.step_size, self.root_scale, self.eps = map(
            self.spread, coefficients
        )
        self.start: Any = None  # of the block that is being emitted
        self.denominators = [cgutils.alloca_once(builder, _SINGLES) for _ in range(2)]

    def write(self, blocks: Any) -> None:
        b = self.builder
        one, lanes = _INDEX(1), _INDEX(LANES)
        with b.if_then(b.icmp_unsigned(">", blocks, _INDEX(0))):
            self.begin(_INDEX(0))
            with cgutils.for_range_slice(b, one, blocks, one, _INDEX) as (block, _):
                here = b.mul(block, lanes)
                steps = self.steps(b.sub(here, lanes))
                self.begin(here)
                self.end(b.sub(here, lanes), steps)
            last = b.mul(b.sub(blocks, one), lanes)
            self.end(last, self.steps(last))

    def begin(self, start: Any) -> None:
        """Write the moments of a block, and keep the denominators of its steps."""
        self.start = start
        for offset, kept in zip((0, _HALF), self.denominators, strict=True):
            self.builder.store(self.moments(offset), kept)

    def moments(self, offset: int) -> Any:
        b = self.builder
        g = b.fmul(self.gradient(offset), self.scale)
        m, v = self.load(self.exp_avg, offset, _SINGLES), self.load(self.exp_avg_sq, offset, _SINGLES)
        m = self.call("llvm.fma", self.lerp, b.fsub(g, m), g if self.from_grad else m)
        v = self.call("llvm.fma", b.fmul(self.rest2, g), g, b.fmul(v, self.beta2))
        self.store(m, self.exp_avg, offset)
        self.store(v, self.exp_avg_sq, offset)
        return b.fadd(b.fdiv(self.call("llvm.sqrt", v), self.root_scale), self.eps)

    def steps(self, start: Any) -> list[Any]:
        """What is to be added to the masters of a block that was begun, in the order of `_ELEMENTS`."""
        b, self.start = self.builder, start
        moments = [self.load(self.exp_avg, offset, _SINGLES) for offset in (0, _HALF)]
        quotients = [
            b.fdiv(b.fmul(self.step_size, m), b.load(kept)) for m, kept in zip(moments, self.denominators, strict=True)
        ]
        return [b.shuffle_vector(*quotients, _mask(elements)) for elements in _ELEMENTS]

    def end(self, start: Any, steps: list[Any]) -> None:
        """Write the masters of a block."""
        b, self.start = self.builder, start
        masters = [b.fadd(b.fmul(p, self.decay), step) for p, step in zip(self.masters(), steps, strict=True)]
        bits = [b.bitcast(master, _WORDS) for master in masters]
        rounded = [b.lshr(b.add(u, _constant(_WORDS, 0x8000)), _constant(_WORDS, 16)) for u in bits]
        self.store(self.joined(rounded), self.weight, 0)
        self.store(self.joined(bits), self.remainder, 0)

    def gradient(self, offset: int) -> Any:
        b = self.builder
        if self.grad.type.pointee == _SINGLE:
            return self.load(self.grad, offset, _SINGLES)
        bits = b.zext(self.load(self.grad, offset, ir.VectorType(ir.IntType(16), _HALF)), _WORDS)
        return b.bitcast(b.shl(bits, _constant(_WORDS, 16)), _SINGLES)

    def masters(self) -> list[Any]:
        """(weight << 16) + remainder of all sixteen: where the remainder is negative the upper half is one less."""
        b = self.builder
        weight, remainder = self.load(self.weight, 0, _HALVES), self.load(self.remainder, 0, _HALVES)
        upper = b.add(weight, b.ashr(remainder, _constant(_HALVES, 15)))
        masks = [[i + half for i in elements for half in (0, LANES)] for elements in _ELEMENTS]
        return [b.bitcast(b.shuffle_vector(remainder, upper, _mask(mask)), _SINGLES) for mask in masks]

    def joined(self, words: list[Any]) -> Any:
        """The low halves of words that are in the order of interleaved halves, as sixteen elements in their own."""
        positions = {e: 2 * (part * _HALF + i) for part, es in enumerate(_ELEMENTS) for i, e in enumerate(es)}
        halves = [self.builder.bitcast(word, _HALVES) for word in words]
        return self.builder.shuffle_vector(*halves, _mask([positions[element] for element in range(LANES)]))

    def spread(self, value: Any) -> Any:
        b = self.builder
        one = b.insert_element(ir.Constant(_SINGLES, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return b.shuffle_vector(one, one, _mask([0] * _HALF))

    def load(self, pointer: Any, offset: int, kind: Any) -> Any:
        return self.builder.load(self.at(pointer, offset, kind), align=1)

    def store(self, value: Any, pointer: Any, offset: int) -> None:
        self.builder.store(value, self.at(pointer, offset, value.type), align=1)

    def at(self, pointer: Any, offset: int, kind: Any) -> Any:
        element = self.builder.gep(pointer, [self.builder.add(self.start, _INDEX(offset))])
        return self.builder.bitcast(element, kind.as_pointer())

    def call(self, name: str, *args: Any) -> Any:
        name = f"{name}.v{_HALF}f32"
        module = self.builder.module
        declared = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(_SINGLES, [_SINGLES] * len(args)), name
        )
        return self.builder.call(declared, args)


def _constant(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _mask(indices: Any) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
