"""Core Context Aware attention for CPUs (arXiv 2412.12465): far context is pooled group by group into core tokens, near
context stays raw, and one softmax runs over both.

    import cca
    out = cca.attention(q, k, v, group_size=16, window=1024)

Tensors are NumPy's, PyTorch's, or those of whatever speaks DLPack, in the processor's memory, with any strides but a
contiguous last dimension: nothing is copied. Their extents are [batch, heads, length, dim] whatever their order in memory;
for [batch, length, heads, dim] say q.transpose(1, 2) in PyTorch and q.swapaxes(1, 2) in NumPy. Elements are float32,
float64, bfloat16 (PyTorch, ml_dtypes) or float16, the same in all tensors of a call. Log-sum-exps, sink logits, slopes,
biases and gradients are float64 for float64 and float32 for all else.

PyTorch's autograd and torch.compile go through cca.attention and cca.attend as through any operator; see cca.torch. For
models of Hugging Face's transformers see cca.hf. Wrong arguments raise ValueError before anything is written.
"""

import ctypes
import io
import sys
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from . import _library
from ._library import UNLIMITED, library

__all__ = [
    "UNLIMITED",
    "CacheShape",
    "Gradients",
    "KvCache",
    "Options",
    "architecture",
    "attend",
    "attend_gradient",
    "attention",
    "attention_gradient",
    "merge",
    "pool",
    "pool_gradient",
    "use",
]
__version__ = library.cca_version().decode()

Tensor = Any
"""A tensor of NumPy, PyTorch, or anything with __dlpack__."""


class Options(TypedDict, total=False):
    """Keyword arguments of every function. Without any, attention is causal and dense."""

    group_size: int
    """tokens per core; 0: nothing is pooled"""
    window: int | None
    """tokens that stay raw, at least 1, the current one among them; None: all"""
    sink_tokens: int
    """first tokens of a sequence that stay raw for every query; groups begin behind them"""
    lookahead: int
    """tokens behind the query's position that it sees, too; UNLIMITED: all; without groups"""
    prefix: int
    """first tokens of a sequence that every query sees; without groups"""
    pool: Literal["last_query", "mean", "max", "select"]
    """how a group becomes a core"""
    core_heads: Literal["per_query_head", "per_kv_head"]
    """who has cores of his own"""
    core_bias: Literal["none", "entropy"]
    """what is added to the scores of cores"""
    softmax_scale: float | None
    """None: 1 / sqrt(dim)"""
    pooling_scale: float
    """a factor on the scale of the weights of pooling"""
    softcap: float
    """a score x becomes softcap tanh(x / softcap); 0: it stays"""
    first_position: int | None
    """the position of query 0; None: the last query is the last key"""
    unit: Literal["none", "best", "avx512_bf16", "amx"]
    """what multiplies operands of 16 bits"""


class Gradients(NamedTuple):
    """Gradients, each of the extents of its operand; None for what is not given."""

    query: Tensor
    key: Tensor
    value: Tensor
    far_key: Tensor = None
    far_value: Tensor = None
    sink_logits: Tensor = None
    alibi_slopes: Tensor = None
    key_bias: Tensor = None
    far_bias: Tensor = None


def architecture() -> str:
    """The instruction set in use: avx512, avx2_fma, sse4_2, sse2 or neon64."""
    return library.cca_architecture().decode()


def use(architecture: str) -> None:
    """For tests and measurements: from now on every call uses this instruction set."""
    _library.check(library.cca_use(architecture.encode()))


