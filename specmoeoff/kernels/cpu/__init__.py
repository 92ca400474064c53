"""The C kernels behind NumPy arrays. The only file that touches ctypes and pointers; every array is checked before C sees it.

bf16 is carried as uint16; where a model's precision is fp32, activations and packed weights are fp32. Exactness: a row's bits
depend only on its own token history, not on the number of rows, neighbours, page table, chunking or threads (see kernels.h).
"""

import contextlib
import copy
import ctypes
import functools
import math
import mmap
import os
from collections.abc import Collection, Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.precision import PackedFormat, Precision

PAGE_TOKENS = 128
LANES = 16
MAX_HEAD_DIM = 576  # DeepSeek's latent keys
MAX_TREE_TOKENS = 64
MAX_EXPERTS = 1024
KV_FORMATS = ("bf16", "fp16", "fp32", "int8")  # as kernels.h numbers them
MAX_SIZE = 1 << 30  # of any dimension: C's 32-bit indices and 64-bit byte counts cannot overflow
MAX_THREADS = 1024  # libgomp ends the process where it cannot start one
HUGE_PAGE = 1 << 21
ISA_VARIABLE = "SPECMOEOFF_CPU_ISA"
SLOT_OUTSIDE, SLOT_TWICE = 1, 2
LIBRARY_VARIABLE = "SPECMOEOFF_CPU_LIBRARY"  # another build of the C library, such as the one with sanitizers


ACTIVATION: dict[Precision, type] = {"bf16": np.uint16, "fp32": np.float32}
HALVES: dict[Precision, int] = {"bf16": 1, "fp32": 2}  # an element's, of 16 bits

_SIZES = ("hidden", "n_heads", "n_kv_heads", "head_dim", "intermediate", "n_experts", "n_active")
_OTHER_SIZES = ("v_head_dim", "rotary_dim", "q_latent", "kv_latent", "shared_intermediate", "window", "kv_format")
_ROUTING = ("norm_heads", "sigmoid_router", "renormalise", "n_groups", "n_active_groups", "group_best")


class _Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in (*_SIZES, *_OTHER_SIZES, *_ROUTING)),
        *((name, c_float) for name in ("rms_eps", "attention_scale", "routed_scale", "clip_qkv")),
    ]


class _KVShape(Structure):
    _fields_ = [(name, c_int32) for name in ("n_heads", "n_kv_heads", "key_dim", "value_dim", "format", "window")]


class _Attention(Structure):
    _fields_ = [
        ("shape", POINTER(_KVShape)),
        ("batch", c_void_p),
        *((name, c_void_p) for name in ("pages", "sinks", "tree", "log_sums")),
        ("wide_result", c_int32),
    ]


_ALWAYS = ("input_norm", "qkv", "o", "post_norm", "router", "cosines", "sines")
_VECTORS = ("qkv_bias", "o_bias", "router_bias", "choice_bias", "q_norm", "k_norm", "sinks")
_LATENT_NORMS = ("q_latent_norm", "kv_latent_norm")
_MATRICES = ("q_up", "kv_up", "shared_gate_up", "shared_down", "shared_weight")


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in (*_ALWAYS, *_VECTORS, *_LATENT_NORMS, *_MATRICES)]


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_requests", "n_rows", "max_pages")),
        *((name, c_void_p) for name in ("row_start", "first_position", "page_table")),
    ]


class _Swiglu(Structure):
    _fields_ = [(name, c_float) for name in ("alpha", "limit", "shift")]


class _Experts(Structure):
    _fields_ = [
        *((name, c_int) for name in ("hidden", "intermediate", "n_active", "format", "n_experts")),
        *((name, c_void_p) for name in ("weights", "biases")),
        ("swiglu", POINTER(_Swiglu)),
        *((name, c_void_p) for name in ("slots", "start")),
    ]


