"""The C kernels behind NumPy arrays. The only file that touches ctypes and pointers; every array is checked before C sees it.

bf16 is carried as uint16. Exactness: a row's bits depend only on its own token history, not on the number of rows,
neighbours, page table, chunking or threads (see kernels.h).
"""

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Collection, Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from specmoeoff.errors import MissingCapability

PAGE_TOKENS = 64
LANES = 16
MAX_HEAD_DIM = 256
MAX_SIZE = 1 << 30  # of any dimension: C's 32-bit indices and 64-bit byte counts cannot overflow
MAX_THREADS = 1024  # libgomp ends the process where it cannot start one
HUGE_PAGE = 1 << 21
ISA_VARIABLE = "SPECMOEOFF_CPU_ISA"
LIBRARY_VARIABLE = "SPECMOEOFF_CPU_LIBRARY"  # another build of the C library, such as the one with sanitizers


class _Shape(Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("hidden", "n_heads", "n_kv_heads", "head_dim", "intermediate", "n_experts", "n_active")
        ),
        ("rms_eps", c_float),
    ]


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("input_norm", "qkv", "o", "post_norm", "router", "cosines", "sines")]


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_requests", "n_rows", "max_pages")),
        *((name, c_void_p) for name in ("row_start", "first_position", "page_table")),
    ]


# Kept in the order of the C files.
_SIGNATURES = {
    "smo_isa_count": (c_int, []),
    "smo_isa_name": (c_char_p, [c_int]),
    "smo_isa_supported": (c_int, [c_int]),
    "smo_set_cpus": (None, [POINTER(c_int32), c_int]),
    "smo_packed_linear_bytes": (c_size_t, [c_int, c_int]),
    "smo_pack_linear": (None, [c_void_p, c_int, c_int, c_void_p]),
    "smo_packed_expert_bytes": (c_size_t, [c_int, c_int]),
    "smo_pack_expert": (None, [c_void_p] * 3 + [c_int, c_int, c_void_p]),
    "smo_linear": (None, [c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p]),
    "smo_rmsnorm": (None, [c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_float, c_void_p]),
    "smo_verify_attention": (None, [c_int, c_int, POINTER(_Shape), POINTER(_Batch)] + [c_void_p] * 5),
    "smo_partial_bytes": (c_size_t, [POINTER(_Shape), c_int, c_int]),
    "smo_attention_scratch_bytes": (c_size_t, [POINTER(_Shape), c_int, c_int]),
    "smo_attention_block": (None, [c_int, c_int, POINTER(_Shape), POINTER(_Layer), POINTER(_Batch)] + [c_void_p] * 7),
    "smo_experts_scratch_bytes": (c_size_t, [c_int, c_int]),
    "smo_experts": (None, [c_int] * 5 + [c_void_p, c_int] + [c_void_p] * 5),
    "smo_combine": (None, [c_int, c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p]),
    "smo_dense_pass": (
        None,
        [c_int, c_int, POINTER(_Shape), c_int, c_void_p, c_void_p, POINTER(_Batch)]
        + [c_void_p] * 3
        + [c_size_t]
        + [c_void_p] * 5,
    ),
    "smo_head_scratch_bytes": (c_size_t, [c_int, c_int, c_int]),
    "smo_head_argmax": (
        None,
        [c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_float, c_void_p, c_int, c_void_p, c_void_p, c_void_p],
    ),
    "smo_probe_count": (c_int, []),
    "smo_probe_name": (c_char_p, [c_int]),
    "smo_probe_supported": (c_int, [c_int]),
    "smo_probe_operations": (c_double, [c_int]),
    "smo_probe": (None, [c_int, c_int, c_void_p, c_size_t, c_int64, POINTER(c_double)]),
    "smo_probe_chase": (c_int64, [c_void_p, c_int64, c_int64]),
}


@functools.cache
def _library() -> ctypes.CDLL:
    path = os.environ.get(LIBRARY_VARIABLE) or files(__package__).joinpath("libspecmoeoff_cpu.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingCapability(
            f"the CPU kernels cannot be loaded ({error}); reinstall with `pip install .`."
        ) from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpus = allowed_cpus()
    library.smo_set_cpus((c_int32 * len(cpus))(*cpus), len(cpus))
    return library


