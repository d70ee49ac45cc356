"""Attention across the ranks of an MPI communicator: each holds some tokens of every sequence, and all of them together get
what one process would.

    from mpi4py import MPI
    import cca.mpi
    ranks = cca.mpi.Ranks(MPI.COMM_WORLD)
    layout = cca.mpi.Layout.head_to_tail(ranks.size, [length])
    out = cca.mpi.attention(ranks, layout, q, k, v, group_size=16, window=1024)

A rank's tensors hold the tokens of its segments one after the other, [1, heads, tokens, dim], in the order of
`layout.segments_of(ranks.rank)`; a rank without segments has none. Every rank makes the same calls, with the same options.
Where one refuses its arguments, all of them raise. A rank that ends otherwise in the middle leaves the others waiting, as in
all of MPI.

It needs libcca_mpi, which the wheel has where it was built with MPI, and mpi4py for the same MPI. Its kernels are those of
the machine that compiled it: `cca.use` has no say in them.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import pathlib
import threading
from typing import Any, NamedTuple, Unpack

from mpi4py import MPI

from . import (
    FarRows,
    Gradients,
    Options,
    Tensor,
    Terms,
    _data_type,
    _empty,
    _empty_cores,
    _gradient,
    _integers,
    _library,
    _operators,
    _pool_sizes,
    _refuse_followed,
    _sizes,
    _split,
)

__all__ = ["KvCache", "Layout", "Ranks", "Segment", "attend", "attention", "attention_gradient", "merge", "pool"]


class _Segment(ctypes.Structure):
    """cca_mpi_segment"""

    _fields_ = [(name, ctypes.c_int64) for name in ("rank", "sequence", "begin", "end")]


_path = os.environ.get("CCA_MPI_LIBRARY") or str(pathlib.Path(__file__).parent / "libcca_mpi.so")
if not pathlib.Path(_path).exists():
    raise ImportError(f"cca: no {_path}: cca.mpi needs a wheel that was built with MPI")
_mpi = ctypes.CDLL(_path)
_mpi.cca_mpi_error.restype = _mpi.cca_mpi_library.restype = ctypes.c_char_p
if _mpi.cca_mpi_library().decode() != MPI.Get_library_version().rstrip("\0"):
    raise ImportError(
        f"cca: {_path} was built with {_mpi.cca_mpi_library().decode()}, mpi4py has {MPI.Get_library_version()}: "
        "their communicators are not the same"
    )
_mpi.cca_mpi_ranks_make.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
for _free in (_mpi.cca_mpi_ranks_free, _mpi.cca_mpi_layout_free, _mpi.cca_mpi_cache_free):
    _free.argtypes, _free.restype = [ctypes.c_void_p], None
_mpi.cca_mpi_layout_make.argtypes = [
    ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
]  # fmt: skip
_mpi.cca_mpi_layout_segments.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_mpi.cca_mpi_layout_segment.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
_mpi.cca_mpi_refuse.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_mpi.cca_mpi_cache_make.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, _library.DataType, ctypes.c_void_p, ctypes.c_int64,
]  # fmt: skip
_mpi.cca_mpi_cache_get_counts.argtypes = [ctypes.c_void_p, ctypes.c_void_p]


def _check(status):
    _library.check(status, _mpi.cca_mpi_error)


_calls = threading.local()


def _counted(name, *before):
    """What `_together` sees."""
    function = getattr(_mpi, name)
    function.argtypes = [*before, ctypes.c_void_p]

    def call(*arguments):
        _calls.begun = True
        return function(*arguments)

    return call, _check


_OVER = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32
for _name, _before in (
    ("cca_mpi_attention", _OVER),
    ("cca_mpi_attend", _OVER),
    ("cca_mpi_attention_gradient", _OVER),
    ("cca_mpi_pool", _OVER[:2]),
    ("cca_mpi_merge", _OVER[:1]),
    ("cca_mpi_cache_append", _OVER[:2]),
    ("cca_mpi_cache_attend", _OVER[:1]),
):
    _library.FUNCTIONS[_name] = _counted(_name, *_before)


@contextlib.contextmanager
def _together(ranks):
    """Where this rank raises before it has called the library the others would wait for it: it tells them."""
    if not isinstance(ranks, Ranks):
        raise TypeError(f"cca: ranks: got {type(ranks).__name__}, wants cca.mpi.Ranks")
    handle = ranks._handle
    _calls.begun = False
    try:
        yield
    except Exception as error:
        if not _calls.begun:
            _mpi.cca_mpi_refuse(handle, str(error).encode())
        raise


class Ranks:
    """The ranks that share sequences: a duplicate of a communicator of mpi4py. Making one is collective."""

    def __init__(self, communicator: MPI.Comm):
        if not isinstance(communicator, MPI.Comm):
            raise TypeError(f"cca: communicator: got {type(communicator).__name__}, wants one of mpi4py")
        handle = ctypes.c_void_p()
        _check(_mpi.cca_mpi_ranks_make(ctypes.byref(handle), MPI._addressof(communicator)))
        self._made = handle
        self.rank, self.size = communicator.rank, communicator.size

    @property
    def _handle(self):
        if self._made is None:
            raise ValueError("cca: ranks: got freed ones, wants those of a communicator")
        return self._made

    def free(self) -> None:
        """Collective, hence by hand: frees the duplicate, which otherwise lives as long as the process."""
        made, self._made = self._made, None
        _mpi.cca_mpi_ranks_free(made)


class Segment(NamedTuple):
    """The tokens [begin, end) of a sequence, which a rank holds."""

    rank: int
    sequence: int
    begin: int
    end: int


class Layout:
    """Which rank holds which tokens, the same on every rank.

    ranks: how many. lengths: tokens of each sequence. segments: in the order of their ranks, (rank, sequence, begin, end);
    together they hold every token once. `contiguous`, `head_to_tail` and `concatenated` make them.
    """

    def __init__(self, ranks: int, lengths, segments, *, _split: int = 0):
        self.lengths = lengths = [_library.int64("lengths", x) for x in lengths]
        given = [_Segment(*(_library.int64("segments", x) for x in segment)) for segment in segments]
        self._handle = ctypes.c_void_p()
        _check(
            _mpi.cca_mpi_layout_make(
                ctypes.byref(self._handle), _split, _library.int64("ranks", ranks),
                (ctypes.c_int64 * len(lengths))(*lengths), len(lengths), (_Segment * len(given))(*given), len(given),
            )
        )  # fmt: skip
        count, one = ctypes.c_int64(), _Segment()
        _check(_mpi.cca_mpi_layout_segments(self._handle, ctypes.byref(count)))
        self.segments = []
        for i in range(count.value):
            _check(_mpi.cca_mpi_layout_segment(self._handle, i, ctypes.byref(one)))
            self.segments.append(Segment(one.rank, one.sequence, one.begin, one.end))

    @classmethod
    def contiguous(cls, ranks: int, lengths) -> "Layout":
        """Rank r holds the tokens [L r / ranks, L (r + 1) / ranks) of every sequence of L."""
        return cls(ranks, lengths, (), _split=1)

    @classmethod
    def head_to_tail(cls, ranks: int, lengths) -> "Layout":
        """Of 2 ranks equal parts of every sequence rank r holds parts r and 2 ranks - 1 - r: even work."""
        return cls(ranks, lengths, (), _split=2)

    @classmethod
    def concatenated(cls, ranks: int, lengths) -> "Layout":
        """The sequences one after the other, cut into equal parts: for packed documents."""
        return cls(ranks, lengths, (), _split=3)

    def segments_of(self, rank: int) -> list[Segment]:
        """Those of a rank, in the order in which its tensors hold them."""
        return [x for x in self.segments if x.rank == rank]

    def offsets_of(self, rank: int) -> list[int]:
        """Where each of a rank's segments begins in its tensors, and where the last one ends."""
        offsets = [0]
        for x in self.segments_of(rank):
            offsets.append(offsets[-1] + x.end - x.begin)
        return offsets

    def positions_of(self, rank: int) -> list[int]:
        """Of each of a rank's tokens its position in its sequence."""
        return [t for x in self.segments_of(rank) for t in range(x.begin, x.end)]

    def places_of(self, rank: int) -> list[int]:
        """Where a rank's tokens are among all, the sequences one after the other: `whole[:, layout.places_of(rank)]`."""
        begins = list(itertools.accumulate(self.lengths, initial=0))
        return [begins[x.sequence] + t for x in self.segments_of(rank) for t in range(x.begin, x.end)]

    def core_offsets_of(self, rank: int, group_size: int, sink_tokens: int = 0) -> list[int]:
        """Where the cores of each of a rank's segments begin, and where the last one's end: a segment has those of the groups
        whose last token it holds."""
        group_size, sink_tokens = _library.int64("group_size", group_size), _library.int64("sink_tokens", sink_tokens)
        if group_size < 1 or sink_tokens < 0:
            raise ValueError(f"cca: group_size, sink_tokens: got {group_size}, {sink_tokens}, wants at least 1 and 0")
        offsets = [0]
        for x in self.segments_of(rank):
            before, until = (max(t - sink_tokens, 0) // group_size for t in (x.begin, x.end))
            offsets.append(offsets[-1] + until - before)
        return offsets

    def __del__(self):
        if getattr(self, "_handle", None):
            _mpi.cca_mpi_layout_free(self._handle)


def _operands(ranks, layout, query, key, value):
    """The operands of a call, with the sequences that the rank's segments are."""
    if not isinstance(layout, Layout):
        raise TypeError(f"cca: layout: got {type(layout).__name__}, wants cca.mpi.Layout")
    operands = {"query": query, "key": key, "value": value}
    _sizes(operands)
    offsets = layout.offsets_of(ranks.rank)
    for name, x in operands.items():
        if x.shape[0] != 1 or x.shape[2] != offsets[-1]:
            raise ValueError(
                f"cca: {name}: got {list(x.shape)}, wants [1, heads, {offsets[-1]}, dim]: the tokens of the rank's segments"
            )
    return operands | {"query_offsets": offsets, "key_offsets": offsets}


_TERMS = frozenset(Terms.__annotations__)


class Arguments(Options, Terms, total=False):
    """Keyword arguments of `attention`: `cca.Options` but for first_position, and `cca.Terms`. sink_logits are [heads], the
    same on every rank, or [1, heads, tokens], a rank's own; alibi_slopes [heads]; key_bias a rank's own."""


def attention(
    ranks: Ranks,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    overlap: bool = True,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    threads: int | None = None,
    **arguments: Unpack[Arguments],
) -> Tensor | tuple[Tensor, Tensor]:
    """`cca.attention` of sequences that lie across ranks: query [1, heads, tokens, dim], key and value
    [1, kv heads, tokens, dim] of the rank's own tokens. Returns as `cca.attention`, of the rank's own queries.

    overlap: cores travel while the window's part is computed, and the two are merged; False: one softmax, as in one process.

    PyTorch's autograd follows it; every rank then calls backward(), which is collective, too. The gradients of sink_logits and
    alibi_slopes that all ranks share are then whole on each of them: they are not to be added up once more.
    """
    with _together(ranks):
        operands = _operands(ranks, layout, query, key, value)
        options = _split(operands, arguments, _TERMS)
        operators = _operators(query)
        followed = operators.who_follows(operands.values()) if operators is not None else 0
        if followed:
            if followed != operators.AUTOGRAD:
                raise ValueError("cca: query: got a tensor of a graph, wants none: no graph is compiled across ranks")
            for name, x in (("out", out), ("lse", lse)):
                if x is not None:
                    raise ValueError(f"cca: {name}: got a tensor, wants None where PyTorch follows the call")
            call = _Call(ranks, layout, overlap, threads, tuple(operands), options)
            out, lse = _autograd().apply(call, *operands.values())
            return (out, lse) if return_lse else out
        out, lse = _forward(ranks, layout, overlap, threads, operands, options, out, lse, return_lse)
        return (out, lse) if return_lse else out


class AttendArguments(Arguments, FarRows, total=False):
    """Keyword arguments of `attend`: those of `attention`, and `cca.FarRows` of the rank's own far rows and queries."""


_ATTEND = _TERMS | frozenset(FarRows.__annotations__)


def attend(
    ranks: Ranks,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    seen: Tensor = None,
    *,
    far_offsets: Tensor,
    overlap: bool = True,
    out: Tensor = None,
    lse: Tensor = None,
    return_lse: bool = False,
    threads: int | None = None,
    **arguments: Unpack[AttendArguments],
) -> Tensor | tuple[Tensor, Tensor]:
    """`cca.attend` across ranks. far_key [1, far heads, rows, dim] and far_value [1, far heads, rows, value dim] hold the far
    rows of the rank's segments one after the other, segment i those at [far_offsets[i], far_offsets[i + 1]); one without
    tokens has none. All ranks' rows of a sequence are numbered in the order of their segments' tokens: so count `seen`,
    [1, heads, tokens], and selected_blocks, which are for the rank's own queries. Everything else as for `attention`, but
    that autograd does not follow it."""
    with _together(ranks):
        operands = _operands(ranks, layout, query, key, value)
        operands |= {"far_key": far_key, "far_value": far_value, "far_offsets": far_offsets}
        operands |= {} if seen is None else {"seen": seen}
        options = _split(operands, arguments, _ATTEND)
        _refuse_followed("cca.mpi.attend", operands)
        over = ranks, layout, overlap, threads
        out, lse = _forward(*over, operands, options, out, lse, return_lse, "cca_mpi_attend")
        return (out, lse) if return_lse else out


def _forward(ranks, layout, overlap, threads, operands, options, out, lse, return_lse, function="cca_mpi_attention"):
    extents, work = _sizes(operands)
    out = _empty(operands["query"], extents) if out is None else out
    lse = _empty(operands["query"], extents[:3], number=True) if lse is None and return_lse else lse
    over = ranks._handle, layout._handle, bool(overlap)
    threads = _library.threads_of(threads, work)
    _library.run(function, operands, {"out": out, "lse": lse}, options, threads, *over)
    return out, lse


class _Call(NamedTuple):
    """What a gradient has to know of its call."""

    ranks: Ranks
    layout: Layout
    overlap: bool
    threads: int | None
    names: tuple[str, ...]
    options: dict


@functools.lru_cache(maxsize=1)
def _autograd():
    """The function of PyTorch's autograd, which is not loaded by those who have no use for it."""
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, *tensors):
            operands = dict(zip(call.names, tensors))
            results = _forward(*call[:4], operands, call.options, None, None, True)
            ctx.save_for_backward(*tensors, *results)
            ctx.call = call
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_out, grad_lse):
            *tensors, out, lse = ctx.saved_tensors
            call, operands = ctx.call, dict(zip(ctx.call.names, tensors))
            with _together(call.ranks):
                grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
                gradients = _backward(*call[:4], operands, call.options, out, lse, grad_out, grad_lse)
                answer = [getattr(gradients, name, None) for name in call.names]
                return None, *(x if x is None else x.to(t.dtype) for x, t in zip(answer, tensors))

    return Attention