# Kept in the order of the C files.
_SIGNATURES = {
    "smo_isa_count": (c_int, []),
    "smo_isa_name": (c_char_p, [c_int]),
    "smo_isa_supported": (c_int, [c_int]),
    "smo_set_cpus": (None, [POINTER(c_int32), c_int]),
    "smo_packed_linear_bytes": (c_size_t, [c_int, c_int]),
    "smo_pack_linear": (None, [c_void_p, c_int, c_int, c_void_p]),
    "smo_linear": (None, [c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p]),
    "smo_rmsnorm": (None, [c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_float, c_void_p]),
    "smo_kv_page_bytes": (c_size_t, [POINTER(_KVShape)]),
    "smo_partial_bytes": (c_size_t, [POINTER(_KVShape), c_int, c_int]),
    "smo_append_kv": (None, [c_int, c_int, POINTER(_Attention), c_void_p, c_void_p]),
    "smo_verify_attention": (None, [c_int, c_int, POINTER(_Attention)] + [c_void_p] * 3),
    "smo_attention_scratch_bytes": (c_size_t, [POINTER(_Shape), c_int, c_int, c_int]),
    "smo_attention_block": (None, [c_int, c_int, POINTER(_Shape), POINTER(_Layer), POINTER(_Batch)] + [c_void_p] * 6),
    "smo_packed_expert_bytes": (c_size_t, [c_int] * 4),
    "smo_pack_expert": (None, [c_int] + [c_void_p] * 3 + [c_int] * 3 + [c_void_p, POINTER(c_double)]),
    "smo_experts_scratch_bytes": (c_size_t, [c_int] * 5),
    "smo_join_slots": (c_int, [c_void_p, POINTER(c_int32), c_int, c_int] + [c_void_p] * 3),
    "smo_experts": (None, [c_int, c_int, POINTER(_Experts)] + [c_void_p] * 3),
    "smo_combine": (None, [c_int, c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p]),
    "smo_feed_forward": (c_int, [c_int, c_int, POINTER(_Experts), c_int] + [c_void_p] * 9),
    "smo_layers": (
        None,
        [c_int] * 3 + [c_void_p] * 3 + [c_int] + [c_void_p] * 3 + [c_size_t] + [c_void_p] * 8,
    ),
    "smo_head_scratch_bytes": (c_size_t, [c_int, c_int, c_int, c_int]),
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


def _differ(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    for n, w in zip(shape, wanted, strict=True):  # noqa: SIM110 - a generator takes as long as all the rest of a check
        if w is not None and w != n:
            return True
    return False


def _pointer(array: np.ndarray, dtype: type, shape: tuple[int | None, ...], name: str, write: bool = False) -> int:
    """Address of an array whose dtype, shape (None: any) and layout are as C expects; `write`: C will change it."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: {np.dtype(dtype).name} array expected, not {found}")
    if array.shape != shape and (array.ndim != len(shape) or _differ(array.shape, shape)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: shape ({wanted}) expected, not {array.shape}")
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous")
    if not flags.aligned or (write and not flags.writeable):
        raise ValueError(f"{name}: must be aligned{' and writeable' if write else ''}")
    return int(array.__array_interface__["data"][0])


def _matrix(array: np.ndarray, dtype: type, name: str, unit: int = 1, write: bool = False) -> tuple[int, int, int]:
    """Address, rows (there may be none) and columns, a multiple of `unit`."""
    address = _pointer(array, dtype, (None, None), name, write)
    rows, columns = array.shape
    _size(f"{name}: the number of rows", rows or 1)
    return address, rows, _size(f"{name}: the row length", columns, unit)


def _packed(array: np.ndarray, n_bytes: int, name: str, precision: Precision = "bf16", write: bool = False) -> int:
    """Address of packed weights."""
    address = _pointer(array, np.uint8, (n_bytes,), name, write)
    if address % (2 * HALVES[precision]):
        raise ValueError(f"{name}: must be aligned to {2 * HALVES[precision]} bytes")
    return address


def _precision(name: str, value: str) -> Precision:
    if value not in HALVES:
        raise ValueError(f"{name} must be bf16 or fp32, not {value!r}")
    return value


def _precision_of(array: np.ndarray) -> Precision:
    return "fp32" if getattr(array, "dtype", None) == np.float32 else "bf16"


def _apart(written: Sequence[tuple[str, np.ndarray]], *read: tuple[str, np.ndarray]) -> None:
    """What C writes must be memory of its own. All arrays are C-contiguous: bounds that meet are bytes that meet."""
    for i, (name, array) in enumerate(written, 1):
        for other, its in (*written[i:], *read):
            if np.may_share_memory(array, its):
                raise ValueError(f"{name}: must not share memory with {other}")


def packed_linear_bytes(n_out: int, n_in: int, precision: Precision = "bf16") -> int:
    """Bytes of a packed (n_out, n_in) matrix: 64-row strips, zero-padded."""
    n_bytes = _library().smo_packed_linear_bytes(_size("n_out", n_out), _size("n_in", n_in, 2))
    return int(n_bytes) * HALVES[_precision("precision", precision)]


def pack_linear(weight: np.ndarray, out: np.ndarray) -> None:
    """weight (n_out, n_in) bf16 or fp32 -> out (packed_linear_bytes,) uint8."""
    precision = _precision_of(weight)
    source, n_out, n_in = _matrix(weight, ACTIVATION[precision], "weight", 2)
    _size("weight: the number of rows", n_out)
    target = _packed(out, packed_linear_bytes(n_out, n_in, precision), "out", precision, write=True)
    _apart([("out", out)], ("weight", weight))
    _library().smo_pack_linear(source, n_out, n_in * HALVES[precision], target)


_FORMATS: dict[PackedFormat, tuple[int, int]] = {  # C's number, and an element's halves before packing
    "fp32": (0, 2),
    "bf16": (0, 1),
    "int8": (1, 1),
    "int4": (2, 1),
    "mxfp4": (3, 1),
}


def _format(format: str) -> tuple[int, int]:
    if not isinstance(format, str):
        raise TypeError(f"format: str expected, not {type(format).__name__}")
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, not {format!r}")
    return _FORMATS[format]


@functools.lru_cache(maxsize=64, typed=True)  # typed: 64.0 must not pass for 64
def packed_expert_bytes(hidden: int, intermediate: int, format: PackedFormat = "bf16") -> int:
    """Bytes of a packed expert: gate, up and down."""
    sizes = _size("hidden", hidden, 2), _size("intermediate", intermediate, 2)
    return int(_library().smo_packed_expert_bytes(*sizes, *_format(format)))


def pack_expert(
    gate: np.ndarray, up: np.ndarray, down: np.ndarray, out: np.ndarray, format: PackedFormat | None = None
) -> float:
    """gate, up (intermediate, hidden), down (hidden, intermediate) bf16 or fp32 -> out (packed_expert_bytes,) uint8.

    `format`: None, that of the weights, or, of bf16 weights, with one bf16 scale to so many inputs of a column: int8 (64),
    int4 (64), mxfp4 (32, a power of two; OCP Microscaling 1.0, exact where the weights were MXFP4 before).
    Returns the quantisation error: root of the sum of its squares over that of the weights.
    """
    number, halves = _format(_precision_of(gate) if format is None else format)
    dtype = np.float32 if halves == 2 else np.uint16
    gates, intermediate, hidden = _matrix(gate, dtype, "gate", 2)
    _size("gate: the number of rows", intermediate, 2)
    ups = _pointer(up, dtype, (intermediate, hidden), "up")
    downs = _pointer(down, dtype, (hidden, intermediate), "down")
    n_bytes = int(_library().smo_packed_expert_bytes(hidden, intermediate, number, halves))
    target = _packed(out, n_bytes, "out", "fp32" if halves == 2 else "bf16", write=True)
    _apart([("out", out)], ("gate", gate), ("up", up), ("down", down))
    squares = (c_double * 2)()
    _library().smo_pack_expert(number, gates, ups, downs, hidden, intermediate, halves, target, squares)
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


@dataclass(frozen=True)
class Swiglu:
    """gate * sigmoid(alpha * gate) * (up + shift), gate at most `limit`, up within it on both sides; gpt-oss: 1.702, 7, 1."""

    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit", "shift"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.floating)):
                raise TypeError(f"{name}: number expected, not {type(value).__name__}")
            if not 0 <= value <= (math.inf if name == "limit" else 1e6):
                raise ValueError(
                    f"{name} must be at least 0{'' if name == 'limit' else ' and at most 1e6'}, not {value}"
                )

    @functools.cached_property
    def c_struct(self) -> _Swiglu:
        """For C."""
        return _Swiglu(self.alpha, self.limit, self.shift)


SILU = Swiglu()


@dataclass(frozen=True)
class KVShape:
    """Sizes of attention. Head dims are multiples of 16, at most MAX_HEAD_DIM; `window`: tokens a row sees, itself included, 0: all.

    Keys and values are kept as `format`, one of KV_FORMATS: int8 with an fp32 scale per token, KV head, and keys or values.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    format: str = "bf16"
    window: int = 0

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_kv_heads"):
            _size(name, getattr(self, name))
        for name in ("key_dim", "value_dim"):
            _size(name, getattr(self, name), 16, MAX_HEAD_DIM)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        _size("n_heads: the width of queries and keys", (self.n_heads + self.n_kv_heads) * self.key_dim)
        _size("n_heads: the width of results and values", (self.n_heads + self.n_kv_heads) * self.value_dim)
        if self.format not in KV_FORMATS:
            raise ValueError(f"format must be one of {', '.join(KV_FORMATS)}, not {self.format!r}")
        if self.window != 0:
            _size("window", self.window)

    @functools.cached_property
    def c_struct(self) -> _KVShape:
        """For C."""
        sizes = (self.n_heads, self.n_kv_heads, self.key_dim, self.value_dim)
        return _KVShape(*sizes, KV_FORMATS.index(self.format), self.window)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Of the keys and values of PAGE_TOKENS tokens."""
        return int(_library().smo_kv_page_bytes(self.c_struct))

    @property
    def query_dtype(self) -> type:
        return np.uint16 if self.format == "bf16" else np.float32


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer. hidden and the head dimensions are multiples of 16, those at most MAX_HEAD_DIM.

    0 stands for: v_head_dim, rotary_dim: as head_dim; attention_scale: 1 / sqrt(head_dim); the others: without it. A latent
    layer (kv_latent; DeepSeek-V2, section 2.1) has its heads' rotary numbers first. shared_intermediate is the width of the
    feed-forward that every row takes. kv_format: of KV_FORMATS; None: the precision.
    """

    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate: int
    n_experts: int
    n_active: int
    rms_eps: float
    v_head_dim: int = 0
    rotary_dim: int = 0
    q_latent: int = 0
    kv_latent: int = 0
    shared_intermediate: int = 0
    window: int = 0
    norm_heads: bool = True
    sigmoid_router: bool = False
    renormalise: bool = True
    n_groups: int = 0
    n_active_groups: int = 0
    group_best: int = 0
    attention_scale: float = 0.0
    routed_scale: float = 1.0
    clip_qkv: float = 0.0
    precision: Precision = "bf16"
    kv_format: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_kv_heads", "intermediate", "n_experts", "n_active"):
            _size(name, getattr(self, name))
        _size("hidden", self.hidden, 16)
        _size("head_dim", self.head_dim, 16, MAX_HEAD_DIM)
        for name in ("v_head_dim", "rotary_dim", "attention_scale"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.head_dim**-0.5 if name == "attention_scale" else self.head_dim)
        _size("v_head_dim", self.v_head_dim, 16, MAX_HEAD_DIM)
        _size("rotary_dim", self.rotary_dim, 2, self.head_dim)
        for name, unit in (("q_latent", 16), ("kv_latent", 16), ("shared_intermediate", 16), ("window", 1)):
            if getattr(self, name) != 0:
                _size(name, getattr(self, name), unit)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.kv_latent and self.n_heads != self.n_kv_heads:
            raise ValueError("n_kv_heads: must be n_heads where keys and values have a latent")
        _size("n_heads: the width of queries, keys and values", self.qkv_width)
        if self.n_active > self.n_experts:
            raise ValueError(f"n_active must be 1 to {self.n_experts}, not {self.n_active}")
        _size("n_experts", self.n_experts, most=MAX_EXPERTS)
        self._check_groups()
        _epsilon("rms_eps", self.rms_eps)
        _precision("precision", self.precision)
        if self.kv_format is not None and self.kv_format not in KV_FORMATS:
            raise ValueError(f"kv_format must be one of {', '.join(KV_FORMATS)}, not {self.kv_format!r}")

    def _check_groups(self) -> None:
        if not self.n_groups:
            return
        size = self.n_experts // _size("n_groups", self.n_groups, most=self.n_experts)
        _size("n_active_groups", self.n_active_groups, most=self.n_groups)
        _size("group_best", self.group_best, most=size)
        if self.n_experts % self.n_groups or self.n_active > self.n_active_groups * size:
            raise ValueError("n_groups: must divide n_experts, and the active ones hold n_active")

    @functools.cached_property
    def c_struct(self) -> _Shape:
        """For C."""
        names = (name for name, *_ in _Shape._fields_ if name != "kv_format")
        return _Shape(**{name: getattr(self, name) for name in names}, kv_format=KV_FORMATS.index(self.kv.format))

    @functools.cached_property
    def kv(self) -> KVShape:
        """Its attention's."""
        dims = self.head_dim, self.v_head_dim
        return KVShape(self.n_heads, self.n_kv_heads, *dims, self.kv_format or self.precision, self.window)

    @property
    def qkv_width(self) -> int:
        return (self.n_heads + self.n_kv_heads) * self.head_dim + self.n_kv_heads * self.v_head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(n_out, n_in) of every packed matrix that a layer of these sizes may have."""
        latent = self.q_latent + self.kv_latent + self.rotary_dim
        matrices = {
            "qkv": (latent if self.kv_latent else self.qkv_width, self.hidden),
            "o": (self.hidden, self.n_heads * self.v_head_dim),
            "router": (self.n_experts, self.hidden),
        }
        if self.shared_intermediate:
            matrices["shared_gate_up"] = (2 * self.shared_intermediate, self.hidden)
            matrices["shared_down"] = (self.hidden, self.shared_intermediate)
            matrices["shared_weight"] = (1, self.hidden)
        if self.kv_latent:
            queries = self.n_heads * self.head_dim
            matrices["q_up"] = (queries, self.q_latent or self.hidden)
            matrices["kv_up"] = (self.qkv_width - queries, self.kv_latent)
        return matrices

    @property
    def vectors(self) -> dict[str, int]:
        """Length of every norm and bias that a layer of these sizes may have."""
        vectors = {"input_norm": self.hidden, "post_norm": self.hidden, "o_bias": self.hidden, "sinks": self.n_heads}
        vectors |= {"router_bias": self.n_experts, "choice_bias": self.n_experts}
        heads = (1, 1) if self.norm_heads else (self.n_heads, self.n_kv_heads)
        vectors |= {f"{part}_norm": n * self.head_dim for part, n in zip("qk", heads, strict=True)}
        if not self.kv_latent:
            return vectors | {"qkv_bias": self.qkv_width}
        return (
            vectors | {"kv_latent_norm": self.kv_latent} | ({"q_latent_norm": self.q_latent} if self.q_latent else {})
        )


class LayerWeights:
    """The dense weights of a layer, checked once.

    Norms and biases float32, matrices packed, both as LayerShape's `vectors` and `matrices` say; cosines, sines (n_positions,
    rotary_dim / 2) float32. `others`: what kernels.h names besides, as the model has it. Without input_norm attention sees
    the residual stream as it is.
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
        **others: np.ndarray,
    ) -> None:
        _of("shape", shape, LayerShape)
        self.shape = shape
        weights = dict(qkv=qkv, o=o, post_norm=post_norm, **others)
        weights |= {name: w for name, w in (("input_norm", input_norm), ("router", router)) if w is not None}
        self._arrays = (weights, cosines, sines)
        self.routes = router is not None or shape.n_experts == 1
        if (router is None) != (shape.n_experts == 1) and not (router is None and shape.shared_intermediate):
            raise ValueError("router: needed exactly where there is more than one expert")
        needed = set(shape.matrices) | {"q_latent_norm", "kv_latent_norm"} & set(shape.vectors)
        for name in sorted(needed - {"router", "shared_weight"} - set(weights)):
            raise ValueError(f"{name}: missing")
        if ("q_norm" in weights) != ("k_norm" in weights):
            raise ValueError("q_norm: comes with k_norm")
        pointers: dict[str, int] = {}
        for name, array in weights.items():
            if name in shape.vectors:
                pointers[name] = _pointer(array, np.float32, (shape.vectors[name],), name)
            elif name in shape.matrices:
                n_bytes = packed_linear_bytes(*shape.matrices[name], shape.precision)
                pointers[name] = _packed(array, n_bytes, name, shape.precision)
            else:
                raise ValueError(f"{name}: a layer of this shape has none")
        half = shape.rotary_dim // 2
        pointers["cosines"] = _pointer(cosines, np.float32, (None, half), "cosines")
        pointers["sines"] = _pointer(sines, np.float32, (len(cosines), half), "sines")
        self.c_struct = _Layer(**pointers)
        self.n_positions = len(cosines)