def allowed_cpus() -> list[int]:
    """CPUs this process may use, one of each core before its siblings."""

    def place_in_core(cpu: int) -> int:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            with open(path) as stream:
                first, *rest = stream.read().strip().replace("-", ",").split(",")
        except OSError:
            return 0
        return 0 if cpu == int(first) else len(rest)

    return sorted(os.sched_getaffinity(0), key=lambda cpu: (place_in_core(cpu), cpu))


@functools.cache
def _all_isas() -> tuple[str, ...]:
    library = _library()
    return tuple(library.smo_isa_name(i).decode() for i in range(library.smo_isa_count()))


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, fastest first."""
    return tuple(name for i, name in enumerate(_all_isas()) if _library().smo_isa_supported(i))


def default_isa() -> str:
    """The fastest, or the one $SPECMOEOFF_CPU_ISA names; never silently another."""
    return _checked_isa(os.environ.get(ISA_VARIABLE) or supported_isas()[0])


def _checked_isa(name: str) -> str:
    if name not in supported_isas():
        reason = "this CPU cannot run it" if name in _all_isas() else "there is no such instruction set"
        raise MissingCapability(f"instruction set {name!r}: {reason}; choose one of {', '.join(supported_isas())}.")
    return name


def aligned_empty(n_bytes: int, alignment: int = 4096, huge_pages: bool = True) -> np.ndarray:
    """(n_bytes,) uint8 of zeroed memory of its own, in huge pages where wanted and had, every page touched."""
    slack = HUGE_PAGE if n_bytes >= HUGE_PAGE else alignment
    # Private: shared memory, mmap's default, gets no huge pages, and every kernel loses a fifth of its speed.
    memory = mmap.mmap(-1, max(n_bytes, 1) + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % slack
    if n_bytes >= HUGE_PAGE:
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    array = whole[first : first + n_bytes]
    array[:] = 0
    return array


def _of(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {kind.__name__} expected, not {type(value).__name__}")


def _size(name: str, value: int, unit: int = 1, most: int = MAX_SIZE) -> int:
    """A dimension or count that C can take: a positive multiple of `unit`."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: whole number expected, not {type(value).__name__}")
    if value < 1 or value % unit:
        raise ValueError(f"{name} must be {f'a positive multiple of {unit}' if unit > 1 else 'positive'}, not {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")
    return int(value)


