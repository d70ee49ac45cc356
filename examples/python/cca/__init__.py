"""Core Context Aware attention for CPUs (arXiv 2412.12465): far context is pooled group by group into core tokens, near
context stays raw, and one softmax runs over both.

    import cca
    out = cca.attention(q, k, v, group_size=16, window=1024)

Tensors are NumPy's, PyTorch's, or those of whatever speaks DLPack, in the processor's memory, with any strides but a
contiguous last dimension: nothing is copied. Their extents are [batch, heads, length, dim] whatever their order in memory;
for [batch, length, heads, dim] say q.transpose(1, 2) in PyTorch and q.swapaxes(1, 2) in NumPy. Elements are float32,
float64, bfloat16 (PyTorch, ml_dtypes) or float16, the same in all tensors of a call. Log-sum-exps, sink logits, slopes,
biases and gradients are float64 for float64 and float32 for all else. Beside a query of float32, keys and values may be int8
with a scale per row: see cca.quantize.

PyTorch's autograd and torch.compile go through cca.attention and cca.attend as through any operator; see cca.torch. For
models of Hugging Face's transformers see cca.hf. Wrong arguments raise ValueError before anything is written.
"""

import ctypes
import inspect
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
    "architecture",
    "attend",
    "attend_gradient",
    "attention",
    "attention_gradient",
    "merge",
    "pool",
    "pool_gradient",
    "quantize",
    "use",
]
__version__ = library.cca_version().decode()

Tensor = Any
"""A tensor of NumPy, PyTorch, or anything with __dlpack__."""


class Options(TypedDict, total=False):
    """Options, of every function and of a cache. Without any, attention is causal and dense.

    group_size      tokens per core; 0: nothing is pooled
    window          tokens that stay raw, at least 1, the current one among them; None: all
    sink_tokens     first tokens of a sequence that stay raw for every query; groups begin behind them
    lookahead       tokens behind the query's position that it sees, too; UNLIMITED: all; without groups
    prefix          first tokens of a sequence that every query sees; without groups
    pool            how a group becomes a core
    core_heads      who has cores of his own
    core_bias       what is added to the scores of cores
    softmax_scale   None: 1 / sqrt(dim)
    pooling_scale   a factor on the scale of the weights of pooling
    softcap         a score x becomes softcap tanh(x / softcap); 0: it stays
    first_position  the position of query 0; None: the last query is the last key
    unit            what multiplies operands of 16 bits
    """

    group_size: int
    window: int | None
    sink_tokens: int
    lookahead: int
    prefix: int
    pool: Literal["last_query", "mean", "max", "select", "select_by_mass"]
    core_heads: Literal["per_query_head", "per_kv_head"]
    core_bias: Literal["none", "entropy"]
    softmax_scale: float | None
    pooling_scale: float
    softcap: float
    first_position: int | None
    unit: Literal["none", "best", "avx512_bf16", "amx", "vnni"]


class Terms(TypedDict, total=False):
    """What scores have beside queries and keys.

    sink_logits   a score per head that joins each softmax with a value of 0: [heads], [1 or batch, heads, 1] or
                  [batch, heads, query length]
    alibi_slopes  [heads] or [1 or batch, heads, 1]
    key_bias      added to scores: [1 or batch, a divisor of heads, key length]; without groups
    """

    sink_logits: Tensor
    alibi_slopes: Tensor
    key_bias: Tensor


class Scales(TypedDict, total=False):
    """Of rows of int8, and of no others; the query is float32, and there are no gradients.

    key_scales, value_scales  the numbers of a row are its elements times its scale: float32 [batch, kv heads, key length]
    """

    key_scales: Tensor
    value_scales: Tensor


class Lengths(TypedDict, total=False):
    """Sequences of their own lengths, in integers.

    query_lengths, key_lengths  [batch], of a batch that is padded behind its tokens
    query_begins, key_begins    [batch], beside them, of one that is padded before its tokens
    query_offsets, key_offsets  [sequences + 1], others call them cu_seqlens: sequences lie one after the other in tensors of
                                a batch of 1
    """

    query_lengths: Tensor
    query_begins: Tensor
    query_offsets: Tensor
    key_lengths: Tensor
    key_begins: Tensor
    key_offsets: Tensor