def _backward(ranks, layout, overlap, threads, operands, given, out, lse, grad_out, grad_lse):
    incoming = {"out": out, "lse": lse, "grad_out": grad_out, "grad_lse": grad_lse}
    over = ranks._handle, layout._handle, bool(overlap)
    return _gradient("cca_mpi_attention_gradient", operands, incoming, threads, given, _TERMS, before=over)


def attention_gradient(
    ranks: Ranks,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor = None,
    *,
    overlap: bool = True,
    threads: int | None = None,
    **arguments: Unpack[Arguments],
) -> Gradients:
    """The gradients of `attention`, of the rank's own tokens; those of sink_logits and alibi_slopes that all ranks share are
    added up over the ranks."""
    with _together(ranks):
        operands = _operands(ranks, layout, query, key, value)
        return _backward(ranks, layout, overlap, threads, operands, arguments, out, lse, grad_out, grad_lse)


def pool(
    ranks: Ranks,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """`cca.pool` of sequences that lie across ranks: the cores (core_key, core_value) of every complete group whose last token
    the rank holds, [1, core heads, cores, dim] and the same with the value's dim. They lie segment by segment, at
    `layout.core_offsets_of(ranks.rank, group_size, sink_tokens)`, and so are far rows for `attend`. PyTorch's autograd does
    not see it."""
    with _together(ranks):
        operands = _operands(ranks, layout, query, key, value)
        options = _library.plain(_split(operands, options, ()))
        _refuse_followed("cca.mpi.pool", operands)
        _, work = _pool_sizes(operands)
        group_size, sink_tokens = (options.get(name) or 0 for name in ("group_size", "sink_tokens"))
        offsets = [0] * len(layout.offsets_of(ranks.rank))
        if group_size > 0 and sink_tokens >= 0:  # the library refuses the rest
            offsets = layout.core_offsets_of(ranks.rank, group_size, sink_tokens)
        made = _empty_cores(query, key, value, 1, offsets[-1], options)
        operands["far_offsets"] = _integers("far_offsets", offsets, query)
        written = dict(zip(("core_key", "core_value"), made))
        over = ranks._handle, layout._handle
        _library.run("cca_mpi_pool", operands, written, options, _library.threads_of(threads, work), *over)
        return made


def merge(
    ranks: Ranks, out_a: Tensor, lse_a: Tensor, *, out: Tensor = None, lse: Tensor = None
) -> tuple[Tensor, Tensor]:
    """`cca.merge` of what all ranks have, in their order: results (out, lse) of the same queries to each rank's part of a
    context, [batch, heads, length, dim]. Every rank gets the same bits."""
    with _together(ranks):
        read = {"out_a": out_a, "lse_a": lse_a}
        _refuse_followed("cca.mpi.merge", read)
        out = _empty(out_a, tuple(out_a.shape)) if out is None else out
        lse = _empty(out_a, tuple(lse_a.shape), number=True) if lse is None else lse
        _library.run("cca_mpi_merge", read, {"out": out, "lse": lse}, {}, 1, ranks._handle)
        return out, lse


class KvCache:
    """`cca.KvCache` across ranks, for decoding: each keeps its share of the cores, `window_rank` the sink tokens and the
    window. Its sequences grow together, and no token is taken back. All but the counts is collective."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        batch: int = 1,
        heads: int,
        kv_heads: int,
        dim: int,
        value_dim: int = 0,
        window_rank: int = 0,
        dtype: Any = "float32",
        **options: Unpack[Options],
    ):
        self._cache, self._ranks = ctypes.c_void_p(), ranks
        with _together(ranks):
            sizes = [_library.int64("shape", x) for x in (batch, heads, kv_heads, dim, value_dim, 0, 0)]
            shape = _library.CacheShape(ctypes.sizeof(_library.CacheShape), *sizes)
            settings, elements = _library.options_of(options), _data_type(dtype)
            window_rank = _library.int64("window_rank", window_rank)
            _calls.begun = True
            _check(
                _mpi.cca_mpi_cache_make(
                    ctypes.byref(self._cache), ranks._handle, ctypes.byref(shape), elements, ctypes.byref(settings),
                    window_rank,
                )
            )  # fmt: skip

    def __del__(self):
        if getattr(self, "_cache", None):
            _mpi.cca_mpi_cache_free(self._cache)

    def append(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor, *, threads: int | None = None) -> None:
        """Takes over a prompt that lies across the ranks, which `attention` answers. The cache is empty."""
        with _together(self._ranks):
            operands = _operands(self._ranks, layout, query, key, value)
            _split(operands, {}, ())
            _refuse_followed("a cache", operands)
            _, work = _sizes(operands)
            threads = _library.threads_of(threads, work)
            _library.run("cca_mpi_cache_append", operands, {}, {}, threads, self._cache, layout._handle)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        out: Tensor = None,
        lse: Tensor = None,
        return_lse: bool = False,
        sink_logits: Tensor = None,
        alibi_slopes: Tensor = None,
        threads: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends the tokens, then answers their queries, as `cca.KvCache.attend`: the same tokens on every rank, and the
        same bits."""
        with _together(self._ranks):
            read = {
                "query": query,
                "key": key,
                "value": value,
                "sink_logits": sink_logits,
                "alibi_slopes": alibi_slopes,
            }
            _refuse_followed("a cache", read)
            extents, work = _sizes(read)
            counts = self._counts()
            work += extents[0] * extents[1] * extents[2] * query.shape[3] * (counts.cores + counts.raw)
            out = _empty(query, extents) if out is None else out
            lse = _empty(query, extents[:3], number=True) if lse is None and return_lse else lse
            threads = _library.threads_of(threads, work)
            _library.run("cca_mpi_cache_attend", read, {"out": out, "lse": lse}, {}, threads, self._cache)
            return (out, lse) if return_lse else out

    def _counts(self):
        counts = _library.CacheCounts()
        _check(_mpi.cca_mpi_cache_get_counts(self._cache, ctypes.byref(counts)))
        return counts

    def length(self) -> int:
        """Tokens of each sequence."""
        return self._counts().length

    def core_count(self) -> int:
        """Cores that this rank keeps of each sequence, per core head."""
        return self._counts().cores

    def raw_count(self) -> int:
        """Raw tokens that this rank keeps of each sequence."""
        return self._counts().raw
