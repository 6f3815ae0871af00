"""Sixteen dot products at once in LLVM's own instructions: four rows of a weight matrix with four vectors.

A loop of numba cannot say two things that decide the speed here. Lines that are needed next are asked for one by one
between the products, which then cost no time beside the reading; and the sums of all lanes are folded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

SIDE = 4  # rows of each operand
_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4  # f32 of a register; a power of two

_BYTE, _INT, _WORD, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_READ, _NEAR, _DATA = _INT(0), _INT(3), _INT(1)  # of llvm.prefetch


def _load(builder: Any, address: Any, size: int) -> Any:
    """LANES numbers as f32, of f32 or, where a number has 2 bytes, of bf16."""
    kind = _VECTOR if size == 4 else ir.VectorType(ir.IntType(8 * size), LANES)
    found = builder.load(builder.inttoptr(address, kind.as_pointer()), align=size)
    if size == 4:
        return found
    wide = ir.VectorType(_INT, LANES)
    return builder.bitcast(builder.shl(builder.zext(found, wide), ir.Constant(wide, [16] * LANES)), _VECTOR)


def _pick(builder: Any, a: Any, b: Any, lanes: range) -> Any:
    """Some lanes of a and, counted on, of b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes)))


def _fold(builder: Any, vectors: list[Any]) -> Any:
    """The vector of the sums over all lanes of as many vectors as there are lanes."""
    while len(vectors) > 1:
        halves = [
            [_pick(builder, a, b, range(odd, 2 * LANES, 2)) for odd in (0, 1)]
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        vectors = [builder.fadd(even, odd) for even, odd in halves]
    return vectors[0]


def _write(builder: Any, size: int, places: Sequence[Any]) -> None:
    """The loop over the inputs, LANES at a time, and the sums behind it, for `places` as `tile` gets them."""
    w, stride, count, ahead, *rows = places
    xs, ys = rows[:SIDE], rows[SIDE:]
    plus, times = builder.add, lambda x, factor: builder.mul(x, _WORD(factor))
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
    entry, loop, end = builder.block, builder.append_basic_block("products"), builder.append_basic_block("sums")
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    builder.cbranch(builder.icmp_unsigned("<", _WORD(0), count), loop, end)

    builder.position_at_end(loop)
    at = builder.phi(_WORD)
    before = [builder.phi(_VECTOR) for _ in range(SIDE * SIDE)]
    column = times(at, size)
    for row in range(SIDE):
        line = plus(plus(ahead, times(stride, row)), column)
        builder.call(prefetch, [builder.inttoptr(line, _BYTE.as_pointer()), _READ, _NEAR, _DATA])
    weights = [_load(builder, plus(plus(w, times(stride, o)), column), size) for o in range(SIDE)]
    after = []
    for n in range(SIDE):
        x = _load(builder, plus(xs[n], times(at, 4)), 4)
        for o in range(SIDE):
            product = builder.fmul(x, weights[o], flags=["contract"])
            after.append(builder.fadd(product, before[SIDE * n + o], flags=["contract"]))
    following = plus(at, _WORD(LANES))
    builder.cbranch(builder.icmp_unsigned("<", following, count), loop, end)
    for phi, first, again in zip([at, *before], [_WORD(0), *[zero] * len(before)], [following, *after], strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(again, loop)

    builder.position_at_end(end)
    sums = []
    for again in after:
        sums.append(builder.phi(_VECTOR))
        sums[-1].add_incoming(zero, entry)
        sums[-1].add_incoming(again, loop)
    folded = [_fold(builder, sums[i : i + LANES]) for i in range(0, len(sums), LANES)]
    for n in range(SIDE):
        own, first = folded[SIDE * n // LANES], SIDE * n % LANES
        row = _pick(builder, own, own, range(first, first + SIDE))
        builder.store(row, builder.inttoptr(ys[n], row.type.as_pointer()), align=4)


def _tile(size: int) -> Callable[..., None]:
    @intrinsic
    def tile(typing, w, stride, count, ahead, x0, x1, x2, x3, y0, y1, y2, y3):
        def code(context, builder, signature, args):
            _write(builder, size, args)
            return context.get_dummy_value()

        return types.void(*[types.uintp] * 12), code

    return tile


# y0..y3 [4] = x0..x3 [count] @ w [4, count]ᵀ, all of them addresses; rows of w lie `stride` bytes apart, count is a
# multiple of LANES, and the four rows at `ahead`, any address, are brought near. Inside compiled code only.
tile_f32, tile_bf16 = _tile(4), _tile(2)