class FarLengths(TypedDict, total=False):
    """far_lengths, far_begins, far_offsets: the same of far rows, or of cores."""

    far_lengths: Tensor
    far_begins: Tensor
    far_offsets: Tensor


class FarRows(TypedDict, total=False):
    """What belongs to far rows, and who sees them beside or in place of `seen`.

    far_bias         added to their scores: [1 or batch, a divisor of heads, far length]
    far_positions    theirs, for alibi_slopes: the same, of integers
    visible_from     row j is seen by the queries at the positions [visible_from[j], visible_until[j]), each with or without
    visible_until    the other: the same, of integers
    selected_blocks  which blocks of rows a block of queries sees, in place of the two: [1 or batch, a divisor of heads,
                     blocks of queries, most], ascending, -1 behind the last. Those of a sequence count from its first query;
                     with query_offsets they lie one after the other, as the sequences do
    block_rows       block c is the rows [c block_rows, (c + 1) block_rows); 1 where it is not given
    block_queries    list i is for the queries [i block_queries, (i + 1) block_queries); 1 where it is not given
    """

    far_bias: Tensor
    far_positions: Tensor
    visible_from: Tensor
    visible_until: Tensor
    selected_blocks: Tensor
    block_rows: int
    block_queries: int


class FarScales(TypedDict, total=False):
    """far_key_scales, far_value_scales: those of far rows, [batch, far heads, far length], whatever the other rows are."""

    far_key_scales: Tensor
    far_value_scales: Tensor


class AttentionArguments(Options, Terms, Scales, Lengths, total=False):
    """Keyword arguments of `attention`: `Options`, `Terms`, `Scales` and `Lengths`."""


class AttendArguments(AttentionArguments, FarRows, FarScales, FarLengths, total=False):
    """Keyword arguments of `attend`: those of `attention`, `FarRows`, `FarScales` and `FarLengths`."""


class PoolArguments(Options, Lengths, FarLengths, total=False):
    """Keyword arguments of `pool`: `Options`, `Lengths`, and `FarLengths` of the cores."""


def _takes(*arguments):
    """Says in a function's documentation which of the arguments above it takes."""

    def document(function):
        function.__doc__ = "\n\n".join(inspect.cleandoc(x.__doc__) for x in (function, *arguments))
        return function

    return document


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
    name = library.cca_architecture()
    if name is None:
        raise RuntimeError(library.cca_error().decode())
    return name.decode()


def use(architecture: str) -> None:
    """For tests and measurements: from now on every call uses this instruction set."""
    _library.check(library.cca_use(architecture.encode()))