def _epsilon(name: str, value: float) -> float:
    if not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name}: number expected, not {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
    return float(value)


def _pointer(array: np.ndarray, dtype: type, shape: tuple[int | None, ...], name: str, write: bool = False) -> int:
    """Address of an array whose dtype, shape (None: any) and layout are as C expects; `write`: C will change it."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: {np.dtype(dtype).name} array expected, not {found}")
    if array.shape != shape and (
        array.ndim != len(shape) or any(w is not None and w != n for n, w in zip(array.shape, shape, strict=True))
    ):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: shape ({wanted}) expected, not {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous")
    if not array.flags.aligned or (write and not array.flags.writeable):
        raise ValueError(f"{name}: must be aligned{' and writeable' if write else ''}")
    return int(array.__array_interface__["data"][0])


def _matrix(array: np.ndarray, dtype: type, name: str, unit: int = 1, write: bool = False) -> tuple[int, int, int]:
    """Address, rows (there may be none) and columns, a multiple of `unit`."""
    address = _pointer(array, dtype, (None, None), name, write)
    rows, columns = array.shape
    _size(f"{name}: the number of rows", rows or 1)
    return address, rows, _size(f"{name}: the row length", columns, unit)


def _packed(array: np.ndarray, n_bytes: int, name: str, write: bool = False) -> int:
    """Address of packed bf16."""
    address = _pointer(array, np.uint8, (n_bytes,), name, write)
    if address % 2:
        raise ValueError(f"{name}: must be aligned to 2 bytes")
    return address


def _apart(written: Sequence[tuple[str, np.ndarray]], *read: tuple[str, np.ndarray]) -> None:
    """What C writes must be memory of its own. All arrays are C-contiguous: bounds that meet are bytes that meet."""
    for i, (name, array) in enumerate(written, 1):
        for other, its in (*written[i:], *read):
            if np.may_share_memory(array, its):
                raise ValueError(f"{name}: must not share memory with {other}")


def packed_linear_bytes(n_out: int, n_in: int) -> int:
    """Bytes of a packed (n_out, n_in) matrix: 64-row strips, zero-padded."""
    return int(_library().smo_packed_linear_bytes(_size("n_out", n_out), _size("n_in", n_in, 2)))


def pack_linear(weight: np.ndarray, out: np.ndarray) -> None:
    """weight (n_out, n_in) bf16 -> out (packed_linear_bytes,) uint8."""
    source, n_out, n_in = _matrix(weight, np.uint16, "weight", 2)
    _size("weight: the number of rows", n_out)
    target = _packed(out, packed_linear_bytes(n_out, n_in), "out", write=True)
    _apart([("out", out)], ("weight", weight))
    _library().smo_pack_linear(source, n_out, n_in, target)


def packed_expert_bytes(hidden: int, intermediate: int) -> int:
    """Bytes of a packed expert: gate, up and down."""
    return int(_library().smo_packed_expert_bytes(_size("hidden", hidden, 2), _size("intermediate", intermediate, 2)))


def pack_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray, out: np.ndarray) -> None:
    """gate, up (intermediate, hidden), down (hidden, intermediate) bf16 -> out (packed_expert_bytes,) uint8."""
    gates, intermediate, hidden = _matrix(gate, np.uint16, "gate", 2)
    _size("gate: the number of rows", intermediate, 2)
    ups = _pointer(up, np.uint16, (intermediate, hidden), "up")
    downs = _pointer(down, np.uint16, (hidden, intermediate), "down")
    target = _packed(out, packed_expert_bytes(hidden, intermediate), "out", write=True)
    _apart([("out", out)], ("gate", gate), ("up", up), ("down", down))
    _library().smo_pack_expert(gates, ups, downs, hidden, intermediate, target)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer. hidden and head_dim are multiples of 16, head_dim at most 256."""

    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    n_experts: int
    n_active: int
    rms_eps: float

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_kv_heads", "intermediate", "n_experts", "n_active"):
            _size(name, getattr(self, name))
        _size("hidden", self.hidden, 16)
        _size("head_dim", self.head_dim, 16, MAX_HEAD_DIM)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        _size("n_heads: the width of queries, keys and values", self.qkv_width)
        if self.n_active > self.n_experts:
            raise ValueError(f"n_active must be 1 to {self.n_experts}, not {self.n_active}")
        _epsilon("rms_eps", self.rms_eps)

    @functools.cached_property
    def c_struct(self) -> _Shape:
        """For C."""
        return _Shape(*(getattr(self, name) for name, _ in _Shape._fields_))

    @property
    def qkv_width(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


class LayerWeights:
    """The dense weights of a layer, checked once.

    input_norm, post_norm (hidden,) float32; qkv, o, router packed; cosines, sines (n_positions, head_dim / 2) float32.
    Without input_norm attention sees the residual stream as it is.
    """

    def __init__(
        self,
        shape: LayerShape,
        input_norm: np.ndarray | None,
        qkv: np.ndarray,
        o: np.ndarray,
        post_norm: np.ndarray,
        router: np.ndarray | None,
        cosines: np.ndarray,
        sines: np.ndarray,
    ) -> None:
        _of("shape", shape, LayerShape)
        self.shape = shape
        self._arrays = (input_norm, qkv, o, post_norm, router, cosines, sines)
        if (router is None) != (shape.n_experts == 1):
            raise ValueError("router: needed exactly where there is more than one expert")
        width = shape.n_heads * shape.head_dim
        self.c_struct = _Layer(
            None if input_norm is None else _pointer(input_norm, np.float32, (shape.hidden,), "input_norm"),
            _packed(qkv, packed_linear_bytes(shape.qkv_width, shape.hidden), "qkv"),
            _packed(o, packed_linear_bytes(shape.hidden, width), "o"),
            _pointer(post_norm, np.float32, (shape.hidden,), "post_norm"),
            None if router is None else _packed(router, packed_linear_bytes(shape.n_experts, shape.hidden), "router"),
            _pointer(cosines, np.float32, (None, shape.head_dim // 2), "cosines"),
            _pointer(sines, np.float32, (len(cosines), shape.head_dim // 2), "sines"),
        )
        self.n_positions = len(cosines)


class DenseStack:
    """The layers of a model of one expert a layer, checked once. experts[i] is the packed feed-forward of layers[i]."""

    def __init__(self, layers: Sequence[LayerWeights], experts: Sequence[np.ndarray]) -> None:
        _of("layers", layers, Collection)
        _of("experts", experts, Collection)
        for layer in layers:
            _of("layers", layer, LayerWeights)
        if not layers:
            raise ValueError("layers: at least one is needed")
        shape = self.shape = layers[0].shape
        if shape.n_experts != 1 or any(layer.shape != shape for layer in layers):
            raise ValueError("layers: all of one shape, with one expert each, are needed")
        if len(experts) != len(layers):
            raise ValueError(f"experts: {len(experts)} for {len(layers)} layers")
        n_bytes = packed_expert_bytes(shape.hidden, shape.intermediate)
        self.n_layers, self.n_positions = len(layers), min(layer.n_positions for layer in layers)
        self._arrays = (tuple(layers), tuple(experts))
        self.c_layers = (_Layer * len(layers))(*(layer.c_struct for layer in layers))
        self.c_experts = (c_void_p * len(layers))(*(_packed(e, n_bytes, "experts") for e in experts))


class Batch:
    """Ragged rows: request r has rows row_start[r] .. row_start[r+1]-1 at positions first_position[r] + j.

    row_start (n_requests + 1,), first_position (n_requests,), page_table (n_requests, max_pages), all int32. No page serves
    twice among those that the requests' positions, new ones included, reach.
    """

    def __init__(self, row_start: np.ndarray, first_position: np.ndarray, page_table: np.ndarray) -> None:
        # Copies: what was checked is what C will see.
        row_start, first_position, page_table = (
            np.array(a, order="C") for a in (row_start, first_position, page_table)
        )
        starts = _pointer(row_start, np.int32, (None,), "row_start")
        n = row_start.size - 1
        if n < 1 or row_start[0] != 0 or (row_start[1:] <= row_start[:-1]).any():
            raise ValueError("row_start: must begin with 0 and give every request at least one row")
        pointers = (
            starts,
            _pointer(first_position, np.int32, (n,), "first_position"),
            _pointer(page_table, np.int32, (n, None), "page_table"),
        )
        self.n_rows = _size("row_start: the number of rows", int(row_start[-1]))
        if first_position.min() < 0:
            raise ValueError("first_position: must not be negative")
        ends = np.diff(row_start) + first_position.astype(np.int64)
        self.end = _size("first_position: the number of positions", int(ends.max()))
        if self.end > page_table.shape[1] * PAGE_TOKENS:
            raise ValueError(f"page_table: {page_table.shape[1]} pages cannot hold {self.end} positions")
        self.highest_page = int(page_table.max())
        if page_table.min() < 0:
            raise ValueError("page_table: must not be negative")
        pages = np.sort(page_table[np.arange(page_table.shape[1]) * PAGE_TOKENS < ends[:, None]])
        if (pages[1:] == pages[:-1]).any():
            raise ValueError("page_table: a page in use occurs twice")
        self._arrays = (row_start, first_position, page_table)
        self.c_struct = _Batch(n, self.n_rows, page_table.shape[1], *pointers)


class Kernels:
    """The operators at a fixed number of threads and instruction set. Not thread-safe: call from one thread."""

    def __init__(self, n_threads: int, isa: str | None = None) -> None:
        self.n_threads = _size("n_threads", n_threads, most=MAX_THREADS)
        self.isa = default_isa() if isa is None else _checked_isa(isa)
        self._isa = _all_isas().index(self.isa)
        self._scratch = aligned_empty(1 << 20)
        self._scratch_pointer = self._scratch.ctypes.data

    def _scratch_of(self, n_bytes: int) -> int:
        if n_bytes > len(self._scratch):
            self._scratch = aligned_empty(n_bytes)
            self._scratch_pointer = self._scratch.ctypes.data
        return self._scratch_pointer

    def linear(self, x: np.ndarray, packed: np.ndarray, n_out: int, out: np.ndarray) -> None:
        """out (M, n_out) float32 = x (M, n_in) bf16 . packed^T."""
        source, m, n_in = _matrix(x, np.uint16, "x", 2)
        weight = _packed(packed, packed_linear_bytes(n_out, n_in), "packed")
        target = _pointer(out, np.float32, (m, n_out), "out", write=True)
        _apart([("out", out)], ("x", x), ("packed", packed))
        _library().smo_linear(self._isa, self.n_threads, source, m, n_in, weight, n_out, target)

    def rmsnorm(self, x: np.ndarray, weight: np.ndarray | None, eps: float, out: np.ndarray) -> None:
        """out (M, H) bf16 = x (M, H) float32 normalised and weighted, or as it is where there is no weight."""
        source, m, n = _matrix(x, np.float32, "x", LANES)
        scale = None if weight is None else _pointer(weight, np.float32, (n,), "weight")
        target = _pointer(out, np.uint16, (m, n), "out", write=True)
        _apart([("out", out)], ("x", x), *([] if weight is None else [("weight", weight)]))
        _library().smo_rmsnorm(self._isa, self.n_threads, source, m, n, scale, _epsilon("eps", eps), target)

    def verify_attention(
        self,
        shape: LayerShape,
        batch: Batch,
        k_pages: np.ndarray,
        v_pages: np.ndarray,
        query: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """out (M, n_heads * head_dim) bf16: attention of rotated, scaled queries over appended pages."""
        _of("shape", shape, LayerShape)
        keys, values = self._pages(shape, batch, k_pages, v_pages)
        width = (batch.n_rows, shape.n_heads * shape.head_dim)
        source, target = _pointer(query, np.uint16, width, "query"), _pointer(out, np.uint16, width, "out", write=True)
        _apart([("out", out)], ("k_pages", k_pages), ("v_pages", v_pages), ("query", query))
        library = _library()
        scratch = self._scratch_of(library.smo_partial_bytes(shape.c_struct, batch.n_rows, batch.end))
        library.smo_verify_attention(
            self._isa, self.n_threads, shape.c_struct, batch.c_struct, keys, values, source, target, scratch
        )

    @staticmethod
    def _pages(
        shape: LayerShape, batch: Batch, k_pages: np.ndarray, v_pages: np.ndarray, layers: tuple[int, ...] = ()
    ) -> tuple[int, int]:
        _of("batch", batch, Batch)
        heads, dim = shape.n_kv_heads, shape.head_dim
        keys = _pointer(k_pages, np.uint16, (*layers, None, heads, dim // 2, PAGE_TOKENS, 2), "k_pages", write=True)
        n_pages = k_pages.shape[len(layers)]
        values = _pointer(
            v_pages, np.uint16, (*layers, n_pages, heads, PAGE_TOKENS // 2, dim, 2), "v_pages", write=True
        )
        if batch.highest_page >= n_pages:
            raise ValueError(f"page_table: page {batch.highest_page} is beyond the {n_pages} pages")
        return keys, values

    def attention_block(
        self,
        layer: LayerWeights,
        batch: Batch,
        x: np.ndarray,
        k_pages: np.ndarray,
        v_pages: np.ndarray,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
    ) -> None:
        """Norm, QKV, rotary embedding, KV append, attention, output projection, residual, norm, router.

        x (M, hidden) float32 in and out; k_pages (n_pages, n_kv_heads, head_dim / 2, 64, 2) and v_pages (n_pages,
        n_kv_heads, 32, head_dim, 2) bf16 of this layer; out: normed (M, hidden) bf16, expert_index (M, n_active) int32,
        expert_weight (M, n_active) float32 (softmax over all, renormalised over the chosen, as Mixtral's).
        """
        _of("layer", layer, LayerWeights)
        keys, values = self._pages(layer.shape, batch, k_pages, v_pages)
        shape, m = layer.shape, batch.n_rows
        if batch.end > layer.n_positions:
            raise ValueError(f"batch: position {batch.end - 1} is beyond the {layer.n_positions} rotary positions")
        residual = _pointer(x, np.float32, (m, shape.hidden), "x", write=True)
        outputs = (
            _pointer(normed, np.uint16, (m, shape.hidden), "normed", write=True),
            _pointer(expert_index, np.int32, (m, shape.n_active), "expert_index", write=True),
            _pointer(expert_weight, np.float32, (m, shape.n_active), "expert_weight", write=True),
        )
        _apart(
            [
                ("x", x),
                ("k_pages", k_pages),
                ("v_pages", v_pages),
                ("normed", normed),
                ("expert_index", expert_index),
                ("expert_weight", expert_weight),
            ]
        )
        library = _library()
        scratch = self._scratch_of(library.smo_attention_scratch_bytes(shape.c_struct, m, batch.end))
        library.smo_attention_block(
            self._isa,
            self.n_threads,
            shape.c_struct,
            layer.c_struct,
            batch.c_struct,
            residual,
            keys,
            values,
            *outputs,
            scratch,
        )

    def experts(
        self,
        normed: np.ndarray,
        experts: Sequence[np.ndarray],
        row_slots: Sequence[np.ndarray],
        out: np.ndarray,
        intermediate: int,
    ) -> None:
        """SwiGLU of packed experts[e] for row_slots[e] (int32, row * n_active + rank): out[slot] of (M * n_active, H)."""
        source, m, hidden = _matrix(normed, np.uint16, "normed", 2)
        target = _pointer(out, np.float32, (None, hidden), "out", write=True)
        n_slots = len(out)
        if m < 1 or n_slots % m or n_slots > MAX_SIZE:
            raise ValueError(f"out: {n_slots} rows are no multiple of the {m} rows of normed")
        n_bytes = packed_expert_bytes(hidden, intermediate)
        _of("experts", experts, Collection)
        _of("row_slots", row_slots, Collection)
        if len(experts) != len(row_slots):
            raise ValueError(f"row_slots: {len(row_slots)} lists for {len(experts)} experts")
        pointers = (c_void_p * max(1, len(experts)))(*(_packed(e, n_bytes, "experts") for e in experts))
        for slots in row_slots:
            _pointer(slots, np.int32, (None,), "row_slots")
        slots = row_slots[0] if len(row_slots) == 1 else np.concatenate([*row_slots, np.empty(0, np.int32)])
        if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= n_slots):
            raise ValueError(f"row_slots: must be 0 to {n_slots - 1}")
        if len(slots) and int(np.bincount(slots).max()) > 1:
            raise ValueError("row_slots: a slot occurs twice")
        _apart([("out", out)], ("normed", normed), ("row_slots", slots), *(("experts", e) for e in experts))
        start = np.zeros(len(experts) + 1, np.int32)
        np.cumsum([len(slots) for slots in row_slots], out=start[1:])
        library = _library()
        scratch = self._scratch_of(library.smo_experts_scratch_bytes(intermediate, len(slots)))
        library.smo_experts(
            self._isa,
            self.n_threads,
            hidden,
            intermediate,
            n_slots // m,
            source,
            len(experts),
            pointers,
            slots.ctypes.data,
            start.ctypes.data,
            target,
            scratch,
        )

    def combine(self, x: np.ndarray, expert_out: np.ndarray, expert_weight: np.ndarray) -> None:
        """x (M, H) += sum over ranks, in order, of expert_weight (M, n_active) * expert_out (M * n_active, H)."""
        residual, m, hidden = _matrix(x, np.float32, "x", LANES, write=True)
        weights = _pointer(expert_weight, np.float32, (m, None), "expert_weight")
        n_active = _size("expert_weight: the row length", expert_weight.shape[1])
        outputs = _pointer(expert_out, np.float32, (m * n_active, hidden), "expert_out")
        _apart([("x", x)], ("expert_out", expert_out), ("expert_weight", expert_weight))
        _library().smo_combine(self._isa, self.n_threads, residual, m, hidden, n_active, outputs, weights)

    def dense_pass(
        self,
        stack: DenseStack,
        batch: Batch,
        x: np.ndarray,
        k_pages: np.ndarray,
        v_pages: np.ndarray,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
        expert_out: np.ndarray,
    ) -> None:
        """All layers at once: attention_block, experts and combine of each, bit for bit. k_pages and v_pages as there,
        with a leading axis of layers; expert_out (M, hidden) float32 is workspace."""
        _of("stack", stack, DenseStack)
        keys, values = self._pages(stack.shape, batch, k_pages, v_pages, (stack.n_layers,))
        shape, m = stack.shape, batch.n_rows
        if batch.end > stack.n_positions:
            raise ValueError(f"batch: position {batch.end - 1} is beyond the {stack.n_positions} rotary positions")
        residual = _pointer(x, np.float32, (m, shape.hidden), "x", write=True)
        pointers = (
            _pointer(normed, np.uint16, (m, shape.hidden), "normed", write=True),
            _pointer(expert_index, np.int32, (m, 1), "expert_index", write=True),
            _pointer(expert_weight, np.float32, (m, 1), "expert_weight", write=True),
            _pointer(expert_out, np.float32, (m, shape.hidden), "expert_out", write=True),
        )
        _apart(
            [
                ("x", x),
                ("k_pages", k_pages),
                ("v_pages", v_pages),
                ("normed", normed),
                ("expert_index", expert_index),
                ("expert_weight", expert_weight),
                ("expert_out", expert_out),
            ]
        )
        library = _library()
        scratch = self._scratch_of(
            max(
                library.smo_attention_scratch_bytes(shape.c_struct, m, batch.end),
                library.smo_experts_scratch_bytes(shape.intermediate, m),
            )
        )
        library.smo_dense_pass(
            self._isa,
            self.n_threads,
            shape.c_struct,
            stack.n_layers,
            stack.c_layers,
            stack.c_experts,
            batch.c_struct,
            residual,
            keys,
            values,
            k_pages.size // stack.n_layers,
            *pointers,
            scratch,
        )

    def head_argmax(
        self,
        x: np.ndarray,
        norm: np.ndarray | None,
        eps: float,
        packed: np.ndarray,
        vocab: int,
        out: np.ndarray,
        logits: np.ndarray | None = None,
    ) -> None:
        """out (M,) int32: the token with the highest logit (lowest on ties) after final norm (None: there is none) and
        head; logits (M, vocab)."""
        states, m, hidden = _matrix(x, np.float32, "x", LANES)
        scale = None if norm is None else _pointer(norm, np.float32, (hidden,), "norm")
        weight = _packed(packed, packed_linear_bytes(_size("vocab", vocab), hidden), "packed")
        target = _pointer(out, np.int32, (m,), "out", write=True)
        table = None if logits is None else _pointer(logits, np.float32, (m, vocab), "logits", write=True)
        written = [("out", out)] if logits is None else [("out", out), ("logits", logits)]
        _apart(written, ("x", x), ("packed", packed), *([] if norm is None else [("norm", norm)]))
        _epsilon("eps", eps)
        library = _library()
        scratch = self._scratch_of(library.smo_head_scratch_bytes(hidden, m, self.n_threads))
        library.smo_head_argmax(
            self._isa, self.n_threads, states, m, hidden, scale, eps, weight, vocab, target, table, scratch
        )


def scratch_bytes(shape: LayerShape, max_rows: int, context_tokens: int, n_threads: int) -> int:
    """Scratch memory a Kernels object ends up with after passes of up to `max_rows` rows in contexts of `context_tokens`."""
    _of("shape", shape, LayerShape)
    _size("n_threads", n_threads, most=MAX_THREADS)
    _size("max_rows", max_rows)
    _size("context_tokens", context_tokens)
    library = _library()
    return max(
        1 << 20,
        int(library.smo_attention_scratch_bytes(shape.c_struct, max_rows, context_tokens)),
        int(library.smo_experts_scratch_bytes(shape.intermediate, max_rows * shape.n_active)),
        int(library.smo_head_scratch_bytes(shape.hidden, max_rows, n_threads)),
    )