class ExpertTable:
    """The experts of a layer, checked once: packed[e], or None where expert e is not in memory.

    format, biases and swiglu: as `Kernels.experts` has them, biases of all.
    """

    def __init__(
        self,
        shape: LayerShape,
        packed: Sequence[np.ndarray | None],
        format: PackedFormat | None = None,
        biases: Sequence[np.ndarray] | None = None,
        swiglu: Swiglu = SILU,
    ) -> None:
        _of("shape", shape, LayerShape)
        _of("packed", packed, Sequence)
        _of("swiglu", swiglu, Swiglu)
        self.shape, self._swiglu = shape, swiglu
        n = shape.n_experts
        number, halves = _format(shape.precision if format is None else format)
        if halves != HALVES[shape.precision]:
            raise ValueError(f"format: {format} is not for layers of precision {shape.precision}")
        if len(packed) != n:
            raise ValueError(f"packed: {len(packed)} for {n} experts")
        n_bytes = packed_expert_bytes(shape.hidden, shape.intermediate, shape.precision if format is None else format)
        self._arrays = tuple(packed)
        self.is_complete = not any(e is None for e in packed)
        self._weights = (c_void_p * n)(
            *(None if e is None else _packed(e, n_bytes, "packed", shape.precision) for e in packed)
        )
        self._biases = None
        if biases is not None:
            _of("biases", biases, Sequence)
            if len(biases) != n:
                raise ValueError(f"biases: {len(biases)} for {n} experts")
            self._arrays += tuple(biases)
            width = (2 * shape.intermediate + shape.hidden,)
            self._biases = (c_void_p * n)(*(_pointer(b, np.float32, width, "biases") for b in biases))
        self.format = number
        self.c_struct = _Experts(
            shape.hidden,
            shape.intermediate,
            shape.n_active,
            number,
            n,
            ctypes.addressof(self._weights),
            None if self._biases is None else ctypes.addressof(self._biases),
            ctypes.pointer(swiglu.c_struct),
        )