def _is_torch(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


_operators_of = {}
"""cca.torch by the types of its tensors, as far as they have been seen."""


def _operators(x):
    """The module of PyTorch's operators where a tensor is PyTorch's, else None."""
    found = _operators_of.get(type(x))
    if found is None and _is_torch(x):
        from . import torch as found

        _operators_of[type(x)] = found
    return found


_INTEGERS = frozenset(
    {"seen", "far_positions", "visible_from", "visible_until", "selected_blocks"}
    | {*Lengths.__annotations__, *FarLengths.__annotations__}
)
_TENSORS = _INTEGERS | {*Terms.__annotations__, *Scales.__annotations__, *FarScales.__annotations__, "far_bias"}


def _integers(name, x, like):
    """Lengths, offsets and counts as the library takes them: tensors of int64."""
    if _is_torch(like) or _is_torch(x):
        import torch

        if isinstance(x, torch.Tensor) and x.dtype == torch.int64:
            return x
        x = torch.as_tensor(x)
        whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        if whole or x.numel() == 0:
            return x.to(torch.int64)
        raise ValueError(f"cca: {name}: got {str(x.dtype).removeprefix('torch.')}, wants integers")
    if getattr(getattr(x, "dtype", None), "name", "") == "int64" and getattr(x.dtype, "isnative", True):
        return x
    import numpy

    x = numpy.asarray(x)
    if x.dtype.kind in "iu" or x.size == 0:
        return x.astype(numpy.int64)
    raise ValueError(f"cca: {name}: got {x.dtype.name}, wants integers")


def _split(operands, given, known):
    """Adds the tensors among keyword arguments, of which some are known, to the operands; returns the options."""
    if len(operands) == 3 and _TENSORS.isdisjoint(given):
        return given
    options = {}
    for name, x in given.items():
        if name not in _TENSORS:
            options[name] = x
        elif x is None:
            continue
        elif name not in known:
            raise TypeError(f"cca: {name}: got a {type(x).__name__}, wants none: this function has no use for it")
        else:
            operands[name] = x
    for name, x in operands.items():
        if name in _INTEGERS:
            operands[name] = _integers(name, x, operands["query"])
    return options


def _sizes(operands):
    """(extents of the output, multiply-adds)"""
    try:
        b, h, n, d = operands["query"].shape
        _, _, keys, _ = operands["key"].shape
        _, _, _, value_dim = operands["value"].shape
        return (b, h, n, value_dim), b * h * n * d * keys
    except (AttributeError, ValueError):
        for name in ("query", "key", "value"):
            _require_tensor(name, operands[name])
            if len(operands[name].shape) != 4:
                raise ValueError(f"cca: {name}: got {len(operands[name].shape)} dimensions, wants 4") from None
        raise


def _pool_sizes(operands):
    """The same of pooling, where each key meets one query per head."""
    extents, _ = _sizes(operands)
    b, h, n, d = operands["query"].shape
    return extents, b * h * n * d


def _require_tensor(name, x):
    if not hasattr(x, "shape"):
        kind = type(x).__name__
        raise TypeError(f"cca: {name}: got {kind}, wants a tensor: NumPy's, PyTorch's, or any that has __dlpack__")


def _empty(like, extents, *, number=False, zero=False, dtype=None):
    """A tensor for results: of the elements of `like`, of the type that those are computed in, or of another, by name.
    PyTorch's have [batch, length, heads, dim] in memory, as the layer behind attention wants them."""
    operators = _operators(like)
    if operators is not None:
        return operators.empty(like, extents, number, zero, dtype)
    import numpy

    if dtype is None:
        dtype = like.dtype if hasattr(like, "dtype") else numpy.from_dlpack(like).dtype
    if number:
        dtype = numpy.float64 if dtype == numpy.float64 else numpy.float32
    return (numpy.zeros if zero else numpy.empty)(extents, dtype)


def _answer(name, operands, out, lse, return_lse, threads, given, known):
    """What `attention` and `attend` have in common."""
    options = _split(operands, given, known) if given or len(operands) > 3 else given
    operators = _operators_of.get(type(operands["query"])) or _operators(operands["query"])
    if operators is not None:
        followed = operators.who_follows(operands.values())
        if followed:
            for what, x in (("out", out), ("lse", lse)):
                if x is not None:
                    raise ValueError(f"cca: {what}: got a tensor, wants None where PyTorch follows the call")
            return operators.OPERATORS[name](followed, operands, options, threads, return_lse)
    extents, work = _sizes(operands)
    padded = len(operands) > 3 and _library.has_padding(operands)
    if out is None:
        out = _empty(operands["query"], extents, zero=padded)
    if lse is None and return_lse:
        lse = _empty(operands["query"], extents[:3], number=True, zero=padded)
    written = {"out": out} if lse is None else {"out": out, "lse": lse}
    plan = _library.plan_of("cca_" + name, tuple(operands), tuple(written), options)
    plan((*operands.values(), *written.values()), _library.threads_of(threads, work))
    return (out, lse) if return_lse else out


# The tensors among the keyword arguments of each.
_ATTENTION = _TENSORS.intersection(AttentionArguments.__annotations__)
_ATTEND = _TENSORS.intersection(AttendArguments.__annotations__)
_POOL = _TENSORS.intersection(PoolArguments.__annotations__)


@_takes(Terms, Scales, Lengths, Options)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    threads: int | None = None,
    **arguments: Unpack[AttentionArguments],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: dense and causal without options, a sliding window with `window`, Core Context Aware with `group_size`
    and `window`.

    query [batch, heads, query length, dim]; key [batch, kv heads, key length, dim]; value [batch, kv heads, key length,
    value dim]. kv heads divide heads.

    out [batch, heads, query length, value dim] and lse [batch, heads, query length], the natural log-sum-exp of each
    query's scores, are written where they are given, and made where not. Returns out, or (out, lse) with `return_lse`.
    What is padding of out and lse is not written, and 0 where they are made.

    threads: how many; None: PyTorch's number, or that of the processors. Results are the same for any, to the bit.
    """
    operands = {"query": query, "key": key, "value": value}
    return _answer("attention", operands, out, lse, return_lse, threads, arguments, _ATTENTION)


def _with_far_rows(query, key, value, far_key, far_value, seen):
    operands = {"query": query, "key": key, "value": value, "far_key": far_key, "far_value": far_value}
    return operands if seen is None else operands | {"seen": seen}


@_takes(FarRows, Terms, Scales, FarScales, Lengths, FarLengths, Options)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    seen: Tensor = None,
    *,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    threads: int | None = None,
    **arguments: Unpack[AttendArguments],
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over far context that the caller made, by any compressor, and the raw tokens of the window.

    far_key [batch, far heads, far length, dim], far_value [batch, far heads, far length, value dim], far heads a divisor of
    heads. seen [batch, heads, query length] of integers: the query sees the far rows [0, seen). It may be missing where
    other arguments say who sees what. Everything else as for `attention`.
    """
    operands = _with_far_rows(query, key, value, far_key, far_value, seen)
    return _answer("attend", operands, out, lse, return_lse, threads, arguments, _ATTEND)


def _refuse_followed(function, tensors):
    """Of functions that autograd does not see: their results would be constants to it."""
    for name, x in tensors.items():
        operators = _operators(x)
        if operators is not None and operators.who_follows((x,)) == operators.AUTOGRAD:
            raise ValueError(
                f"cca: {name}: got a tensor that requires gradients, wants none: {function} has no backward()"
            )


@_takes(Lengths, FarLengths, Options)
def pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    core_key: Tensor = None,
    core_value: Tensor = None,
    threads: int | None = None,
    **arguments: Unpack[PoolArguments],
) -> tuple[Tensor, Tensor]:
    """The core tokens (core_key, core_value) of every complete group: [batch, core heads, groups, dim] and the same with the
    value's dim. The core heads are the query's, or the key's with `core_heads="per_kv_head"`, `pool="mean"` and
    `pool="max"`. Where keys have lengths or offsets of their own, give core_key, core_value and, as far_lengths or
    far_offsets, theirs. PyTorch's autograd does not see it: see `pool_gradient`."""
    operands = {"query": query, "key": key, "value": value}
    options = _library.plain(_split(operands, arguments, _POOL))
    _, work = _pool_sizes(operands)
    _refuse_followed("pool", operands)
    if core_key is None or core_value is None:
        group_size, sinks = options.get("group_size") or 0, options.get("sink_tokens") or 0
        groups = max(0, key.shape[2] - sinks) // group_size if group_size > 0 else 0
        made = _empty_cores(query, key, value, key.shape[0], groups, options)
        core_key, core_value = (m if x is None else x for m, x in zip(made, (core_key, core_value)))
    written = {"core_key": core_key, "core_value": core_value}
    _library.run("cca_pool", operands, written, options, _library.threads_of(threads, work))
    return core_key, core_value