def _is_torch(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _require(**tensors):
    """What is looked at before the library does."""
    for name, x in tensors.items():
        if not hasattr(x, "shape"):
            kind = type(x).__name__
            raise TypeError(f"cca: {name}: got {kind}, wants a tensor: NumPy's, PyTorch's, or any that has __dlpack__")
        if len(x.shape) == 0:
            raise ValueError(f"cca: {name}: got 0 dimensions, wants 4")


def _empty(like, extents, *, number=False, zero=False):
    """A tensor for results: of the elements of `like`, or of the type that those are computed in. PyTorch's have
    [batch, length, heads, dim] in memory, as the layer behind attention wants them."""
    if _is_torch(like):
        from . import torch as ops

        return ops.empty(like, extents, number, zero)
    import numpy

    dtype = like.dtype if hasattr(like, "dtype") else numpy.from_dlpack(like).dtype
    if number:
        dtype = numpy.float64 if dtype == numpy.float64 else numpy.float32
    return (numpy.zeros if zero else numpy.empty)(extents, dtype)


def _counts(x, like):
    """Lengths, offsets and counts as the library takes them: tensors of int64."""
    if x is None:
        return None
    if _is_torch(like) or _is_torch(x):
        import torch

        return x if isinstance(x, torch.Tensor) and x.dtype == torch.int64 else torch.as_tensor(x).to(torch.int64)
    if getattr(getattr(x, "dtype", None), "name", "") == "int64":
        return x
    import numpy

    x = numpy.asarray(x)
    return x.astype(numpy.int64) if x.dtype.kind in "iu" or x.size == 0 else x


_RANGES = [f"{rows}_{what}" for rows in ("query", "key", "far") for what in ("lengths", "begins", "offsets")]


def _ranges(like, *ranges):
    return {name: _counts(x, like) for name, x in zip(_RANGES, ranges)}


_THREADED = 2**21  # multiply-adds of queries and keys: less takes no longer than to make a thread


def _threads(threads, query, key):
    if threads is not None:
        return threads
    q, k = query.shape, key.shape
    if len(q) == len(k) == 4 and q[0] * q[1] * q[2] * q[3] * k[2] < _THREADED:
        return 1
    return _library.default_threads()


def _goes_through_ops(query, *more):
    """Whether PyTorch follows the call, and so has to see operators."""
    if not _is_torch(query):
        return False
    import torch

    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if type(query) is not torch.Tensor and type(query) is not torch.nn.Parameter:  # a fake one, say
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, *more))


def _no_outputs(**outputs):
    for name, x in outputs.items():
        if x is not None:
            raise ValueError(f"cca: {name}: got a tensor, wants None where PyTorch follows the call")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    sink_logits: Tensor = None,
    alibi_slopes: Tensor = None,
    key_bias: Tensor = None,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: dense and causal without options, a sliding window with `window`, Core Context Aware with `group_size`
    and `window`. See `Options`.

    query [batch, heads, query length, dim]; key [batch, kv heads, key length, dim]; value [batch, kv heads, key length,
    value dim]. kv heads divide heads.

    out [batch, heads, query length, value dim] and lse [batch, heads, query length], the natural log-sum-exp of each
    query's scores, are written where they are given, and made where not. Returns out, or (out, lse) with `return_lse`.

    sink_logits: a score per head that joins each softmax with a value of 0, [heads], [1 or batch, heads, 1] or
    [batch, heads, query length]. alibi_slopes: [heads] or [1 or batch, heads, 1]. key_bias: added to scores,
    [1 or batch, a divisor of heads, key length].

    Sequences of their own lengths: query_lengths and key_lengths [batch] for a batch that is padded behind, and for padding
    in front query_begins and key_begins [batch], too; or query_offsets and key_offsets [sequences + 1] (others call them
    cu_seqlens) for sequences one after the other in tensors of a batch of 1. What is padding of out and lse is not written, and 0 where they are made.

    threads: how many; None: PyTorch's number, or that of the processors. Results are the same for any, to the bit.
    """
    _require(query=query, key=key, value=value)
    ranges = _ranges(query, query_lengths, query_begins, query_offsets, key_lengths, key_begins, key_offsets)
    if _goes_through_ops(query, key, value, sink_logits, alibi_slopes, key_bias):
        from . import torch as ops

        _no_outputs(out=out, lse=lse)
        results = ops.attention(
            query, key, value, sink_logits, alibi_slopes, key_bias, *ranges.values(), options, threads
        )
        return results if return_lse else results[0]
    padded = query_lengths is not None or query_offsets is not None  # what is padding is not written
    if out is None:
        out = _empty(query, (*query.shape[:-1], value.shape[-1]), zero=padded)
    if lse is None and return_lse:
        lse = _empty(query, tuple(query.shape[:-1]), number=True, zero=padded)
    read = {
        "query": query, "key": key, "value": value, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes,
        "key_bias": key_bias, **ranges,
    }  # fmt: skip
    _library.run(library.cca_attention, read, {"out": out, "lse": lse}, options, _threads(threads, query, key))
    return (out, lse) if return_lse else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    seen: Tensor,
    *,
    far_bias: Tensor = None,
    far_positions: Tensor = None,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    sink_logits: Tensor = None,
    alibi_slopes: Tensor = None,
    key_bias: Tensor = None,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    far_lengths: Tensor = None,
    far_begins: Tensor = None,
    far_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over far context that the caller made, by any compressor, and the raw tokens of the window.

    far_key [batch, far heads, far length, dim], far_value [batch, far heads, far length, value dim], far heads a divisor of
    heads. seen [batch, heads, query length] of int64: the query sees the far rows [0, seen). far_bias: added to the scores
    of far rows, [1 or batch, a divisor of heads, far length]; far_positions: theirs for alibi_slopes, the same of int64.
    Everything else as for `attention`.
    """
    _require(query=query, key=key, value=value)
    ranges = _ranges(
        query, query_lengths, query_begins, query_offsets, key_lengths, key_begins, key_offsets, far_lengths, far_begins,
        far_offsets,
    )  # fmt: skip
    if _goes_through_ops(query, key, value, far_key, far_value, far_bias, sink_logits, alibi_slopes, key_bias):
        from . import torch as ops

        _no_outputs(out=out, lse=lse)
        results = ops.attend(
            query, key, value, far_key, far_value, _counts(seen, query), far_bias, _counts(far_positions, query),
            sink_logits, alibi_slopes, key_bias, *ranges.values(), options, threads,
        )  # fmt: skip
        return results if return_lse else results[0]
    padded = query_lengths is not None or query_offsets is not None  # what is padding is not written
    if out is None:
        out = _empty(query, (*query.shape[:-1], value.shape[-1]), zero=padded)
    if lse is None and return_lse:
        lse = _empty(query, tuple(query.shape[:-1]), number=True, zero=padded)
    read = {
        "query": query, "key": key, "value": value, "far_key": far_key, "far_value": far_value,
        "seen": _counts(seen, query), "far_bias": far_bias, "far_positions": _counts(far_positions, query),
        "sink_logits": sink_logits, "alibi_slopes": alibi_slopes, "key_bias": key_bias, **ranges,
    }  # fmt: skip
    _library.run(library.cca_attend, read, {"out": out, "lse": lse}, options, _threads(threads, query, key))
    return (out, lse) if return_lse else out


def pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    core_key: Tensor = None,
    core_value: Tensor = None,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    far_lengths: Tensor = None,
    far_begins: Tensor = None,
    far_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """The core tokens (core_key, core_value) of every complete group: [batch, core heads, groups, dim] and the same with the
    value's dim. The core heads are the query's, or the key's with `core_heads="per_kv_head"`, `pool="mean"` and
    `pool="max"`. Where keys have lengths or offsets of their own, give core_key, core_value and, as far_lengths or
    far_offsets, theirs."""
    _require(query=query, key=key, value=value)
    if core_key is None or core_value is None:
        group_size, sinks = options.get("group_size", 0), options.get("sink_tokens", 0)
        groups = max(0, key.shape[2] - sinks) // group_size if group_size > 0 else 0
        per_kv = options.get("core_heads") == "per_kv_head" or options.get("pool") in ("mean", "max")
        extents = (key.shape[0], (key if per_kv else query).shape[1], groups)
        core_key = _empty(query, (*extents, key.shape[3])) if core_key is None else core_key
        core_value = _empty(query, (*extents, value.shape[3])) if core_value is None else core_value
    ranges = _ranges(
        query, query_lengths, query_begins, query_offsets, key_lengths, key_begins, key_offsets, far_lengths, far_begins,
        far_offsets,
    )  # fmt: skip
    read = {"query": query, "key": key, "value": value, **ranges}
    written = {"core_key": core_key, "core_value": core_value}
    _library.run(library.cca_pool, read, written, options, _threads(threads, key, key))
    return core_key, core_value


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor = None,
    lse: Tensor = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Joins the results (out, lse) of attention to two disjoint parts of a context into those of the whole."""
    _require(out_a=out_a, lse_a=lse_a)
    out = _empty(out_a, tuple(out_a.shape)) if out is None else out
    lse = _empty(out_a, tuple(lse_a.shape), number=True) if lse is None else lse
    read = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    _library.run(library.cca_merge, read, {"out": out, "lse": lse}, {}, threads)
    return out, lse


def _gradient(function, read, wanted, options, threads):
    """Runs a gradient and returns it, with what `wanted` names of the operands in `read`."""
    _require(query=read["query"], key=read["key"])
    read = {name: _counts(x, read["query"]) if name in _COUNTS else x for name, x in read.items()}
    padded = any(x is not None for name, x in read.items() if name.endswith(("_lengths", "_offsets")))
    written = {}
    for name in Gradients._fields:
        if name in wanted and read.get(name) is not None:
            written["grad_" + name] = _empty(read["query"], tuple(read[name].shape), number=True, zero=padded)
    _library.run(function, read, written, options, _threads(threads, read["query"], read["key"]))
    return Gradients(**{name: written.get("grad_" + name) for name in Gradients._fields})


_COUNTS = {"seen", "far_positions", *_RANGES}
_INPUTS = {"query", "key", "value", "sink_logits", "alibi_slopes", "key_bias"}


def attention_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor = None,
    *,
    sink_logits: Tensor = None,
    alibi_slopes: Tensor = None,
    key_bias: Tensor = None,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """The gradients of `attention`: out and lse are what it returned, grad_out and grad_lse come in. A caller of PyTorch has
    them by backward()."""
    read = dict(locals())
    del read["threads"], read["options"]
    return _gradient(library.cca_attention_gradient, read, _INPUTS, options, threads)


def attend_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    seen: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor = None,
    *,
    far_bias: Tensor = None,
    far_positions: Tensor = None,
    sink_logits: Tensor = None,
    alibi_slopes: Tensor = None,
    key_bias: Tensor = None,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    far_lengths: Tensor = None,
    far_begins: Tensor = None,
    far_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """The gradients of `attend`, of the far context, too."""
    read = dict(locals())
    del read["threads"], read["options"]
    wanted = _INPUTS | {"far_key", "far_value", "far_bias"}
    return _gradient(library.cca_attend_gradient, read, wanted, options, threads)


def pool_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_core_key: Tensor,
    grad_core_value: Tensor,
    *,
    query_lengths: Tensor = None,
    query_begins: Tensor = None,
    query_offsets: Tensor = None,
    key_lengths: Tensor = None,
    key_begins: Tensor = None,
    key_offsets: Tensor = None,
    far_lengths: Tensor = None,
    far_begins: Tensor = None,
    far_offsets: Tensor = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """The gradients of `pool`, of query, key and value."""
    read = dict(locals())
    del read["threads"], read["options"]
    return _gradient(library.cca_pool_gradient, read, {"query", "key", "value"}, options, threads)


class CacheShape(NamedTuple):
    """What a cache holds."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    capacity: int
    rewind: int