class LayerStack:
    """Consecutive layers with their experts, checked once. experts[i]: of layers[i]; None: its rows take none."""

    def __init__(self, layers: Sequence[LayerWeights], experts: Sequence[ExpertTable | None]) -> None:
        _of("layers", layers, Sequence)
        _of("experts", experts, Sequence)
        if not layers:
            raise ValueError("layers: at least one is needed")
        if len(experts) != len(layers):
            raise ValueError(f"experts: {len(experts)} for {len(layers)} layers")
        _of("layers", layers[0], LayerWeights)
        self.shape = layers[0].shape
        for layer, table in zip(layers, experts, strict=True):
            _of("layers", layer, LayerWeights)
            if _row_sizes(layer.shape) != _row_sizes(self.shape):
                raise ValueError("layers: all must have rows, experts and pages of one size")
            if table is not None:
                _of("experts", table, ExpertTable)
                if table.shape != layer.shape:
                    raise ValueError("experts: a table is of another shape than its layer")
                if not layer.routes:
                    raise ValueError("router: missing in a layer that has experts to choose from")
        self.layers, self.experts = tuple(layers), tuple(experts)
        self.n_positions = min(layer.n_positions for layer in layers)
        first_of: dict[object, tuple[LayerWeights, ExpertTable | None]] = {}
        # of every layer the first that is equal in all that decides about scratch memory
        self._alike = [
            first_of.setdefault((layer.shape, table and table.format), (layer, table))
            for layer, table in zip(layers, experts, strict=True)
        ]
        self._tables = tuple(
            (c_void_p * len(layers))(*(None if c is None else ctypes.addressof(c.c_struct) for c in column))
            for column in ([layer.shape for layer in layers], layers, experts)
        )
        self.pointers = tuple(map(ctypes.addressof, self._tables))

    def part(self, first: int, last: int) -> "LayerStack":
        """Layers first to last - 1."""
        if not 0 <= first < last <= len(self.layers):
            raise ValueError(f"first: must be below last, both within the {len(self.layers)} layers")
        part = copy.copy(self)
        part.layers, part.experts = self.layers[first:last], self.experts[first:last]
        part._alike = self._alike[first:last]
        part.pointers = tuple(pointer + first * ctypes.sizeof(c_void_p) for pointer in self.pointers)
        return part

    @property
    def kinds(self) -> set[tuple[LayerWeights, ExpertTable | None]]:
        """One of every kind among the layers."""
        return set(self._alike)

    @property
    def is_complete(self) -> bool:
        """Whether all experts are in memory."""
        return all(table is None or table.is_complete for table in self.experts)