def _empty_cores(query, key, value, batch, groups, options):
    """Tensors for the cores of so many groups."""
    per_kv = options.get("core_heads") == "per_kv_head" or options.get("pool") in ("mean", "max")
    extents = batch, (key if per_kv else query).shape[1], groups
    return _empty(query, (*extents, key.shape[3])), _empty(query, (*extents, value.shape[3]))


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
    """Joins the results (out, lse) of attention to two disjoint parts of a context into those of the whole. PyTorch's
    autograd does not see it."""
    read = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in read.items():
        _require_tensor(name, x)
    _refuse_followed("merge", read)
    out = _empty(out_a, tuple(out_a.shape)) if out is None else out
    lse = _empty(out_a, tuple(lse_a.shape), number=True) if lse is None else lse
    _library.run("cca_merge", read, {"out": out, "lse": lse}, {}, _library.threads_of(threads, 0))
    return out, lse


def quantize(rows: Tensor, *, to: Tensor = None, scales: Tensor = None) -> tuple[Tensor, Tensor]:
    """Rounds rows [batch, heads, length, dim] to int8, as a cache of int8 does: the scale of a row is its largest magnitude
    over 127, its elements are the nearest whole numbers to number / scale, ties to even. A row of zeros has the scale 0, a
    row that is not finite the scale NaN, which whoever sees it sees. Returns (int8 of the same extents, float32 [batch, heads,
    length]), which are made where they are not given. PyTorch's autograd does not see it."""
    _require_tensor("rows", rows)
    if len(rows.shape) != 4:
        raise ValueError(f"cca: rows: got {len(rows.shape)} dimensions, wants 4")
    _refuse_followed("quantize", {"rows": rows})
    if to is None:
        to = _empty(rows, tuple(rows.shape), dtype="int8")
    if scales is None:
        scales = _empty(rows, tuple(rows.shape[:3]), dtype="float32")
    _library.quantize(rows, to, scales)
    return to, scales