_DATA_TYPES = {"float32": (2, 32), "float64": (2, 64), "bfloat16": (4, 16), "float16": (2, 16)}


def _data_type(dtype):
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if name not in _DATA_TYPES:
        raise ValueError(f"cca: dtype: got {name}, wants one of {', '.join(_DATA_TYPES)}")
    return _library.DataType(*_DATA_TYPES[name], 1)


class KvCache:
    """The keys and values that attention with these options can still see: cores, and the raw tokens of the window and the
    sinks. Tokens are appended one or many at a time; what `attend` answers is what `attention` gives for the whole
    sequence, within rounding, however it was cut.

    batch: sequences. heads, kv_heads: of queries, and of keys and values. dim, value_dim: of keys, and of values (0: the
    same). capacity: tokens per sequence for which memory is taken at once (0: as they come). rewind: tokens that `truncate`
    can take back. dtype: float32, float64, bfloat16 or float16, by name or as NumPy's or PyTorch's.

    One thread at a time may use a cache. A call that raises leaves it as it was. Caches can be pickled and copied.
    """

    def __init__(
        self,
        *,
        batch: int = 1,
        heads: int,
        kv_heads: int,
        dim: int,
        value_dim: int = 0,
        capacity: int = 0,
        rewind: int = 0,
        dtype: Any = "float32",
        **options: Unpack[Options],
    ):
        self._cache = ctypes.c_void_p()
        self._type = _data_type(dtype)
        sizes = [_library._int64("shape", x) for x in (batch, heads, kv_heads, dim, value_dim, capacity, rewind)]
        shape = _library.CacheShape(ctypes.sizeof(_library.CacheShape), *sizes)
        settings = _library.options_of(tuple(options.items()))
        _library.check(
            library.cca_cache_make(ctypes.byref(self._cache), ctypes.byref(shape), self._type, ctypes.byref(settings))
        )
        self._unit = settings.unit

    def __del__(self):
        if getattr(self, "_cache", None):
            library.cca_cache_free(self._cache)

    def _step(self, function, sequence, read, written, threads):
        def call(arguments):
            return function(self._cache, -1 if sequence is None else _library._int64("sequence", sequence), arguments)

        if threads is None:
            keys = self.length(0 if sequence is None else sequence) + read["key"].shape[2] if self.shape.batch else 0
            size = 1
            for extent in read["query"].shape:
                size *= extent
            threads = 1 if size * keys < _THREADED else _library.default_threads()
        _library.run(call, read, written, {}, threads)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sequence: int | None = None,
        out: Tensor = None,
        lse: Tensor = None,
        return_lse: bool = False,
        sink_logits: Tensor = None,
        alibi_slopes: Tensor = None,
        threads: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends the tokens, then answers their queries: query [batch, heads, new tokens, dim], key and value
        [batch, kv heads, new tokens, dim]. With `sequence` it alone grows, and the batch is 1. Returns as `attention`."""
        _require(query=query, key=key, value=value)
        out = _empty(query, (*query.shape[:-1], value.shape[-1])) if out is None else out
        if lse is None and return_lse:
            lse = _empty(query, tuple(query.shape[:-1]), number=True)
        read = {"query": query, "key": key, "value": value, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes}
        self._step(library.cca_cache_attend, sequence, read, {"out": out, "lse": lse}, threads)
        return (out, lse) if return_lse else out

    def append(
        self, query: Tensor, key: Tensor, value: Tensor, *, sequence: int | None = None, threads: int | None = None
    ) -> None:
        """Appends tokens without answering."""
        _require(query=query, key=key, value=value)
        self._step(library.cca_cache_append, sequence, {"query": query, "key": key, "value": value}, {}, threads)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back the tokens of a sequence from `length` on; see `least_length`."""
        _library.check(
            library.cca_cache_truncate(
                self._cache, _library._int64("sequence", sequence), _library._int64("length", length)
            )
        )

    def reset(self, sequence: int | None = None) -> None:
        """Empties a sequence, or all."""
        which = -1 if sequence is None else _library._int64("sequence", sequence)
        _library.check(library.cca_cache_reset(self._cache, which))

    def fork(self, source: int, to: int) -> None:
        """Makes sequence `to` a copy of sequence `source`."""
        _library.check(
            library.cca_cache_fork(self._cache, _library._int64("source", source), _library._int64("to", to))
        )

    def _counts(self, sequence):
        counts = _library.CacheCounts()
        which = _library._int64("sequence", sequence)
        _library.check(library.cca_cache_get_counts(self._cache, which, ctypes.byref(counts)))
        return counts

    def length(self, sequence: int = 0) -> int:
        """Tokens appended to a sequence."""
        return self._counts(sequence).length

    def core_count(self, sequence: int = 0) -> int:
        """Core tokens of a sequence, per core head."""
        return self._counts(sequence).cores

    def raw_count(self, sequence: int = 0) -> int:
        """Raw tokens that are kept of a sequence, per kv head."""
        return self._counts(sequence).raw

    def least_length(self, sequence: int = 0) -> int:
        """The least length to which `truncate` can take a sequence."""
        return self._counts(sequence).least_length

    def _bytes(self):
        held, allocated = ctypes.c_size_t(), ctypes.c_size_t()
        _library.check(library.cca_cache_get_bytes(self._cache, ctypes.byref(held), ctypes.byref(allocated)))
        return held.value, allocated.value

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return self._bytes()[0]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the memory taken for it."""
        return self._bytes()[1]

    @property
    def shape(self) -> CacheShape:
        """What it was made with, the defaults filled in."""
        shape = _library.CacheShape(ctypes.sizeof(_library.CacheShape))
        _library.check(library.cca_cache_get_shape(self._cache, ctypes.byref(shape)))
        return CacheShape(*(getattr(shape, name) for name in CacheShape._fields))

    def save(self, file) -> None:
        """Writes it to a binary file."""
        errors = []

        @_library.WRITE
        def write(_, data, size):
            try:
                file.write(ctypes.string_at(data, size))
                return size
            except Exception as error:
                errors.append(error)
                return 0

        status = library.cca_cache_save(self._cache, write, None)
        if errors:
            raise errors[0]
        _library.check(status)

    @classmethod
    def load(cls, file, dtype: Any = "float32", unit: str = "none") -> "KvCache":
        """Reads one from a binary file, which has to be of these elements. The unit of products is not in it."""
        errors = []

        @_library.READ
        def read(_, data, size):
            try:
                got = file.read(size)
                ctypes.memmove(data, got, len(got))
                return len(got)
            except Exception as error:
                errors.append(error)
                return 0

        self = cls.__new__(cls)
        self._cache, self._type = ctypes.c_void_p(), _data_type(dtype)
        self._unit = _library.options_of((("unit", unit),)).unit
        status = library.cca_cache_load(ctypes.byref(self._cache), self._type, self._unit, read, None)
        if errors:
            raise errors[0]
        _library.check(status)
        return self

    def __reduce__(self):
        file = io.BytesIO()
        self.save(file)
        name = {type_: name for name, type_ in _DATA_TYPES.items()}[self._type.code, self._type.bits]
        return _loaded, (file.getvalue(), name, _library.ENUMS["unit"][self._unit])


def _loaded(data, dtype, unit):
    return KvCache.load(io.BytesIO(data), dtype, unit)
