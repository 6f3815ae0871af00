"""The one place that knows Pallas Mosaic GPU, whose interface still moves: kernels for Hopper are built from this.

Nothing of it is imported before a kernel is asked for. A kernel is a function of refs run by warpgroups of 128
threads; operands of matrix products lie in swizzled shared memory, sums in registers (`Layout.WGMMA`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _interpret, _versions

SHARED_BYTES = 232448  # of one block on an H100
ROWS = 64  # of a product: what one warpgroup multiplies at once
SWIZZLE = 128  # bytes
ROUNDING = ("BF16_BF16_F32", "bfloat16")  # precisions that allow to round operands of products from f32 to bfloat16


def missing() -> str | None:
    """Why no kernel can be built in this process, or None. Asks an attached GPU for its kind."""
    if reason := _versions.too_old_for_gpus():
        return reason
    if _interpret.mode() is not False or _interpret._target.value or _interpret.platform() != "gpu":
        return None
    device = jax.devices()[0]
    if getattr(device, "compute_capability", "") != "9.0":
        return f"backend 'gpu' is written for Hopper (H100, H200) but this is a {device.device_kind}: use 'xla'."
    return None


def inexact(**arrays: jax.Array) -> str | None:
    """Why arrays cannot be operands of products, or None: those are bfloat16, to which f32 is rounded on request.

    Asked for as JAX is asked to do it everywhere: jax.default_matmul_precision, or $JAX_DEFAULT_MATMUL_PRECISION.
    """
    config: Any = jax.config  # whose options are attributes only at run time
    rounds = config.jax_default_matmul_precision in ROUNDING
    for name, x in arrays.items():
        if x.dtype == jnp.bfloat16 or (rounds and x.dtype == jnp.float32):
            continue
        allow = f", allow it with jax.default_matmul_precision({ROUNDING[0]!r})" if x.dtype == jnp.float32 else ""
        return f"backend 'gpu' computes bfloat16 but {name} is {x.dtype}: cast it{allow}, or use 'xla'."
    return None


@functools.cache
def plgpu() -> Any:
    """The module `jax.experimental.pallas.mosaic_gpu`."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def simulated() -> bool:
    """Whether kernels are interpreted here. The simulator knows no register operands of products."""
    return _interpret.mode() is not False


def mode(interpret: Any) -> Any:
    """`launch(interpret=)` from `interpret_for`: "plain" is the machine simulator too, the only one there is."""
    return plgpu().InterpretGPUParams() if interpret is True else interpret