def _gradient(function, operands, incoming, threads, given, known, sizes=_sizes, before=()):
    """Runs a gradient: of the operands that have one, with what comes in. before: arguments before the call."""
    options = _split(operands, given, known)
    _, work = sizes(operands)
    wanted = {name: x for name, x in operands.items() if name in Gradients._fields}
    operands |= {name: x for name, x in incoming.items() if x is not None}
    _refuse_followed("a gradient", operands)
    padded = _library.has_padding(operands)
    written = {name: _empty(operands["query"], tuple(x.shape), number=True, zero=padded) for name, x in wanted.items()}
    _library.run(
        function,
        operands,
        {"grad_" + name: x for name, x in written.items()},
        options,
        _library.threads_of(threads, work),
        *before,
    )
    return Gradients(**{name: written.get(name) for name in Gradients._fields})


def attention_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor = None,
    *,
    threads: int | None = None,
    **arguments: Unpack[AttentionArguments],
) -> Gradients:
    """The gradients of `attention`: out and lse are what it returned, grad_out and grad_lse come in. A caller of PyTorch has
    them by backward()."""
    operands = {"query": query, "key": key, "value": value}
    incoming = {"out": out, "lse": lse, "grad_out": grad_out, "grad_lse": grad_lse}
    return _gradient("cca_attention_gradient", operands, incoming, threads, arguments, _ATTENTION)


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
    threads: int | None = None,
    **arguments: Unpack[AttendArguments],
) -> Gradients:
    """The gradients of `attend`, of the far context, too."""
    operands = _with_far_rows(query, key, value, far_key, far_value, seen)
    incoming = {"out": out, "lse": lse, "grad_out": grad_out, "grad_lse": grad_lse}
    return _gradient("cca_attend_gradient", operands, incoming, threads, arguments, _ATTEND)


def pool_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_core_key: Tensor,
    grad_core_value: Tensor,
    *,
    threads: int | None = None,
    **arguments: Unpack[PoolArguments],
) -> Gradients:
    """The gradients of `pool`, of query, key and value."""
    operands = {"query": query, "key": key, "value": value}
    incoming = {"grad_core_key": grad_core_key, "grad_core_value": grad_core_value}
    return _gradient("cca_pool_gradient", operands, incoming, threads, arguments, _POOL, _pool_sizes)