def _row_sizes(shape: LayerShape) -> tuple[object, ...]:
    return (shape.hidden, shape.n_active, shape.n_experts, shape.precision, shape.kv.page_bytes)


class Batch:
    """Ragged rows: request r has rows row_start[r] .. row_start[r+1]-1 at positions first_position[r] + j.

    row_start (n_requests + 1,), first_position (n_requests,), page_table (n_requests, max_pages), all int32. No page serves
    twice among those that the requests' positions, new ones included, reach. tree (n_rows,) uint64: bit j of a row says that it
    sees new token j of its own request, at most MAX_TREE_TOKENS; bit i of row i is set. Without it a row sees those before it.
    """

    def __init__(
        self,
        row_start: np.ndarray,
        first_position: np.ndarray,
        page_table: np.ndarray,
        tree: np.ndarray | None = None,
    ) -> None:
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
        self.tree = None
        if tree is not None:
            tree = np.array(tree, order="C")
            self.tree = _pointer(tree, np.uint64, (self.n_rows,), "tree")
            counts = np.diff(row_start)
            own = np.arange(self.n_rows) - np.repeat(row_start[:-1], counts)
            if counts.max() > MAX_TREE_TOKENS:
                raise ValueError(
                    f"tree: a request has {counts.max()} new tokens, at most {MAX_TREE_TOKENS} can be masked"
                )
            if not (tree >> own.astype(np.uint64) & np.uint64(1)).all():
                raise ValueError("tree: a row must see itself")
        self._arrays = (row_start, first_position, page_table, tree)
        self.c_struct = _Batch(n, self.n_rows, page_table.shape[1], *pointers)


