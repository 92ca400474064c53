"""Random argument sets at the Python boundary of the kernels: valid ones are executed, others are refused by name.

    python tests/kernels/soak.py --cases 1000000 --seed 0

A set is a tree: a call, whose arguments are arrays, numbers, lists, or calls again (a batch, the weights of a layer).
KERNELS has one entry a kernel, which draws a valid tree; a mutation then changes one place of it. Every array is memory of
its own and exactly as large as it must be, so that AddressSanitizer (`make sanitize`) sees the first byte too far.
"""

import argparse
import functools
import math
import mmap
import multiprocessing
import os
import random
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from specmoeoff.kernels import cpu

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
PAGE = cpu.PAGE_TOKENS
VALID_SHARE = 0.4
SKIP = object()
NOISE = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
NOISE[::997], NOISE[1::997], NOISE[2::1997] = np.nan, np.inf, -1e38
NOISE_OF = {np.float32: NOISE, np.uint16: NOISE.view(np.uint16)[1::2].copy(), np.uint8: NOISE.view(np.uint8)}
NOISE_OF[np.int32] = NOISE.view(np.int32)


@dataclass
class Call:
    """What will be called, and with what."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self) -> Any:
        return self.function(**{name: _run(value) for name, value in self.arguments.items()})


def _run(value: Any) -> Any:
    if isinstance(value, Call):
        return value.run()
    return [_run(item) for item in value] if isinstance(value, list) else value


class Kernels(cpu.Kernels):
    """Takes new scratch memory for every call, no more than it said."""

    def _scratch_of(self, n_bytes: int) -> int:
        self._own = np.empty(n_bytes + 63, np.uint8)
        address = int(self._own.ctypes.data)
        return address + -address % 64


class Draw(random.Random):
    """One case's random choices. `n_pages`, `end`: of the batch drawn last."""

    n_pages = end = 0

    def rows(self) -> int:
        return self.choice((1, 1, 2, 3, 5, 6, 7, 8, 13, 49))

    def even(self) -> int:
        return 2 * self.choice((1, 2, 7, 8, 16, 31, 32, 33))

    def vectors(self) -> int:
        return 16 * self.randint(1, 4)

    def array(self, dtype: type, *shape: int) -> np.ndarray:
        """Noise, NaN among it; bf16 sometimes begins between two words."""
        n = 1
        for size in shape:
            n *= size
        noise = NOISE_OF[dtype]
        skip = 2 // noise.itemsize if dtype in (np.uint8, np.uint16) and self.random() < 0.1 else 0
        first = self.randrange(len(noise) - n - skip)
        return noise[first : first + n + skip].copy()[skip:].reshape(shape)

    def packed(self, n_out: int, n_in: int, precision: str = "bf16") -> np.ndarray:
        n_bytes = cpu.packed_linear_bytes(n_out, n_in, precision)
        return (
            self.array(np.float32, n_bytes // 4).view(np.uint8)
            if precision == "fp32"
            else self.array(np.uint8, n_bytes)
        )

    def expert(self, hidden: int, intermediate: int, precision: str = "bf16") -> np.ndarray:
        n_bytes = cpu.packed_expert_bytes(hidden, intermediate, precision)
        if precision == "fp32":
            return self.array(np.float32, n_bytes // 4).view(np.uint8)
        return self.array(np.uint8, n_bytes)

    def kernels(self, precision: str = "bf16") -> Kernels:
        n_threads = 1 if self.random() < 0.97 else self.randint(2, 3)
        return _kernels(n_threads, self.choice(cpu.supported_isas()), precision)

    def any_shape(self, n_experts: int) -> Call:
        """A shape that half of the time has what only some models have."""
        shape = self.shape(n_experts)
        if self.random() < 0.5:
            return shape
        sizes, head_dim = shape.arguments, shape.arguments["head_dim"]
        sizes |= {
            "kv_format": self.choice(cpu.KV_FORMATS),
            "precision": self.choice(("bf16", "fp32")),
            "v_head_dim": 16 * self.randint(1, 3),
        }
        sizes |= {"window": self.choice((0, 1, 3, PAGE, 100)), "norm_heads": self.random() < 0.5, "clip_qkv": 0.5}
        sizes |= {"shared_intermediate": self.choice((0, 16, 48)), "rotary_dim": self.choice((0, 2, head_dim))}
        sizes |= {"sigmoid_router": self.random() < 0.5, "renormalise": self.random() < 0.5}
        if self.random() < 0.5:
            sizes |= {"n_kv_heads": sizes["n_heads"], "kv_latent": 32, "q_latent": self.choice((0, 16))}
        if n_experts == 4 and sizes["n_active"] <= 2:
            sizes |= {"n_groups": 2, "n_active_groups": self.randint(1, 2), "group_best": self.randint(1, 2)}
        return shape

    def shape(self, n_experts: int) -> Call:
        kv_heads = self.randint(1, 2)
        sizes = {
            "hidden": self.vectors(),
            "n_heads": kv_heads * self.randint(1, 3),
            "n_kv_heads": kv_heads,
            "head_dim": self.choices((16, 32, 48, 64, 80, 256), (60, 10, 10, 10, 10, 1))[0],
            "intermediate": self.even(),
            "n_experts": n_experts,
            "n_active": self.randint(1, min(n_experts, 3)),
        }
        return Call(cpu.LayerShape, {**sizes, "rms_eps": 1e-5})

    def tree(self, row_start: np.ndarray) -> np.ndarray:
        own = [1 << j for n in np.diff(row_start) for j in range(n)]
        return np.array([bit | self.getrandbits(64) for bit in own], np.uint64)

    def batch(self, trees: bool = False) -> Call:
        counts = [self.choice((1, 1, 1, 2, 5, 9)) for _ in range(self.randint(1, 3))]
        firsts = [self.choice((0, 1, 7, PAGE - 1, PAGE, PAGE + 1, self.randrange(3 * PAGE))) for _ in counts]
        ends = [c + f for c, f in zip(counts, firsts, strict=True)]
        self.end, width = max(ends), -(-max(ends) // PAGE) + self.randint(0, 1)
        self.n_pages = width * len(counts) + self.randint(0, 1)
        table = np.array(self.sample(range(self.n_pages), width * len(counts)), np.int32).reshape(-1, width)
        row_start = np.array([0, *np.cumsum(counts)], np.int32)
        arrays = {"row_start": row_start, "first_position": np.array(firsts, np.int32), "page_table": table}
        arrays |= {"tree": self.tree(row_start)} if trees and self.random() < 0.5 else {}
        return Call(cpu.Batch, arrays)

    def perhaps(self, dtype: type, *shape: int) -> np.ndarray | None:
        """Of an argument that may be left out."""
        return self.array(dtype, *shape) if self.random() < 0.8 else None

    def layer(self, shape: Call) -> Call:
        s = cpu.LayerShape(**shape.arguments)
        n_positions, half = self.end + self.randint(0, 2), s.rotary_dim // 2
        arguments: dict[str, Any] = {"shape": shape, "router": None}
        optional = {"shared_weight", "o_bias", "sinks", "qkv_bias", "router_bias", "choice_bias"}
        for name, (n_out, n_in) in s.matrices.items():
            if name != "router" or s.n_experts > 1:
                arguments[name] = self.packed(n_out, n_in, s.precision)
        for name, n in s.vectors.items():
            arguments[name] = self.array(np.float32, n)
        absent = {name for name in sorted(optional) if self.random() < 0.5}
        absent |= {"q_norm", "k_norm"} if self.random() < 0.5 else set()
        arguments = {name: value for name, value in arguments.items() if name not in absent}
        arguments["input_norm"] = self.perhaps(np.float32, s.hidden)
        arguments |= {name: self.array(np.float32, n_positions, half) for name in ("cosines", "sines")}
        return Call(cpu.LayerWeights, arguments)

    def kv_shape(self) -> Call:
        kv_heads = self.randint(1, 2)
        sizes = {
            "n_heads": kv_heads * self.randint(1, 3),
            "n_kv_heads": kv_heads,
            "format": self.choice(cpu.KV_FORMATS),
        }
        dims = self.choices(((16, 16), (64, 64), (80, 80), (48, 32), (192, 128), (576, 512)), (60, 10, 10, 10, 5, 1))[0]
        sizes |= {"key_dim": dims[0], "value_dim": dims[1]}
        return Call(cpu.KVShape, sizes | ({"window": self.choice((1, 3, PAGE))} if self.random() < 0.3 else {}))

    def pages(self, shape: cpu.KVShape, *layers: int) -> dict[str, np.ndarray]:
        n = math.prod((*layers, self.n_pages, shape.page_bytes // 4))
        noise = np.resize(self.array(np.float32, min(n, 1 << 16)), n)
        return {"pages": noise.view(np.uint8).reshape(*layers, self.n_pages, shape.page_bytes)}


_kernels = functools.cache(Kernels)


# ---- valid sets: one function a kernel ------------------------------------------------------------------------------------


def kernels(d: Draw) -> Call:
    return Call(cpu.Kernels, {"n_threads": d.randint(1, 3)})


def scratch_bytes(d: Draw) -> Call:
    return Call(
        cpu.scratch_bytes,
        {"shape": d.shape(4), "max_rows": d.rows(), "context_tokens": d.randint(1, 9000), "n_threads": d.randint(1, 3)},
    )


def pack_linear(d: Draw) -> Call:
    n_out, n_in = d.randint(1, 130), d.even()
    return Call(cpu.pack_linear, {"weight": d.array(np.uint16, n_out, n_in), "out": d.packed(n_out, n_in)})


def pack_expert(d: Draw) -> Call:
    hidden, intermediate = d.even(), d.even()
    weights = {name: d.array(np.uint16, intermediate, hidden) for name in ("gate", "up")}
    down = d.array(np.uint16, hidden, intermediate)
    return Call(cpu.pack_expert, {**weights, "down": down, "out": d.expert(hidden, intermediate)})


def linear(d: Draw) -> Call:
    m, n_in, n_out = d.rows(), d.even(), d.randint(1, 130)
    arrays = {"x": d.array(np.uint16, m, n_in), "packed": d.packed(n_out, n_in), "out": d.array(np.float32, m, n_out)}
    return Call(d.kernels().linear, {**arrays, "n_out": n_out})


def rmsnorm(d: Draw) -> Call:
    m, n = d.rows(), d.vectors()
    arrays = {"x": d.array(np.float32, m, n), "weight": d.perhaps(np.float32, n), "out": d.array(np.uint16, m, n)}
    return Call(d.kernels().rmsnorm, {**arrays, "eps": 1e-5})


def experts(d: Draw) -> Call:
    m, n_active, hidden, intermediate = d.rows(), d.randint(1, 2), d.even(), d.even()
    slots = np.array(d.sample(range(m * n_active), d.randint(0, m * n_active)), np.int32)
    n_experts = d.randint(1, 3)
    arguments = {
        "normed": d.array(np.uint16, m, hidden),
        "experts": [d.expert(hidden, intermediate) for _ in range(n_experts)],
        "row_slots": [part.copy() for part in np.array_split(slots, n_experts)],
        "out": d.array(np.float32, m * n_active, hidden),
        "intermediate": intermediate,
    }
    return Call(d.kernels().experts, arguments)


def combine(d: Draw) -> Call:
    m, hidden, n_active = d.rows(), d.vectors(), d.randint(1, 3)
    arrays = {
        "x": d.array(np.float32, m, hidden),
        "expert_out": d.array(np.float32, m * n_active, hidden),
        "expert_weight": d.array(np.float32, m, n_active),
    }
    return Call(d.kernels().combine, arrays)


def head_argmax(d: Draw) -> Call:
    m, hidden, vocab = d.rows(), d.vectors(), d.randint(1, 200)
    arrays = {
        "x": d.array(np.float32, m, hidden),
        "norm": d.perhaps(np.float32, hidden),
        "packed": d.packed(vocab, hidden),
        "out": d.array(np.int32, m),
        "logits": d.array(np.float32, m, vocab) if d.random() < 0.5 else None,
    }
    return Call(d.kernels().head_argmax, {**arrays, "vocab": vocab, "eps": 1e-5})


def verify_attention(d: Draw) -> Call:
    shape, batch = d.kv_shape(), d.batch(trees=True)
    s, m = shape.run(), int(batch.arguments["row_start"][-1])
    arrays = {
        **d.pages(s),
        "query": d.array(s.query_dtype, m, s.n_heads * s.key_dim),
        "out": d.array(d.choice((np.uint16, np.float32)), m, s.n_heads * s.value_dim),
        "sinks": d.array(np.float32, s.n_heads) if d.random() < 0.5 else None,
        "log_sums": d.array(np.float32, m, s.n_heads) if d.random() < 0.5 else None,
    }
    return Call(d.kernels().verify_attention, {"shape": shape, "batch": batch, **arrays})


def append_kv(d: Draw) -> Call:
    shape, batch = d.kv_shape(), d.batch(trees=True)
    s, m = shape.run(), int(batch.arguments["row_start"][-1])
    arrays = {
        **d.pages(s),
        "keys": d.array(np.float32, m, s.n_kv_heads * s.key_dim),
        "values": d.array(np.float32, m, s.n_kv_heads * s.value_dim),
    }
    return Call(d.kernels().append_kv, {"shape": shape, "batch": batch, **arrays})


def _rows_of(d: Draw, shape: dict[str, Any], batch: Call) -> dict[str, np.ndarray]:
    m = int(batch.arguments["row_start"][-1])
    return {
        "x": d.array(np.float32, m, shape["hidden"]),
        "normed": d.array(cpu.ACTIVATION[shape.get("precision", "bf16")], m, shape["hidden"]),
        "expert_index": d.array(np.int32, m, shape["n_active"]),
        "expert_weight": d.array(np.float32, m, shape["n_active"]),
    }


def attention_block(d: Draw) -> Call:
    shape, batch = d.any_shape(d.choice((1, 4, 65))), d.batch()
    arrays = {**d.pages(shape.run().kv), **_rows_of(d, shape.arguments, batch)}
    return Call(
        d.kernels(shape.arguments.get("precision", "bf16")).attention_block,
        {"layer": d.layer(shape), "batch": batch, **arrays},
    )


def _table(d: Draw, shape: Call, complete: bool) -> Call:
    s = shape.arguments
    sizes = s["hidden"], s["intermediate"], s.get("precision", "bf16")
    # One at least, so that something is of `intermediate`'s size.
    present = d.randrange(s["n_experts"])
    packed = [d.expert(*sizes) if complete or e == present or d.random() < 0.7 else None for e in range(s["n_experts"])]
    width = 2 * s["intermediate"] + s["hidden"]
    biases = [d.array(np.float32, width) for _ in packed] if d.random() < 0.3 else None
    return Call(cpu.ExpertTable, {"shape": shape, "packed": packed, "biases": biases})


def _outputs(d: Draw, shape: Call, m: int) -> dict[str, np.ndarray]:
    n_slots = m * shape.arguments["n_active"]
    return {"expert_out": d.array(np.float32, n_slots, shape.arguments["hidden"]), "slots": d.array(np.int32, n_slots)}


def feed_forward(d: Draw) -> Call:
    shape, batch = d.any_shape(d.choice((1, 4, 65))), d.batch()
    arrays = _rows_of(d, shape.arguments, batch)
    index, s = arrays["expert_index"], shape.arguments
    index[:] = np.random.default_rng(d.randrange(1 << 30)).integers(0, s["n_experts"], index.shape)
    return Call(
        d.kernels(s.get("precision", "bf16")).feed_forward,
        {"table": _table(d, shape, False), **arrays, **_outputs(d, shape, len(index))},
    )


def layers(d: Draw) -> Call:
    shape, batches = d.any_shape(d.choice((1, 4))), [d.batch()]
    n = d.randint(1, 2)
    stack = {
        "layers": [d.layer(shape) for _ in range(n)],
        "experts": [_table(d, shape, True) if i == 0 or d.random() < 0.9 else None for i in range(n)],
    }
    arrays = {**d.pages(shape.run().kv, n), **_rows_of(d, shape.arguments, batches[0])}
    return Call(
        d.kernels(shape.arguments.get("precision", "bf16")).layers,
        {
            "stack": Call(cpu.LayerStack, stack),
            "batches": batches,
            **arrays,
            **_outputs(d, shape, len(arrays["x"])),
        },
    )


@dataclass(frozen=True)
class Kernel:
    """`writes`: arguments that C changes. `free`: sizes that may change alone. `optional`: arrays that may be left out."""

    draw: Callable[[Draw], Call]
    writes: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_BLOCK, _SPACE = ("x", "pages", "normed", "expert_index", "expert_weight"), ("expert_out", "slots")
_NOT_OF_EXPERTS = ("n_heads", "n_kv_heads", "head_dim")
KERNELS = {
    "Kernels": Kernel(kernels, free=("n_threads",)),
    "scratch_bytes": Kernel(
        scratch_bytes,
        free=(
            "hidden",
            "n_heads",
            "head_dim",
            "intermediate",
            "n_experts",
            "n_active",
            "max_rows",
            "context_tokens",
            "n_threads",
        ),
    ),
    "pack_linear": Kernel(pack_linear, ("out",), free=("weight",)),
    "pack_expert": Kernel(pack_expert, ("out",)),
    "linear": Kernel(linear, ("out",)),
    "rmsnorm": Kernel(rmsnorm, ("out",), optional=("weight",)),
    "experts": Kernel(experts, ("out",), free=("normed", "out", "row_slots")),
    "combine": Kernel(combine, ("x",)),
    "head_argmax": Kernel(head_argmax, ("out", "logits"), free=("vocab", "logits")),
    "append_kv": Kernel(append_kv, ("pages",), free=("n_heads",)),
    "verify_attention": Kernel(verify_attention, ("out", "log_sums")),
    "attention_block": Kernel(attention_block, _BLOCK, free=("intermediate",)),
    "feed_forward": Kernel(feed_forward, ("x", *_SPACE), free=_NOT_OF_EXPERTS, optional=("packed", "biases")),
    "layers": Kernel(layers, (*_BLOCK, *_SPACE), optional=("packed", "biases", "experts")),
}

# ---- mutations: (draw, value, its siblings) -> another value, or SKIP where there is none ----------------------------------


def _resized(d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    axis = d.randrange(a.ndim)
    n = a.shape[axis]
    return np.take(a, range(n + 1) if d.random() < 0.5 else range(n - 1), axis, mode="clip")


def _strided(d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    axis = d.randrange(a.ndim)
    b = np.repeat(a, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    return SKIP if b.flags.c_contiguous else b


def _transposed(_d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    b = np.asfortranarray(a)
    return SKIP if b.flags.c_contiguous else b


def _reversed(d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    b = np.flip(a, d.randrange(a.ndim))
    return SKIP if b.flags.c_contiguous else b


def _misaligned(_d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    return SKIP if a.size == 0 else buffer[1:].view(a.dtype).reshape(a.shape)


def _foreign_order(_d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    return SKIP if a.itemsize == 1 else a.view(a.dtype.newbyteorder())


def _read_only(_d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    a.flags.writeable = False
    return a


def _shared(d: Draw, a: np.ndarray, siblings: dict[str, Any]) -> Any:
    others = [name for name, b in siblings.items() if isinstance(b, np.ndarray) and b is not a]
    if not others:
        return SKIP
    other = siblings[d.choice(others)]
    offset = 8 * d.randrange(-(-a.nbytes // 8))
    buffer = np.zeros(max(a.nbytes, offset + other.nbytes), np.uint8)
    name = next(name for name, b in siblings.items() if b is other)
    siblings[name] = buffer[offset : offset + other.nbytes].view(other.dtype).reshape(other.shape)
    return buffer[: a.nbytes].view(a.dtype).reshape(a.shape)


def _with(a: np.ndarray, index: Any, value: int) -> np.ndarray:
    a = a.copy()
    a[index] = value
    return a


def _any(d: Draw, a: np.ndarray) -> tuple[int, ...]:
    return tuple(d.randrange(n) for n in a.shape)


def _used(siblings: dict[str, Any]) -> list[tuple[int, int]]:
    ends = siblings["first_position"] + np.diff(siblings["row_start"])
    return [(r, c) for r, end in enumerate(ends) for c in range(-(-int(end) // PAGE))]


def _page_twice(d: Draw, a: np.ndarray, siblings: dict[str, Any]) -> Any:
    used = _used(siblings)
    if len(used) < 2:
        return SKIP
    one, other = d.sample(used, 2)
    return _with(a, one, int(a[other]))


def _slot_twice(d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    return np.append(a, a[:1]) if len(a) else SKIP


def _empty_request(d: Draw, a: np.ndarray, _: dict[str, Any]) -> Any:
    i = d.randrange(1, len(a))
    return _with(a, i, int(a[i - 1]) - d.choice((0, 0, 1)))


def _few_positions(d: Draw, a: np.ndarray, siblings: dict[str, Any]) -> Any:
    siblings["sines"] = siblings["sines"][: d.end - 1].copy()
    return a[: d.end - 1].copy()


def _blind(d: Draw, a: np.ndarray, siblings: dict[str, Any]) -> Any:
    row = d.randrange(len(a))
    own = row - siblings["row_start"][np.searchsorted(siblings["row_start"], row, "right") - 1]
    return _with(a, row, int(a[row]) & ~(1 << int(own)))


Mutation = Callable[[Draw, Any, dict[str, Any]], Any]
NOTHING: dict[str, Mutation] = {"nothing": lambda d, v, s: None, "another object": lambda d, v, s: object()}
# Where sizes contradict each other, the message may name either argument.
RELATED = {"resized", "emptied", "other size", "one fewer", "too few positions", "too few pages", "at int32's end"}
ARRAYS: dict[str, Mutation] = {
    **NOTHING,
    "a list": lambda d, a, s: [1],
    "other sign": lambda d, a, s: a.view({"u": "i", "i": "u", "f": "i"}[a.dtype.kind] + str(a.itemsize)),
    "wider dtype": lambda d, a, s: a.astype(np.float64),
    "foreign byte order": _foreign_order,
    "one more axis": lambda d, a, s: np.expand_dims(a, d.randint(0, a.ndim)),
    "one fewer axis": lambda d, a, s: a.reshape(-1) if a.ndim > 1 else a.dtype.type(0),
    "resized": _resized,
    "emptied": lambda d, a, s: np.take(a, range(0), d.randrange(a.ndim)),
}
LAYOUTS: dict[str, Mutation] = {
    "strided": _strided,
    "transposed": _transposed,
    "reversed": _reversed,
    "misaligned": _misaligned,
}
WRITTEN: dict[str, Mutation] = {"read-only": _read_only, "shared memory": _shared}
SIZES: dict[str, Mutation] = {
    **NOTHING,
    "a fraction": lambda d, n, s: n + 0.5,
    "a float": lambda d, n, s: float(n),
    "zero": lambda d, n, s: 0,
    "negative": lambda d, n, s: d.choice((-n, -1, INT32_MIN)),
    "int32's end": lambda d, n, s: INT32_MAX - d.choice((0, 63)),
    "beyond int32": lambda d, n, s: n + d.choice((1 << 31, 1 << 32, 1 << 64)),
    "other size": lambda d, n, s: n + 64,
}
REALS: dict[str, Mutation] = {
    **NOTHING,
    "a text": lambda d, x, s: "0",
    "not finite": lambda d, x, s: d.choice((np.nan, np.inf, -np.inf)),
    "negative": lambda d, x, s: -1e-5,
}
TEXTS: dict[str, Mutation] = {**NOTHING, "other text": lambda d, v, s: v + "0", "a number": lambda d, v, s: 1}
LISTS: dict[str, Mutation] = {**NOTHING, "one fewer": lambda d, v, s: v[:-1]}
# Mutations of one argument, whatever the kernel.
OF_ARGUMENT: dict[str, dict[str, Mutation]] = {
    "row_start": {
        "not from zero": lambda d, a, s: _with(a, 0, d.choice((1, -1))),
        "empty or falling": _empty_request,
        "at int32's end": lambda d, a, s: _with(a, -1, d.choice((INT32_MAX, INT32_MIN))),
    },
    "first_position": {
        "negative": lambda d, a, s: _with(a, _any(d, a), d.choice((-1, INT32_MIN))),
        "at int32's end": lambda d, a, s: _with(a, _any(d, a), INT32_MAX - d.choice((0, 1, 64))),
    },
    "page_table": {
        "negative": lambda d, a, s: _with(a, _any(d, a), d.choice((-1, INT32_MIN))),
        "out of range": lambda d, a, s: _with(a, _any(d, a), d.choice((d.n_pages, INT32_MAX))),
        "a page twice": _page_twice,
        "too few pages": lambda d, a, s: a[:, : -(-d.end // PAGE) - 1].copy(),
    },
    "row_slots": {
        "negative": lambda d, a, s: np.append(a, np.int32(-1)),
        "out of range": lambda d, a, s: np.append(a, np.int32(d.choice((1 << 20, INT32_MAX)))),
        "a slot twice": _slot_twice,
    },
    "expert_index": {
        "out of range": lambda d, a, s: (
            _with(a, _any(d, a), d.choice((-1, 65, INT32_MAX, INT32_MIN))) if "table" in s else SKIP
        )
    },
    "cosines": {"too few positions": _few_positions},
    # A layer with a shared expert may do without a router, of however many experts.
    "router": {"nothing": lambda d, w, s: SKIP if s["shape"].arguments.get("shared_intermediate") else None},
    "n_experts": {"other size": lambda d, n, s: SKIP if s.get("shared_intermediate") else n + 64},
    "pages": {"other page size": lambda d, a, s: a[..., :-4].copy()},
    "tree": {"blind to itself": _blind},
}
OPTIONAL = {"input_norm", "norm", "logits", "sinks", "log_sums", "tree", "kv_format"}
OPTIONAL |= {"q_norm", "k_norm", "shared_weight", "o_bias", "qkv_bias", "router_bias", "choice_bias"}
OPTIONAL_SIZES = {"v_head_dim", "rotary_dim", "q_latent", "kv_latent", "shared_intermediate", "window"}
OPTIONAL_SIZES |= {"n_groups", "n_active_groups", "group_best"}
COPIED = {"row_start", "first_position", "page_table", "tree"}  # any layout is welcome


def mutations_of(name: str, value: Any, kernel: Kernel, in_list: bool) -> dict[str, Mutation]:
    """All that make the set invalid by changing this value."""
    if value is None or isinstance(value, bool) or name == "clip_qkv":
        return {}
    if isinstance(value, np.ndarray):
        found = ARRAYS | ({} if name in COPIED else LAYOUTS)
        found |= WRITTEN if name in kernel.writes and not in_list else {}
    elif isinstance(value, list):
        found = LISTS
    elif isinstance(value, Call):
        found = NOTHING
    else:
        found = TEXTS if isinstance(value, str) else SIZES if isinstance(value, int) else REALS
    if not isinstance(value, list):
        found = found | OF_ARGUMENT.get(name, {})
    if name in OPTIONAL_SIZES:
        found = {mutation: SIZES[mutation] for mutation in ("a fraction", "beyond int32", "another object")}
    free = {"other size"} if name in kernel.free else set()
    if isinstance(value, np.ndarray) and (name in kernel.free or name == "page_table"):
        free = {"resized", "emptied"}
    if name in OPTIONAL or name in kernel.optional:
        free |= {"nothing"}
    if name == "pages":
        free |= {"resized"}
    return {mutation: change for mutation, change in found.items() if mutation not in free}


def places(call: Call) -> Iterator[tuple[Any, Any, str]]:
    """Of every value in the tree: what holds it, its key there, its argument's name."""
    for name, value in call.arguments.items():
        yield call.arguments, name, name
        for i, item in enumerate(value if isinstance(value, list) else ()):
            yield value, i, name
            if isinstance(item, Call):
                yield from places(item)
        if isinstance(value, Call):
            yield from places(value)


# ---- one case, and many ---------------------------------------------------------------------------------------------------


def _mutate(d: Draw, call: Call, kernel: Kernel) -> tuple[str, str]:
    """Change one value in the tree: how, and which argument's."""
    anywhere = list(places(call))
    special = [place for place in anywhere if place[2] in OF_ARGUMENT]
    while True:
        holder, key, argument = d.choice(special if special and d.random() < 0.3 else anywhere)
        known = mutations_of(argument, holder[key], kernel, isinstance(holder, list))
        if known:
            mutation, change = d.choice(list(known.items()))
            changed = change(d, holder[key], holder)
            if changed is not SKIP:
                holder[key] = changed
                return mutation, argument


def case(seed: int, index: int) -> tuple[str, str, str, str | None]:
    """Kernel, mutation ("valid": none), the argument mutated, and what was wrong with the outcome."""
    d = Draw(seed << 40 | index)
    name, kernel = d.choice(list(KERNELS.items()))
    call = kernel.draw(d)
    names = {n for _, _, n in places(call)}
    mutation, argument = ("valid", "") if d.random() < VALID_SHARE else _mutate(d, call, kernel)
    return name, mutation, argument, _wrong(call, mutation, argument, names)


def _wrong(call: Call, mutation: str, argument: str, names: set[str]) -> str | None:
    try:
        call.run()
    except (TypeError, ValueError) as error:
        if mutation == "valid":
            return f"refused: {error}"
        wanted = names if mutation in RELATED else {argument}
        named = re.search(rf"\b({'|'.join(wanted)})\b", str(error))
        return None if named else f"not named in: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if mutation == "valid" else "accepted"


def _work(seed: int, job: int, jobs: int, cases: int, at: mmap.mmap, results: Connection) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    for index in range(job, cases, jobs):
        struct.pack_into("q", at, 8 * job, index)
        name, mutation, argument, wrong = case(seed, index)
        counts[name, mutation] += 1
        if wrong:
            failures.append((index, f"{name}, {argument or 'no argument'} {mutation}: {wrong}"))
    results.send((counts, failures))


HUNG_S = 30.0  # no set takes a tenth of a second


def soak(seed: int, cases: int, jobs: int, console: Console) -> tuple[Counter[tuple[str, str]], list[tuple[int, str]]]:
    """Counts by kernel and mutation, and the wrong outcomes with their case.

    A crash ends only its own process; one that stays at the same set for HUNG_S seconds is ended here.
    """
    at = mmap.mmap(-1, 8 * jobs)
    context = multiprocessing.get_context("fork")
    workers = []
    for job in range(jobs):
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(seed, job, jobs, cases, at, send))
        worker.start()
        send.close()
        workers.append((worker, receive))
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[tuple[int, str]] = []
    began = told = time.monotonic()
    waiting = dict(enumerate(workers))
    moved = dict.fromkeys(waiting, (-1, began))
    while waiting:
        for job, (worker, receive) in list(waiting.items()):
            if not receive.poll(0.1):
                index, now = struct.unpack_from("q", at, 8 * job)[0], time.monotonic()
                if index != moved[job][0]:
                    moved[job] = index, now
                elif now - moved[job][1] > HUNG_S:
                    worker.kill()
                continue
            del waiting[job]
            try:
                its_counts, its_failures = receive.recv()
                counts += its_counts
                failures += its_failures
            except EOFError:
                worker.join()
                failures.append((struct.unpack_from("q", at, 8 * job)[0], f"the process ended with {worker.exitcode}"))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            done = sum(struct.unpack(f"{jobs}q", at[:])) // jobs
            console.print(f"{done:,} of {cases:,} sets, {done / (told - began):,.0f}/s")
    return counts, failures


def _print(console: Console, counts: Counter[tuple[str, str]]) -> None:
    for axis, title in enumerate(("kernel", "mutation")):
        table = Table(title, "valid", "refused")
        for key in sorted({pair[axis] for pair in counts}, key=str.lower):
            chosen = {pair: n for pair, n in counts.items() if pair[axis] == key}
            valid = sum(n for pair, n in chosen.items() if pair[1] == "valid")
            table.add_row(key, f"{valid:,}", f"{sum(chosen.values()) - valid:,}")
        console.print(table)


def main() -> int:
    """0: every set was treated as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--replay", type=int, metavar="CASE", help="one case, in this process")
    options = parser.parse_args()
    if options.replay is not None:
        print(*case(options.seed, options.replay), sep=" | ")
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than CPUs would spin
    console = Console()
    began = time.monotonic()
    counts, failures = soak(options.seed, options.cases, options.jobs, console)
    _print(console, counts)
    total, valid = counts.total(), sum(n for (_, mutation), n in counts.items() if mutation == "valid")
    seconds = time.monotonic() - began
    console.print(f"{total:,} sets, {valid / max(total, 1):.1%} valid, {total / seconds:,.0f}/s, {len(failures)} wrong")
    for index, text in failures[:20]:
        console.print(f"{text}\n    replay: python {sys.argv[0]} --seed {options.seed} --replay {index}", markup=False)
    return int(bool(failures) or total < options.cases or valid < 0.3 * total)


if __name__ == "__main__":
    sys.exit(main())