class CacheShape(NamedTuple):
    """What a cache holds."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    capacity: int
    rewind: int


_DATA_TYPES = {"float32": (2, 32), "float64": (2, 64), "bfloat16": (4, 16), "float16": (2, 16), "int8": (0, 8)}


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
    can take back. dtype: float32, float64, bfloat16, float16 or int8, by name or as NumPy's or PyTorch's. A cache of int8 holds
    tokens and cores as `quantize` rounds them, in 0.26 of the bytes of float32, and takes and gives float32; keys and values that
    are int8 already, with their scales, it keeps as they are.

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
        sizes = zip(CacheShape._fields, (batch, heads, kv_heads, dim, value_dim, capacity, rewind))
        sizes = [_library.int64("shape." + name, x) for name, x in sizes]
        shape = _library.CacheShape(ctypes.sizeof(_library.CacheShape), *sizes)
        settings = _library.options_of(options)
        _library.check(
            library.cca_cache_make(ctypes.byref(self._cache), ctypes.byref(shape), self._type, ctypes.byref(settings))
        )
        self._unit = settings.unit
        self._remember_shape()

    def _remember_shape(self):
        shape = _library.CacheShape(ctypes.sizeof(_library.CacheShape))
        _library.check(library.cca_cache_get_shape(self._cache, ctypes.byref(shape)))
        self._shape = CacheShape(*(getattr(shape, name) for name in CacheShape._fields))

    def __del__(self):
        if getattr(self, "_cache", None):
            library.cca_cache_free(self._cache)

    def _step(self, function, sequence, read, written, threads):
        _refuse_followed("a cache", read)
        read = {name: x for name, x in read.items() if x is not None}
        (*extents, _), work = _sizes(read)
        if threads is None and self._shape.batch:
            counts = self._counts(sequence or 0)
            work += extents[0] * extents[1] * extents[2] * self._shape.dim * (counts.cores + counts.raw)
        number = -1 if sequence is None else _library.int64("sequence", sequence)
        _library.run(function, read, written, {}, _library.threads_of(threads, work), self._cache, number)

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
        key_scales: Tensor = None,
        value_scales: Tensor = None,
        threads: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends the tokens, then answers their queries: query [batch, heads, new tokens, dim], key and value
        [batch, kv heads, new tokens, dim], which in a cache of int8 may be int8 with key_scales and value_scales
        [batch, kv heads, new tokens]. With `sequence` it alone grows, and the batch is 1. Returns as `attention`."""
        read = {"query": query, "key": key, "value": value, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes}
        read |= {"key_scales": key_scales, "value_scales": value_scales}
        if out is None or (lse is None and return_lse):
            extents, _ = _sizes(read)
            out = _empty(query, extents) if out is None else out
            lse = _empty(query, extents[:3], number=True) if lse is None and return_lse else lse
        self._step("cca_cache_attend", sequence, read, {"out": out, "lse": lse}, threads)
        return (out, lse) if return_lse else out

    def append(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sequence: int | None = None,
        key_scales: Tensor = None,
        value_scales: Tensor = None,
        threads: int | None = None,
    ) -> None:
        """Appends tokens, as `attend` takes them, without answering."""
        read = {"query": query, "key": key, "value": value, "key_scales": key_scales, "value_scales": value_scales}
        self._step("cca_cache_append", sequence, read, {}, threads)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back the tokens of a sequence from `length` on; see `least_length`."""
        _library.check(
            library.cca_cache_truncate(
                self._cache, _library.int64("sequence", sequence), _library.int64("length", length)
            )
        )

    def reset(self, sequence: int | None = None) -> None:
        """Empties a sequence, or all."""
        which = -1 if sequence is None else _library.int64("sequence", sequence)
        _library.check(library.cca_cache_reset(self._cache, which))

    def fork(self, source: int, to: int) -> None:
        """Makes sequence `to` a copy of sequence `source`."""
        _library.check(library.cca_cache_fork(self._cache, _library.int64("source", source), _library.int64("to", to)))

    def _counts(self, sequence):
        counts = _library.CacheCounts()
        which = _library.int64("sequence", sequence)
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
        return self._shape

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
        self._unit = _library.options_of({"unit": unit}).unit
        status = library.cca_cache_load(ctypes.byref(self._cache), self._type, self._unit, read, None)
        if errors:
            raise errors[0]
        _library.check(status)
        self._remember_shape()
        return self

    def __reduce__(self):
        file = io.BytesIO()
        self.save(file)
        name = {type_: name for name, type_ in _DATA_TYPES.items()}[self._type.code, self._type.bits]
        return _loaded, (file.getvalue(), name, _library.ENUMS["unit"][self._unit])


def _loaded(data, dtype, unit):
    return KvCache.load(io.BytesIO(data), dtype, unit)