def _check_simulator(warpgroups: int) -> None:
    """Refuse what would wait for ever: each simulated warpgroup holds one of the threads of JAX's CPU client."""
    threads = int(os.environ.get("NPROC", 0)) or os.cpu_count() or 1
    if threads <= warpgroups:
        raise NotImplementedError(
            f"simulating {warpgroups} warpgroups takes more threads than the {threads} JAX has here: set the "
            f"environment variable NPROC=8 before JAX starts."
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is run.

    grid: axis name -> blocks; the first axis runs fastest.
    threads: warpgroups of a block, told apart by `jax.lax.axis_index("wg")`.
    interpret: see `mode`.
    approx: exp2, tanh and divisions as the hardware's approximations.
    """

    name: str
    grid: Mapping[str, int]
    threads: int = 1
    interpret: Any = False
    approx: bool = True
    cost: pl.CostEstimate | None = None


def launch(how: Launch, body: Callable[..., None], out: Any, scratch: Sequence[Any], *arrays: jax.Array) -> Any:
    """Runs `body(*inputs, *outputs, *scratch)`; `out` is a pytree of ShapeDtypeStruct."""
    api = plgpu()
    if how.interpret is not False:
        _check_simulator(how.threads)
    return api.kernel(
        body,
        out_type=out,
        scratch_types=list(scratch),
        grid=tuple(how.grid.values()),
        grid_names=tuple(how.grid),
        num_threads=how.threads,
        thread_name="wg",
        compiler_params=api.CompilerParams(approx_math=how.approx, lowering_semantics=api.LoweringSemantics.Warpgroup),
        kernel_name=how.name,
        interpret=how.interpret,
        **_versions.with_cost(api.kernel, how.cost),
    )(*arrays)


# Scratch


def operand(*shape: int, dtype: Any = jnp.bfloat16, swizzle: int = SWIZZLE) -> Any:
    """Shared memory for operands of products; the last two axes are rows and columns of the tile.

    Args:
      swizzle: in bytes: 128, 64 or 32, the same for both operands. What a product sums over is a multiple of it.
    """
    api = plgpu()
    width = swizzle // jnp.dtype(dtype).itemsize
    return api.SMEM(shape, dtype, transforms=(api.TilingTransform((8, width)), api.SwizzleTransform(swizzle)))


def plain(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Shared memory as it comes: rows of numbers."""
    return plgpu().SMEM(shape, dtype)


def barriers(count: int, arrivals: int = 1) -> Any:
    """`count` barriers that open after `arrivals` copies or `arrive`s each."""
    return plgpu().Barrier(num_arrivals=arrivals, num_barriers=count)


# Copies and barriers


def fetch(source: Any, target: Any, barrier: Any) -> None:
    """Starts a copy from device to shared memory; one arrival at `barrier` when it is there."""
    plgpu().copy_gmem_to_smem(source, target, barrier)


def wait(barrier: Any) -> None:
    plgpu().barrier_wait(barrier)


def arrive(barrier: Any) -> None:
    plgpu().barrier_arrive(barrier)


def drain(barriers: Any, steps: Any, *, when: Any = True, behind: Any = 0) -> None:
    """In the simulator, waits for the last completion of each of some barriers that took turns in a loop.

    Nobody needs that. But in the simulator of JAX 0.11 who waits for a barrier must see all of its completions.

    Args:
      steps: of the loop, which began with the `behind`-th barrier.
      when: whether this warpgroup is one that waited.
    """
    if _interpret.mode() is False:
        return
    turns = barriers.shape[0]
    for back in range(turns):
        last = jax.lax.rem(behind + steps - 1 - back, jnp.int32(turns))
        pl.when(when & (back < steps))(functools.partial(wait, barriers.at[last]))


def publish() -> None:
    """Makes this warpgroup's stores to shared memory visible to its own products and copies."""
    plgpu().commit_smem()


def store(*pairs: tuple[Any, Any]) -> None:
    """Copies (shared memory, device memory) pairs out and waits until they are read."""
    api = plgpu()
    api.commit_smem()
    for source, target in pairs:
        api.copy_smem_to_gmem(source, target)
    api.wait_smem_to_gmem(0)


def begin_store(source: Any, target: Any) -> None:
    """Starts a copy from shared to device memory, of what is published."""
    plgpu().copy_smem_to_gmem(source, target)


def settle(*, read: bool = False) -> None:
    """Waits until what `begin_store` copies has arrived; with `read` only until it may be overwritten."""
    plgpu().wait_smem_to_gmem(0, wait_read_only=read)


def registers(count: int, *, more: bool) -> None:
    """Sets the registers of a thread of this warpgroup; a multiple of 8. Blocks of one warpgroup must not ask."""
    plgpu().set_max_registers(count, action="increase" if more else "decrease")


# Tiles in registers


def turned(ref: Any) -> Any:
    """A shared-memory tile read with rows and columns exchanged."""
    return ref.transpose((1, 0))


def laid(value: jax.Array) -> jax.Array:
    """Says that a tile lies as sums of products do; the compiler would search for long."""
    return plgpu().layout_cast(value, plgpu().Layout.WGMMA)


def get(ref: Any) -> jax.Array:
    """A tile from memory into registers, as sums of products lie there."""
    return plgpu().load(ref, layout=plgpu().Layout.WGMMA, optimized=False)


def put(ref: Any, value: jax.Array) -> None:
    """A tile from registers straight to memory."""
    _versions.store(plgpu(), ref, laid(value))


def put_rows(ref: Any, value: jax.Array) -> None:
    """One number for each row of a tile, from registers straight to device memory."""
    _versions.store(plgpu(), ref, value)


def places(shape: tuple[int, ...], axis: int) -> jax.Array:
    """The number of the row (axis 0) or column of every entry of a tile."""
    return plgpu().broadcasted_iota(jnp.int32, shape, axis, layout=plgpu().Layout.WGMMA)


def zeros(rows: int, columns: int) -> jax.Array:
    """f32 sums of products."""
    return laid(jnp.zeros((rows, columns), jnp.float32))


def per_row(value: float, count: int = ROWS) -> jax.Array:
    """One f32 number for each row of a tile."""
    return plgpu().layout_cast(jnp.full((count,), value, jnp.float32), plgpu().Layout.WGMMA.reduce(1))


def load_rows(ref: Any) -> jax.Array:
    """One number for each row of a tile, from memory."""
    return plgpu().load(ref, layout=plgpu().Layout.WGMMA.reduce(1), optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """One number for each column of a tile, from memory."""
    return plgpu().load(ref, layout=plgpu().Layout.WGMMA.reduce(0), optimized=False)


def down(x: jax.Array, columns: int) -> jax.Array:
    """A number per row, repeated over `columns`."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def across(x: jax.Array, rows: int) -> jax.Array:
    """A number per column, repeated over `rows`."""
    return jax.lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def product(a: Any, b: Any, done: Callable[[], None] | None = None) -> jax.Array:
    """a @ b in f32: refs of shared memory [64, k] and [k, n]; `done` is called when both have been read."""
    api = plgpu()

    def multiply(acc: Any) -> jax.Array:
        api.wgmma(acc, a, b)
        return acc[...]

    result = pl.run_scoped(multiply, api.ACC((a.shape[0], b.shape[1]), jnp.float32))
    if done is not None:
        done()
    return result


def add_product(acc: jax.Array, a: jax.Array, b: Any, stage: Any = None) -> jax.Array:
    """acc + a @ b with `a` in registers; both have been read on return.

    Args:
      stage: shared memory of `a`'s shape through which `a` goes instead, as the simulator wants it. The sums are
        then added outside of the tensor cores.
    """
    api = plgpu()
    if stage is not None:
        stage[...] = a
        api.commit_smem()
        return acc + product(stage, b)
    return pl.run_state(lambda ref: api.wgmma(ref, a, b))(api.ACC.init(acc))


def accumulate(acc: jax.Array, a: Any, b: Any, *, staged: bool) -> jax.Array:
    """acc + a @ b of refs of shared memory, in place; both have been read on return.

    Args:
      staged: added outside of the tensor cores, as the simulator has no sums that outlive a product.
    """
    if staged:
        return acc + product(a, b)
    api = plgpu()
    return pl.run_state(lambda ref: api.wgmma(ref, a, b))(api.ACC.init(acc))


def products(*pairs: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """a @ b in f32 of each pair of refs of shared memory, all under way at once; all have been read on return."""
    api = plgpu()

    def multiply(*sums: Any) -> tuple[jax.Array, ...]:
        for acc, (a, b) in zip(sums, pairs, strict=True):
            api.wgmma(acc, a, b)
        return tuple(acc[...] for acc in sums)

    return pl.run_scoped(multiply, *(api.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def add_products(*terms: tuple[jax.Array, Any, Any], staged: bool) -> tuple[jax.Array, ...]:
    """acc + a @ b of each (acc, a, b), all under way at once and in place; all have been read on return.

    Args:
      staged: added outside of the tensor cores, as the simulator has no sums that outlive a product.
    """
    api = plgpu()
    if staged:
        sums = products(*((a, b) for _, a, b in terms))
        return tuple(acc + x for (acc, _, _), x in zip(terms, sums, strict=True))

    def multiply(sums: Any) -> None:
        for acc, (_, a, b) in zip(sums, terms, strict=True):
            api.wgmma(acc, a, b)

    return pl.run_state(multiply)(tuple(api.ACC.init(acc) for acc, _, _ in terms))