class Kernels:
    """The operators at a fixed number of threads, instruction set and precision: where that is fp32, read fp32 for every bf16
    below. Not thread-safe: call from one thread."""

    def __init__(self, n_threads: int, isa: str | None = None, precision: Precision = "bf16") -> None:
        self.n_threads = _size("n_threads", n_threads, most=MAX_THREADS)
        self.isa = default_isa() if isa is None else _checked_isa(isa)
        self.precision = _precision("precision", precision)
        self._activation = ACTIVATION[precision]
        self._isa = _all_isas().index(self.isa) + (len(_all_isas()) if precision == "fp32" else 0)
        self._scratch = aligned_empty(1 << 20)
        self._scratch_pointer = self._scratch.ctypes.data

    def _scratch_of(self, n_bytes: int) -> int:
        if n_bytes > len(self._scratch):
            self._scratch = aligned_empty(n_bytes)
            self._scratch_pointer = self._scratch.ctypes.data
        return self._scratch_pointer

    def _weight(self, packed: np.ndarray, n_out: int, n_in: int) -> int:
        return _packed(packed, packed_linear_bytes(n_out, n_in, self.precision), "packed", self.precision)

    def linear(self, x: np.ndarray, packed: np.ndarray, n_out: int, out: np.ndarray) -> None:
        """out (M, n_out) float32 = x (M, n_in) bf16 . packed^T."""
        source, m, n_in = _matrix(x, self._activation, "x", 2)
        weight = self._weight(packed, n_out, n_in)
        target = _pointer(out, np.float32, (m, n_out), "out", write=True)
        _apart([("out", out)], ("x", x), ("packed", packed))
        _library().smo_linear(self._isa, self.n_threads, source, m, n_in, weight, n_out, target)

    def rmsnorm(self, x: np.ndarray, weight: np.ndarray | None, eps: float, out: np.ndarray) -> None:
        """out (M, H) bf16 = x (M, H) float32 normalised and weighted, or as it is where there is no weight."""
        source, m, n = _matrix(x, np.float32, "x", LANES)
        scale = None if weight is None else _pointer(weight, np.float32, (n,), "weight")
        target = _pointer(out, self._activation, (m, n), "out", write=True)
        _apart([("out", out)], ("x", x), *([] if weight is None else [("weight", weight)]))
        _library().smo_rmsnorm(self._isa, self.n_threads, source, m, n, scale, _epsilon("eps", eps), target)

    def verify_attention(
        self,
        shape: KVShape,
        batch: Batch,
        pages: np.ndarray,
        query: np.ndarray,
        out: np.ndarray,
        sinks: np.ndarray | None = None,
        log_sums: np.ndarray | None = None,
    ) -> None:
        """out (M, n_heads * value_dim) bf16 or float32: attention of rotated, scaled queries over appended pages.

        pages (n_pages, page_bytes) uint8; query (M, n_heads * key_dim) bf16 over bf16 pages, else float32; sinks (n_heads,)
        float32: a logit beside every row's scores; log_sums (M, n_heads) float32 out: log of the sum of e^score.
        """
        attention = self._attention(shape, batch, pages)
        rows = batch.n_rows
        source = _pointer(query, shape.query_dtype, (rows, shape.n_heads * shape.key_dim), "query")
        wide = isinstance(out, np.ndarray) and out.dtype == np.float32
        dtype = np.float32 if wide else np.uint16
        target = _pointer(out, dtype, (rows, shape.n_heads * shape.value_dim), "out", write=True)
        written, read = [("out", out)], [("pages", pages), ("query", query)]
        if sinks is not None:
            attention.sinks = _pointer(sinks, np.float32, (shape.n_heads,), "sinks")
            read.append(("sinks", sinks))
        if log_sums is not None:
            attention.log_sums = _pointer(log_sums, np.float32, (rows, shape.n_heads), "log_sums", write=True)
            written.append(("log_sums", log_sums))
        attention.wide_result = wide
        _apart(written, *read)
        library = _library()
        scratch = self._scratch_of(library.smo_partial_bytes(shape.c_struct, rows, batch.end))
        library.smo_verify_attention(self._isa, self.n_threads, attention, source, target, scratch)

    def append_kv(self, shape: KVShape, batch: Batch, pages: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys (M, n_kv_heads * key_dim) and values (M, n_kv_heads * value_dim), float32, in pages (n_pages, page_bytes)."""
        attention = self._attention(shape, batch, pages)
        rows = batch.n_rows
        sources = (
            _pointer(keys, np.float32, (rows, shape.n_kv_heads * shape.key_dim), "keys"),
            _pointer(values, np.float32, (rows, shape.n_kv_heads * shape.value_dim), "values"),
        )
        _apart([("pages", pages)], ("keys", keys), ("values", values))
        _library().smo_append_kv(self._isa, self.n_threads, attention, *sources)

    @staticmethod
    def _attention(shape: KVShape, batch: Batch, pages: np.ndarray) -> _Attention:
        _of("shape", shape, KVShape)
        address = Kernels._pages(shape, batch, pages)
        return _Attention(
            ctypes.pointer(shape.c_struct), ctypes.addressof(batch.c_struct), address, None, batch.tree, None, 0
        )

    def _same_precision(self, name: str, shape: LayerShape) -> None:
        if shape.precision != self.precision:
            raise ValueError(f"{name}: is {shape.precision}, the kernels' precision is {self.precision}")

    @staticmethod
    def _pages(shape: KVShape, batch: Batch, pages: np.ndarray, layers: tuple[int, ...] = ()) -> int:
        _of("batch", batch, Batch)
        address = _pointer(pages, np.uint8, (*layers, None, shape.page_bytes), "pages", write=True)
        n_pages = pages.shape[len(layers)]
        if batch.highest_page >= n_pages:
            raise ValueError(f"page_table: page {batch.highest_page} is beyond the {n_pages} pages")
        if address % 4:
            raise ValueError("pages: must be aligned to 4 bytes")
        return address

    def attention_block(
        self,
        layer: LayerWeights,
        batch: Batch,
        x: np.ndarray,
        pages: np.ndarray,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
    ) -> None:
        """Norm, QKV, rotary embedding, KV append, attention, output projection, residual, norm, router.

        x (M, hidden) float32 in and out; pages (n_pages, page_bytes) uint8 of this layer, as LayerShape.kv says; out: normed
        (M, hidden) bf16, expert_index (M, n_active) int32, expert_weight (M, n_active) float32. What every row takes of the
        feed-forward (shared experts, a dense layer's) is added too.
        """
        _of("layer", layer, LayerWeights)
        _of("batch", batch, Batch)
        self._same_precision("layer", layer.shape)
        shape, m = layer.shape, batch.n_rows
        address = self._pages(shape.kv, batch, pages)
        self._positions("batch", batch, layer.n_positions)
        residual, *outputs = self._row_arrays(shape, m, x, normed, expert_index, expert_weight)
        _apart(
            [
                ("x", x),
                ("pages", pages),
                ("normed", normed),
                ("expert_index", expert_index),
                ("expert_weight", expert_weight),
            ]
        )
        library = _library()
        scratch = self._scratch_of(
            library.smo_attention_scratch_bytes(shape.c_struct, m, batch.end, HALVES[self.precision])
        )
        library.smo_attention_block(
            self._isa,
            self.n_threads,
            shape.c_struct,
            layer.c_struct,
            batch.c_struct,
            residual,
            address,
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
        format: PackedFormat | None = None,
        biases: Sequence[np.ndarray] | None = None,
        swiglu: Swiglu = SILU,
    ) -> None:
        """SwiGLU of packed experts[e] for row_slots[e] (int32, row * n_active + rank): out[slot] of (M * n_active, H).

        `format`: as packed; None: the kernels' precision. In int8, int4 and mxfp4 the activations, of bf16, are multiplied as
        int8 with one fp32 scale to the inputs that share a weight's scale, which is the largest of them over 127.
        biases[e] (2 * intermediate + H,) float32: of gate, up and down.
        """
        source, m, hidden = _matrix(normed, self._activation, "normed", 2)
        target = _pointer(out, np.float32, (None, hidden), "out", write=True)
        n_slots = len(out)
        if m < 1 or n_slots % m or n_slots > MAX_SIZE:
            raise ValueError(f"out: {n_slots} rows are no multiple of the {m} rows of normed")
        number, halves = _format(self.precision if format is None else format)
        if halves != HALVES[self.precision]:
            raise ValueError(f"format: {format} is not for kernels of precision {self.precision}")
        n_bytes = packed_expert_bytes(hidden, intermediate, self.precision if format is None else format)
        _of("experts", experts, Collection)
        _of("row_slots", row_slots, Collection)
        _of("swiglu", swiglu, Swiglu)
        if len(experts) != len(row_slots):
            raise ValueError(f"row_slots: {len(row_slots)} lists for {len(experts)} experts")
        pointers = (c_void_p * max(1, len(experts)))(*(_packed(e, n_bytes, "experts", self.precision) for e in experts))
        bias_pointers = None
        if biases is not None:
            _of("biases", biases, Collection)
            if len(biases) != len(experts):
                raise ValueError(f"biases: {len(biases)} for {len(experts)} experts")
            width = (2 * intermediate + hidden,)
            bias_pointers = (c_void_p * max(1, len(biases)))(
                *(_pointer(b, np.float32, width, "biases") for b in biases)
            )
        lists = [_pointer(slots, np.int32, (None,), "row_slots") for slots in row_slots]
        counts = [len(slots) for slots in row_slots]
        if (total := sum(counts)) > n_slots:
            raise ValueError(f"row_slots: {total} slots, of which out has {n_slots}")
        read = [("normed", normed), *(("row_slots", s) for s in row_slots), *(("experts", e) for e in experts)]
        _apart([("out", out)], *read, *(("biases", b) for b in biases or ()))
        library = _library()
        n_scratch = library.smo_experts_scratch_bytes(hidden, intermediate, number, halves, total) + 63 & -64
        scratch = self._scratch_of(n_scratch + 4 * (total + len(experts) + 1) + n_slots)
        slots, start = scratch + n_scratch, scratch + n_scratch + 4 * total
        joined = library.smo_join_slots(
            (c_void_p * max(1, len(lists)))(*lists),
            (c_int32 * max(1, len(counts)))(*counts),
            len(counts),
            n_slots,
            slots,
            start,
            start + 4 * (len(experts) + 1),
        )
        if joined == SLOT_OUTSIDE:
            raise ValueError(f"row_slots: must be 0 to {n_slots - 1}")
        if joined == SLOT_TWICE:
            raise ValueError("row_slots: a slot occurs twice")
        arguments = _Experts(
            hidden,
            intermediate,
            n_slots // m,
            number,
            len(experts),
            ctypes.addressof(pointers),
            None if bias_pointers is None else ctypes.addressof(bias_pointers),
            ctypes.pointer(swiglu.c_struct),
            slots,
            start,
        )
        library.smo_experts(self._isa, self.n_threads, arguments, source, target, scratch)

    def combine(self, x: np.ndarray, expert_out: np.ndarray, expert_weight: np.ndarray) -> None:
        """x (M, H) += sum over ranks, in order, of expert_weight (M, n_active) * expert_out (M * n_active, H)."""
        residual, m, hidden = _matrix(x, np.float32, "x", LANES, write=True)
        weights = _pointer(expert_weight, np.float32, (m, None), "expert_weight")
        n_active = _size("expert_weight: the row length", expert_weight.shape[1])
        outputs = _pointer(expert_out, np.float32, (m * n_active, hidden), "expert_out")
        _apart([("x", x)], ("expert_out", expert_out), ("expert_weight", expert_weight))
        _library().smo_combine(self._isa, self.n_threads, residual, m, hidden, n_active, outputs, weights)

    def feed_forward(
        self,
        table: ExpertTable,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
        x: np.ndarray,
        expert_out: np.ndarray,
        slots: np.ndarray,
    ) -> tuple[list[int], list[int]]:
        """The experts in memory for the rows that chose them, and `combine` if that is all of them.

        Arrays as in `layers`. Returns the experts chosen, those in memory first, and where in `slots` the (row, rank) slots
        of each begin, and where the last end.
        """
        _of("table", table, ExpertTable)
        self._same_precision("table", table.shape)
        shape = table.shape
        source = _pointer(normed, self._activation, (None, shape.hidden), "normed")
        m = _size("normed: the number of rows", len(normed))
        index = _pointer(expert_index, np.int32, (m, shape.n_active), "expert_index")
        weight = _pointer(expert_weight, np.float32, (m, shape.n_active), "expert_weight")
        residual = _pointer(x, np.float32, (m, shape.hidden), "x", write=True)
        results = self._expert_arrays(shape, m, expert_out, slots)
        _apart(
            [("x", x), ("expert_out", expert_out), ("slots", slots)],
            ("normed", normed),
            ("expert_index", expert_index),
            ("expert_weight", expert_weight),
        )
        used, start = (c_int32 * shape.n_experts)(), (c_int32 * (shape.n_experts + 1))()
        n = _library().smo_feed_forward(
            self._isa,
            self.n_threads,
            table.c_struct,
            m,
            source,
            index,
            weight,
            residual,
            *results,
            used,
            start,
            self._scratch_of(self._experts_scratch(table, m)),
        )
        if not n:
            raise ValueError(f"expert_index: must be 0 to {shape.n_experts - 1}")
        return used[:n], start[: n + 1]

    def _experts_scratch(self, table: ExpertTable, m: int) -> int:
        s = table.shape
        sizes = (s.hidden, s.intermediate, table.format, HALVES[self.precision], m * s.n_active)
        return int(_library().smo_experts_scratch_bytes(*sizes))

    def layers(
        self,
        stack: LayerStack,
        batches: Sequence[Batch],
        x: np.ndarray,
        pages: np.ndarray,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
        expert_out: np.ndarray,
        slots: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Layers whose experts are all in memory: attention_block of every batch, experts and combine of each, bit for bit.

        The batches' rows follow one another in x (M, hidden) float32, normed (M, hidden) bf16, expert_index and expert_weight
        (M, n_active) int32 and float32, as there; pages as there, with a leading axis of layers; expert_out (M * n_active,
        hidden) float32 and slots (M * n_active,) int32 are workspace. Returns the rows that chose each expert (n_layers,
        n_experts) int32, and seconds of time.perf_counter (n_layers, len(batches) + 1, 2): begin and end of every batch's
        attention, then of the experts.
        """
        _of("stack", stack, LayerStack)
        _of("batches", batches, Sequence)
        if not batches:
            raise ValueError("batches: at least one is needed")
        if not stack.is_complete:
            raise ValueError("stack: experts are not in memory")
        shape, n_layers = stack.shape, len(stack.layers)
        self._same_precision("stack", shape)
        for batch in batches:
            _of("batches", batch, Batch)
            address = self._pages(shape.kv, batch, pages, (n_layers,))
            self._positions("batches", batch, stack.n_positions)
        m = _size("batches: the number of rows", sum(batch.n_rows for batch in batches))
        arrays = self._row_arrays(shape, m, x, normed, expert_index, expert_weight)
        results = self._expert_arrays(shape, m, expert_out, slots)
        _apart(
            [
                ("x", x),
                ("pages", pages),
                ("normed", normed),
                ("expert_index", expert_index),
                ("expert_weight", expert_weight),
                ("expert_out", expert_out),
                ("slots", slots),
            ]
        )
        library, n_bytes, halves = _library(), 0, HALVES[self.precision]
        for layer, table in stack.kinds:
            struct = layer.shape.c_struct
            sizes = [library.smo_attention_scratch_bytes(struct, b.n_rows, b.end, halves) for b in batches]
            n_bytes = max(n_bytes, *sizes, 0 if table is None else self._experts_scratch(table, m))
        counts = np.empty((n_layers, shape.n_experts), np.int32)
        clock = np.empty(1 + n_layers * (len(batches) + 1))
        library.smo_layers(
            self._isa,
            self.n_threads,
            n_layers,
            *stack.pointers,
            len(batches),
            (c_void_p * len(batches))(*(ctypes.addressof(batch.c_struct) for batch in batches)),
            arrays[0],
            address,
            pages.nbytes // n_layers,
            *arrays[1:],
            *results,
            counts.ctypes.data,
            clock.ctypes.data,
            self._scratch_of(n_bytes),
        )
        return counts, np.stack([clock[:-1], clock[1:]], axis=-1).reshape(n_layers, len(batches) + 1, 2)

    @staticmethod
    def _positions(name: str, batch: Batch, n_positions: int) -> None:
        if batch.tree is not None:
            raise ValueError(f"{name}: a tree's positions are not known here; use verify_attention")
        if batch.end > n_positions:
            raise ValueError(f"{name}: position {batch.end - 1} is beyond the {n_positions} rotary positions")

    def _row_arrays(
        self,
        shape: LayerShape,
        m: int,
        x: np.ndarray,
        normed: np.ndarray,
        expert_index: np.ndarray,
        expert_weight: np.ndarray,
    ) -> tuple[int, ...]:
        """Addresses of what a layer's rows are kept in."""
        return (
            _pointer(x, np.float32, (m, shape.hidden), "x", write=True),
            _pointer(normed, self._activation, (m, shape.hidden), "normed", write=True),
            _pointer(expert_index, np.int32, (m, shape.n_active), "expert_index", write=True),
            _pointer(expert_weight, np.float32, (m, shape.n_active), "expert_weight", write=True),
        )

    @staticmethod
    def _expert_arrays(shape: LayerShape, m: int, expert_out: np.ndarray, slots: np.ndarray) -> tuple[int, int]:
        n_slots = _size("expert_out: the number of rows", m * shape.n_active)
        return (
            _pointer(expert_out, np.float32, (n_slots, shape.hidden), "expert_out", write=True),
            _pointer(slots, np.int32, (n_slots,), "slots", write=True),
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
        weight = self._weight(packed, _size("vocab", vocab), hidden)
        target = _pointer(out, np.int32, (m,), "out", write=True)
        table = None if logits is None else _pointer(logits, np.float32, (m, vocab), "logits", write=True)
        written = [("out", out)] if logits is None else [("out", out), ("logits", logits)]
        _apart(written, ("x", x), ("packed", packed), *([] if norm is None else [("norm", norm)]))
        _epsilon("eps", eps)
        library = _library()
        scratch = self._scratch_of(library.smo_head_scratch_bytes(hidden, m, self.n_threads, HALVES[self.precision]))
        library.smo_head_argmax(
            self._isa, self.n_threads, states, m, hidden, scale, eps, weight, vocab, target, table, scratch
        )


def scratch_bytes(
    shape: LayerShape, max_rows: int, context_tokens: int, n_threads: int, expert_format: PackedFormat | None = None
) -> int:
    """Scratch memory a Kernels object ends up with after passes of up to `max_rows` rows in contexts of `context_tokens`."""
    _of("shape", shape, LayerShape)
    _size("n_threads", n_threads, most=MAX_THREADS)
    _size("max_rows", max_rows)
    _size("context_tokens", context_tokens)
    library, halves = _library(), HALVES[shape.precision]
    return max(
        1 << 20,
        int(library.smo_attention_scratch_bytes(shape.c_struct, max_rows, context_tokens, halves)),
        int(
            library.smo_experts_scratch_bytes(
                shape.hidden, shape.intermediate, *_FORMATS[expert_format or shape.precision], max_rows * shape.n_active
            )
        ),
        int(library.smo_head_scratch_bytes(shape.hidden, max_rows, n_threads, halves)),
    )
