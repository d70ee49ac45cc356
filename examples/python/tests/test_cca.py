"""cca for NumPy's arrays and for what speaks DLPack."""

import copy
import concurrent.futures
import ctypes
import fractions
import io
import pathlib
import pickle
import re

import numpy as np
import pytest

import cca
from cca import _library

OPTIONS = {"group_size": 3, "window": 4}


def operands(dtype=np.float64, length=19):
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=(2, heads, length, dim)).astype(dtype) for heads, dim in ((4, 5), (2, 5), (2, 3)))


def dense(q, k, v):
    k, v = (np.repeat(x, 2, 1) for x in (k, v))
    scores = np.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    weights = np.exp(scores)
    return np.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdims=True), v)


def test_against_the_textbook():
    q, k, v = operands()
    assert np.abs(cca.attention(q, k, v) - dense(q, k, v)).max() < 1e-12


def test_every_option_is_in_the_hints():
    assert set(cca.Options.__annotations__) == set(_library.OPTIONS)


@pytest.mark.parametrize("struct", [_library.Options, _library.Call, _library.CacheShape, _library.CacheCounts])
def test_structures_are_those_of_the_header(struct):
    """Their members, in order, with their types."""
    name = struct.__doc__
    header = (pathlib.Path(__file__).parents[3] / "include/cca/dispatch/cca.h").read_text(encoding="utf-8")
    body = re.search(
        rf"typedef struct {name} {{(.*?)}} {name};", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL), re.DOTALL
    )
    members = []
    for declaration in body[1].split(";")[:-1]:
        kind, star, names = re.fullmatch(r"(?:const )?(\w+)(\*?) (.*)", " ".join(declaration.split())).groups()
        members += [(member.strip(), "pointer" if star else kind) for member in names.split(",")]
    assert [x for x, _ in members] == [x for x, _ in struct._fields_]
    sizes = {"size_t": 8, "int64_t": 8, "double": 8, "int32_t": 4, "pointer": 8}
    assert [sizes[kind] for _, kind in members] == [ctypes.sizeof(kind) for _, kind in struct._fields_]


def test_pool_attend_and_merge_make_up_attention():
    q, k, v = operands()
    want, want_lse = cca.attention(q, k, v, return_lse=True, **OPTIONS)
    cores = cca.pool(q, k, v, group_size=3)
    assert cores[0].shape == (2, 4, 6, 5) and cores[1].shape == (2, 4, 6, 3)
    seen = np.maximum(0, np.arange(1, 20) - 4) // 3 * np.ones((2, 4, 1), np.int64)
    out, lse = cca.attend(q, k, v, *cores, seen, return_lse=True, **OPTIONS)
    assert np.abs(out - want).max() < 1e-12 and np.abs(lse - want_lse).max() < 1e-12
    far = cca.attend(q, k[:, :, :0], v[:, :, :0], *cores, seen, return_lse=True, **OPTIONS)
    near = cca.attend(q, k, v, *(x[:, :, :0] for x in cores), 0 * seen, return_lse=True, **OPTIONS)
    assert np.abs(cca.merge(*far, *near)[0] - want).max() < 1e-12


def test_gradients():
    q, k, v = operands()
    out, lse = cca.attention(q, k, v, return_lse=True, **OPTIONS)
    rng = np.random.default_rng(2)
    grad_out, grad_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    gradients = cca.attention_gradient(q, k, v, out, lse, grad_out, grad_lse, **OPTIONS)
    for x, gradient in zip((q, k, v), gradients):
        place = (1, 1, 7, 2)
        difference = 0
        for side in (1, -1):
            x[place] += side * 1e-5
            o, e = cca.attention(q, k, v, return_lse=True, **OPTIONS)
            difference += side * ((o * grad_out).sum() + (e * grad_lse).sum()) / 2e-5
            x[place] -= side * 1e-5
        assert abs(difference - gradient[place]) < 1e-7
    cores = cca.pool(q, k, v, group_size=3)
    seen = np.maximum(0, np.arange(1, 20) - 4) // 3 * np.ones((2, 4, 1), np.int64)
    direct = cca.attend_gradient(q, k, v, *cores, seen, out, lse, grad_out, grad_lse, **OPTIONS)
    pooled = cca.pool_gradient(q, k, v, direct.far_key, direct.far_value, group_size=3)
    for whole, a, b in zip(gradients[:3], direct, pooled):
        assert np.abs(whole - a - b).max() < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
def test_elements(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = operands(dtype)
    out, lse = cca.attention(q, k, v, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    want = dense(*(x.astype(np.float64) for x in (q, k, v)))
    assert np.abs(out.astype(np.float64) - want).max() < {4: 1e-6, 2: 1e-2}[q.dtype.itemsize]


def rows_of_8_bits(length=19):
    """Query, and (elements, scales, the same as floats) of key, value, far key and far value, of scales without rounding."""
    rng = np.random.default_rng(5)
    query = rng.normal(size=(2, 4, length, 5)).astype(np.float32)
    rows = []
    for dim in (5, 3, 5, 3):
        elements = rng.integers(-128, 128, (2, 2, length, dim)).astype(np.int8)
        scales = np.exp2(rng.integers(-9, -5, (2, 2, 2 * length))).astype(np.float32)[..., ::2]
        rows.append((elements, scales, elements * scales[..., None]))
    return query, rows


def test_rows_of_8_bits_give_what_floats_give():
    q, ((k, ks, fk), (v, vs, fv), (c, cs, fc), (w, ws, fw)) = rows_of_8_bits()
    scales, far_scales = {"key_scales": ks, "value_scales": vs}, {"far_key_scales": cs, "far_value_scales": ws}
    for options in ({}, OPTIONS, {"window": 3, "threads": 2}):
        want = cca.attention(q, fk, fv, return_lse=True, **options)
        got = cca.attention(q, k, v, return_lse=True, **scales, **options)
        assert got[0].dtype == np.float32 and all(np.array_equal(a, b) for a, b in zip(got, want))
    seen = np.arange(19) // 2 * np.ones((2, 4, 1), np.int64)
    want = cca.attend(q, fk, fv, fc, fw, seen, window=4)
    assert np.array_equal(want, cca.attend(q, k, v, c, w, seen, window=4, **scales, **far_scales))
    assert np.array_equal(want, cca.attend(q, k, v, fc, fw, seen, window=4, **scales))
    assert np.array_equal(want, cca.attend(q, fk, fv, c, w, seen, window=4, **far_scales))
    for wrong, message in (
        ({}, "key_scales: got none"),
        ({"key_scales": ks}, "value_scales: got none"),
        (scales | {"key_scales": ks[..., 1:]}, r"key_scales: got \["),
        (scales | {"key_scales": ks.astype(np.float64)}, "key_scales: got float64, wants float32"),
        (scales | far_scales, "far_key_scales: got"),
    ):
        with pytest.raises((ValueError, TypeError), match="cca: " + message):
            cca.attention(q, k, v, **wrong)
    with pytest.raises(ValueError, match="cca: key: got int8, wants float64"):
        cca.attention(q.astype(np.float64), k, v, **scales)


def test_quantize_and_a_cache_of_8_bits():
    q, k, v = operands(np.float32)
    (kq, ks), (vq, vs) = cca.quantize(k), cca.quantize(v)
    assert kq.dtype == np.int8 and ks.dtype == np.float32 and ks.shape == k.shape[:3]
    assert np.array_equal(ks, np.abs(k).max(-1) / np.float32(127))
    assert np.abs(kq * ks[..., None] - k).max() <= 0.501 * ks.max() and np.abs(kq).max() == 127
    to, scales = np.zeros_like(kq), np.zeros_like(ks)
    assert cca.quantize(k, to=to, scales=scales)[0] is to
    assert np.array_equal(to, kq) and np.array_equal(scales, ks)
    cache = cca.KvCache(batch=2, heads=4, kv_heads=2, dim=5, value_dim=3, dtype="int8", window=7)
    got = np.concatenate([cache.attend(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j]) for i, j in ((0, 11), (11, 19))], 2)
    want = cca.attention(q, kq, vq, key_scales=ks, value_scales=vs, window=7)
    assert np.abs(got - want).max() < 1e-6
    copied = pickle.loads(pickle.dumps(cache))
    token = [x[:, :, :1] for x in (q, k, v)]
    assert np.array_equal(copied.attend(*token), cache.attend(*token))


def test_a_cache_of_8_bits_keeps_rows_that_are_rounded_already():
    q, k, v = operands(np.float32)
    (kq, ks), (vq, vs) = cca.quantize(k), cca.quantize(v)
    wide = [np.repeat(x, 2, -1)[..., ::2] for x in (ks, vs)]  # scales have strides of their own
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 5, "value_dim": 3, "dtype": "int8"}
    of_floats, of_rows = (cca.KvCache(**shape, **OPTIONS) for _ in range(2))

    def part(i, j, *all):
        return [x[:, :, i:j] for x in all]

    def scales(i, j):
        return dict(zip(("key_scales", "value_scales"), part(i, j, *wide)))

    for i, j in ((0, 11), (11, 12)):
        want = of_floats.attend(*part(i, j, q, k, v), return_lse=True)
        got = of_rows.attend(*part(i, j, q, kq, vq), return_lse=True, **scales(i, j))
        assert got[0].dtype == np.float32 and all(np.array_equal(a, b) for a, b in zip(got, want))
    of_floats.append(*part(12, 16, q, k, v))
    of_rows.append(*part(12, 16, q, kq, vq), **scales(12, 16))
    for sequence in range(2):
        of_floats.append(*(x[sequence : sequence + 1] for x in part(16, 19, q, k, v)), sequence=sequence)
        few = {name: x[sequence : sequence + 1] for name, x in scales(16, 19).items()}
        of_rows.append(*(x[sequence : sequence + 1] for x in part(16, 19, q, kq, vq)), sequence=sequence, **few)
    before = pickle.dumps(of_floats)
    assert pickle.dumps(of_rows) == before
    token, given = part(0, 1, q, kq, vq), scales(0, 1)
    for wrong, message in (
        ({}, "key_scales: got none"),
        ({"key_scales": given["key_scales"]}, "value_scales: got none"),
        (given | {"key_scales": ks}, r"key_scales: got \["),
        (given | {"value_scales": vs[:, :, :1].astype(np.float64)}, "value_scales: got float64, wants float32"),
    ):
        for call in (of_rows.attend, of_rows.append):
            with pytest.raises(ValueError, match="cca: " + message):
                call(*token, **wrong)
    for call in (of_rows.attend, of_rows.append):
        with pytest.raises(ValueError, match="cca: key_scales: got a tensor, wants none"):
            call(*part(0, 1, q, k, v), **given)
        with pytest.raises(ValueError, match="cca: value: got float32, wants int8"):
            call(*part(0, 1, q, kq, v), **given)
    assert pickle.dumps(of_rows) == before
    with pytest.raises(ValueError, match="cca: key: got int8, wants float32"):
        cca.KvCache(**(shape | {"dtype": "float32"})).attend(*token, **given)


def test_quantize_refuses_what_does_not_fit():
    _, k, _ = operands(np.float32)
    with pytest.raises(ValueError, match="cca: rows: got 3 dimensions, wants 4"):
        cca.quantize(k[0])
    with pytest.raises(ValueError, match="cca: to: got float32, wants int8"):
        cca.quantize(k, to=k)


def test_strides_are_taken_as_they_are():
    q, k, v = operands()
    want = cca.attention(q, k, v, **OPTIONS)
    blhd = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in (q, k, v)]
    backwards = [x[:, ::-1].copy()[:, ::-1] for x in (q, k, v)]
    wide = [np.concatenate([x, x], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    out = np.full((2, 19, 4, 3), np.nan).swapaxes(1, 2)
    for operand in (blhd, backwards, wide):
        assert cca.attention(*operand, out=out, **OPTIONS) is out
        assert np.array_equal(out, want)
        out[...] = np.nan
    one = np.broadcast_to(k[:1], k.shape)
    assert np.array_equal(cca.attention(q, one, v), cca.attention(q, one.copy(), v))


class Foreign:
    """A tensor of a library that nobody knows, by an older or a newer protocol."""

    def __init__(self, x, versioned):
        self.x, self.versioned, self.shape, self.dtype = x, versioned, x.shape, x.dtype

    def __dlpack__(self, **options):
        if options and not self.versioned:
            raise TypeError("max_version")
        return self.x.__dlpack__(**options)


@pytest.mark.parametrize("versioned", [False, True])
def test_foreign_tensors(versioned):
    q, k, v = operands()
    foreign = [Foreign(x, versioned) for x in (q, k, v)]
    assert np.array_equal(cca.attention(*foreign, **OPTIONS), cca.attention(q, k, v, **OPTIONS))


def test_a_read_only_flag_is_believed():
    q, k, v = operands()
    out = np.zeros((2, 4, 19, 3))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="cca: out: got a read-only array"):
        cca.attention(q, k, v, out=out)
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        with pytest.raises(ValueError, match="cca: out: got a read-only tensor"):
            cca.attention(q, k, v, out=Foreign(out, True))
    want = cca.attention(q, k, v)
    q.flags.writeable = False
    assert np.array_equal(cca.attention(q, k, v), want)
    assert not out.any()


def test_lengths_and_offsets():
    q, k, v = operands()
    lengths = [7, 19]
    out = cca.attention(q, k, v, query_lengths=lengths, key_lengths=lengths, **OPTIONS)
    packed = [np.concatenate([x[b : b + 1, :, :n] for b, n in enumerate(lengths)], 2) for x in (q, k, v)]
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    in_rows = cca.attention(*packed, query_offsets=offsets, key_offsets=offsets, **OPTIONS)
    for b, n in enumerate(lengths):
        alone = cca.attention(*(x[b : b + 1, :, :n] for x in (q, k, v)), **OPTIONS)
        assert np.array_equal(out[b : b + 1, :, :n], alone)
        assert np.array_equal(in_rows[:, :, offsets[b] : offsets[b + 1]], alone)
    assert not out[0, :, 7:].any()


def rows_seen(by, far_length=11):
    """Who sees which of the far rows, [batch, heads, query length, far length], and the arguments that say it."""
    rng = np.random.default_rng(4)
    q, rows = np.arange(19)[:, None], np.arange(far_length)
    if by == "positions":
        first = rng.integers(0, 19, (2, 2, far_length))
        last = first + rng.integers(0, 9, first.shape)
        sees = (first[:, :, None] <= q) & (q < last[:, :, None])
        return np.repeat(sees, 2, 1), {"visible_from": first, "visible_until": last}
    lists = np.array([[0, 2, 3], [1, -1, -1], [-1, -1, -1], [0, 1, 2], [3, -1, -1]])
    lists = np.stack([lists, lists[::-1]])[:, None]
    sees = (lists[:, :, :, None, :] == rows[:, None] // 3).any(-1).repeat(4, 2)[:, :, :19]
    return np.repeat(sees, 4, 1), {"selected_blocks": lists, "block_rows": 3, "block_queries": 4}


@pytest.mark.parametrize("by", ["positions", "lists"])
def test_selected_rows(by):
    q, k, v = operands()
    far_key, far_value = (x[:, :, 2:13].copy() for x in (k, v))
    sees, who = rows_seen(by)
    out, lse = cca.attend(q, k, v, far_key, far_value, return_lse=True, window=4, **who)
    keys = np.concatenate([k, far_key], 2).repeat(2, 1)
    scores = np.einsum("bhid,bhjd->bhij", q, keys) / 5**0.5
    distance = np.arange(19)[:, None] - np.arange(19)
    near = np.broadcast_to((0 <= distance) & (distance < 4), (2, 4, 19, 19))
    weights = np.exp(scores) * np.concatenate([near, sees], -1)
    total = weights.sum(-1)
    want = np.einsum("bhij,bhjd->bhid", weights / total[..., None], np.concatenate([v, far_value], 2).repeat(2, 1))
    assert np.abs(out - want).max() < 1e-12 and np.abs(lse - np.log(total)).max() < 1e-12

    grad_out = np.random.default_rng(5).normal(size=out.shape)
    gradients = cca.attend_gradient(q, k, v, far_key, far_value, None, out, lse, grad_out, window=4, **who)
    for x, gradient in ((q, gradients.query), (far_key, gradients.far_key), (far_value, gradients.far_value)):
        place = (1, 1, 5, 2)
        difference = 0
        for side in (1, -1):
            x[place] += side * 1e-5
            difference += side * (cca.attend(q, k, v, far_key, far_value, window=4, **who) * grad_out).sum() / 2e-5
            x[place] -= side * 1e-5
        assert abs(difference - gradient[place]) < 1e-7


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_lists_of_sequences_of_their_own_lengths(layout):
    q, k, v = operands()
    _, who = rows_seen("lists")
    lengths, far_length = [7, 19], 11
    count = [2, 5]  # lists of 4 queries
    far = [x[:, :, :far_length].copy() for x in (k, v)]
    alone = [
        cca.attend(
            *(x[b : b + 1, :, :n] for x in (q, k, v)), *(x[b : b + 1] for x in far), window=4,
            **who | {"selected_blocks": who["selected_blocks"][b : b + 1, :, : count[b]]},
        )
        for b, n in enumerate(lengths)
    ]  # fmt: skip
    if layout == "padded":
        same = {"query_lengths": lengths, "key_lengths": lengths, "far_lengths": [far_length] * 2}
        out = cca.attend(q, k, v, *far, window=4, **same, **who)
        out = [out[b : b + 1, :, :n] for b, n in enumerate(lengths)]
    else:
        packed = [np.concatenate([x[b : b + 1, :, :n] for b, n in enumerate(lengths)], 2) for x in (q, k, v)]
        far = [np.concatenate([x[:1], x[1:]], 2) for x in far]
        lists = np.concatenate([who["selected_blocks"][b : b + 1, :, : count[b]] for b in range(2)], 2)
        same = {"query_offsets": [0, 7, 26], "key_offsets": [0, 7, 26], "far_offsets": [0, 11, 22]}
        out = cca.attend(*packed, *far, window=4, **same, **who | {"selected_blocks": lists})
        out = [out[:, :, :7], out[:, :, 7:]]
    for got, want in zip(out, alone):
        assert np.array_equal(got, want)


def test_selected_rows_are_refused():
    q, k, v = operands()
    _, who = rows_seen("lists")
    with pytest.raises(TypeError, match="cca: selected_blocks: got a ndarray, wants none"):
        cca.attention(q, k, v, **who)
    with pytest.raises(ValueError, match=r"block_rows: got 0, wants at least 1|block_rows: got -1"):
        cca.attend(q, k, v, k, v, **who | {"block_rows": -1})
    with pytest.raises(ValueError, match="selected_blocks: got float64, wants integers"):
        cca.attend(q, k, v, k, v, selected_blocks=np.zeros((1, 1, 5, 1)), block_queries=4)
    with pytest.raises(ValueError, match="far.seen: got"):
        cca.attend(q, k, v, k, v)


def test_threads_change_no_bit():
    q, k, v = operands()
    want = cca.attention(q, k, v, threads=1, **OPTIONS)
    for threads in (2, 7):
        assert np.array_equal(cca.attention(q, k, v, threads=threads, **OPTIONS), want)


def test_calls_at_once():
    """Of the same form, which share what was prepared for it, while the interpreter's lock is released."""
    rng = np.random.default_rng(6)
    everything = [rng.normal(size=(3, 1, 2, 300, 16)).astype(np.float32) for _ in range(4)]
    want = [cca.attention(*x, threads=1, **OPTIONS) for x in everything]

    def call(x, y):
        return all(np.array_equal(cca.attention(*x, threads=1, **OPTIONS), y) for _ in range(50))

    with concurrent.futures.ThreadPoolExecutor(len(everything)) as workers:
        assert all(workers.map(call, everything, want))  # which raises what they do


def cache_of(**more):
    return cca.KvCache(batch=2, heads=4, kv_heads=2, dim=5, value_dim=3, dtype="float64", **OPTIONS, **more)


def test_cache():
    q, k, v = operands()
    want = cca.attention(q, k, v, **OPTIONS)
    cache = cache_of(rewind=2)

    def part(first, last):
        return (x[:, :, first:last] for x in (q, k, v))

    assert np.abs(cache.attend(*part(0, 10)) - want[:, :, :10]).max() < 1e-12
    cache.append(*part(3, 5))
    for b in range(2):
        cache.truncate(b, 10)
    file = io.BytesIO()
    cache.save(file)
    file.seek(0)
    for other in (cca.KvCache.load(file, "float64"), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        got = np.concatenate([other.attend(*part(i, i + 1)) for i in range(10, 19)], 2)
        assert np.abs(got - want[:, :, 10:]).max() < 1e-12
    assert cache.length() == 19 and cache.core_count() == 6 and cache.nbytes > 0
    cache.reset(0)
    assert (cache.length(0), cache.length(1)) == (0, 19)
    cache.fork(1, 0)
    assert cache.length(0) == 19 and cache.shape.rewind == 2
    with pytest.raises(ValueError, match="cca: length: got 1, wants between"):
        cache.truncate(0, 1)
    with pytest.raises(ValueError, match=r"cca: query: got \[1, 4, 1, 5\]"):
        cache.attend(*(x[:1, :, :1] for x in (q, k, v)))
    with pytest.raises(ValueError, match="cca: query: got float32, wants float64"):
        cache.attend(*(x[:, :, :1].astype(np.float32) for x in (q, k, v)))
    with pytest.raises(RuntimeError, match="file"):
        cca.KvCache.load(io.BytesIO(b"no cache at all, but as long as the start of one is"), "float64")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda q, k, v: (q.astype(np.int64), k, v), "query: got int64, wants float32"),
        (lambda q, k, v: (q, k.astype(np.float32), v), "key: got float32, wants float64"),
        (lambda q, k, v: (q, k, v[..., ::-1]), "value: got strides"),
        (lambda q, k, v: (q, k[:, :1][0], v), "key: got 3 dimensions, wants 4"),
        (lambda q, k, v: (q, k, v[0]), "value: got 3 dimensions, wants 4"),
        (lambda q, k, v: (q[0, 0, 0, 0], k, v), "query: got 0 dimensions, wants 4"),
        (lambda q, k, v: (q, k[..., :0], v), "key: got dim 0"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "value: got"),
        (lambda q, k, v: (q.astype(complex), k, v), "query: got complex128"),
        (lambda q, k, v: (q, k, v.astype(">f8")), "value: got float64 in the other byte order, wants the processor's"),
        (lambda q, k, v: (q, np.broadcast_to(k.astype(">f8"), k.shape), v), "key: got float64 in the other byte order"),
    ],
)
def test_refusals(change, text):
    out = np.full((2, 4, 19, 3), 7.0)
    with pytest.raises(ValueError, match="^cca: " + text.replace("[", r"\[")):
        cca.attention(*change(*operands()), out=out)
    assert (out == 7).all()  # nothing was written


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"groupsize": 3}, TypeError, "got groupsize, wants one of group_size"),
        ({"group_size": -1, "window": 3}, ValueError, "options.group_size: got -1"),
        ({"window": 2**63}, ValueError, "window: got 9223372036854775808, wants a number of 64 bits"),
        ({"window": 2.5}, TypeError, "cca: options.window: got 2.5, wants an integer"),
        ({"window": "4"}, TypeError, "cca: options.window: got '4', wants an integer"),
        ({"group_size": np.array(3)}, TypeError, "cca: options.group_size: got a ndarray, wants an integer"),
        ({"softcap": np.array(3.0)}, TypeError, "cca: options.softcap: got a ndarray, wants a number"),
        ({"softmax_scale": "1"}, TypeError, "cca: options.softmax_scale: got '1', wants a number"),
        ({"softmax_scale": 1j}, TypeError, "cca: options.softmax_scale: got a complex, wants a number"),
        ({"pool": 3}, TypeError, "cca: options.pool: got 3, wants a word"),
        ({"pool": "mode"}, ValueError, "options.pool: got mode, wants one of last_query"),
        ({"window": [3]}, TypeError, "cca: options.window: got a list, wants an integer"),
        ({"softcap": None}, ValueError, "options.softcap: got None"),
    ],
)
def test_refused_options(options, error, text):
    with pytest.raises(error, match=text):
        cca.attention(*operands(), **options)


class Changing:
    """A number that is remembered by what it is, whatever it is at the time."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    __float__ = __index__


def test_options_are_what_they_are_at_the_call():
    q, k, v = operands()
    number = Changing(3)
    for name in ("window", "softcap"):
        with pytest.raises(TypeError, match=f"cca: options.{name}: got a Changing, wants"):
            cca.attention(q, k, v, **{name: number})
    with pytest.raises(TypeError, match="cca: block_rows: got a Changing, wants an integer"):
        cca.attend(q, k, v, k, v, selected_blocks=np.zeros((1, 1, 19, 1), int), block_rows=number)
    cca.attention(q, k, v, window=3)
    with pytest.raises(TypeError, match="cca: options.window: got 3.0, wants an integer"):
        cca.attention(q, k, v, window=3.0)  # which equals 3
    with pytest.raises(TypeError, match="cca: options: got block_rows, wants one of group_size"):
        cache_of(block_rows=1)
    with pytest.raises(TypeError, match="cca: shape.heads: got 4.0, wants an integer"):
        cca.KvCache(heads=4.0, kv_heads=2, dim=5)


def test_numbers_of_other_kinds():
    q, k, v = operands()
    want = cca.attention(q, k, v, window=4, group_size=3, softmax_scale=0.5, softcap=2.0)
    scales = np.float32(0.5), fractions.Fraction(1, 2)
    for scale in scales:
        got = cca.attention(q, k, v, window=np.int32(4), group_size=np.uint8(3), softmax_scale=scale, softcap=2)
        assert np.array_equal(got, want)


def test_nothing_for_a_tensor_is_none():
    q, k, v = operands()
    assert np.array_equal(cca.attention(q, k, v, far_lengths=None, seen=None), cca.attention(q, k, v))


def test_no_kernels_for_the_processor(monkeypatch):
    class Nothing:
        cca_architecture = staticmethod(lambda: None)
        cca_error = staticmethod(lambda: b"cca: processor: why")

    monkeypatch.setattr(cca, "library", Nothing)
    with pytest.raises(RuntimeError, match="^cca: processor: why$"):
        cca.architecture()


def work_of(monkeypatch, call):
    """The multiply-adds that a call is thought to take."""
    found = []
    monkeypatch.setattr(_library, "threads_of", lambda threads, multiply_adds: found.append(multiply_adds) or 1)
    call()
    return found[-1]


def test_the_work_that_decides_about_threads(monkeypatch):
    q, k, v = operands()

    def attention():
        cca.attention(q, k, v)

    def pool():
        cores = cca.pool(q, k, v, group_size=3)
        cca.pool_gradient(q, k, v, *cores, group_size=3)

    assert work_of(monkeypatch, attention) == 2 * 4 * 19 * 5 * 19
    assert work_of(monkeypatch, pool) == 2 * 4 * 19 * 5
    assert work_of(monkeypatch, lambda: cca.pool(q, k, v, group_size=3)) == 2 * 4 * 19 * 5
    cache = cache_of()
    cache.append(q, k, v)
    rows = cache.core_count() + cache.raw_count()
    assert rows < 19
    step = [x[:, :, :1] for x in (q, k, v)]
    assert work_of(monkeypatch, lambda: cache.attend(*step)) == 2 * 4 * 1 * 5 * (rows + 1)


def test_refusals_of_pool():
    q, k, v = operands()
    with pytest.raises(ValueError, match="^cca: key: got 3 dimensions, wants 4"):
        cca.pool(q, k[0], v, group_size=3)
    with pytest.raises(ValueError, match="^cca: value: got 3 dimensions, wants 4"):
        cca.pool(q, k, v[0], group_size=3)
    with pytest.raises(TypeError, match="^cca: key: got NoneType, wants a tensor"):
        cca.pool(q, None, v, group_size=3)
    with pytest.raises(TypeError, match="^cca: options.group_size: got '3', wants an integer"):
        cca.pool(q, k, v, group_size="3")
    with pytest.raises(ValueError, match="^cca: options.group_size: got None, wants a number"):
        cca.pool(q, k, v, group_size=None)


def test_lengths_are_integers_in_the_processors_order():
    q, k, v = operands()
    want = cca.attention(q, k, v, query_lengths=[7, 19], key_lengths=[7, 19])
    lengths = np.array([7, 19], ">i8")
    lengths.flags.writeable = False
    assert np.array_equal(cca.attention(q, k, v, query_lengths=lengths, key_lengths=lengths), want)
    for wrong, name in ((np.array([7.0, 19.0]), "float64"), ([True, False], "bool")):
        with pytest.raises(ValueError, match=f"cca: key_lengths: got {name}, wants integers"):
            cca.attention(q, k, v, key_lengths=wrong)


def test_what_is_no_tensor():
    q, k, v = operands()
    with pytest.raises(TypeError, match="cca: query: got NoneType, wants a tensor"):
        cca.attention(None, k, v)
    with pytest.raises(TypeError, match="cca: sink_logits: got list, wants a tensor"):
        cca.attention(q, k, v, sink_logits=[1.0] * 4)
    with pytest.raises(TypeError, match="cca: key: got list, wants a tensor"):
        cca.attention(q, k.tolist(), v)
    with pytest.raises(TypeError, match="cca: value: got MaskedArray, wants a tensor"):
        cca.attention(q, k, np.ma.masked_array(v, v > 1))


class ManagedTensor(ctypes.Structure):
    """DLManagedTensor"""

    _fields_ = [("tensor", _library.Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class OnCuda:
    """A tensor that says that it lies in the memory of a GPU. Nobody may look at that."""

    def __init__(self, x):
        self.shape, self.dtype = x.shape, x.dtype
        self.extents = (ctypes.c_int64 * x.ndim)(*x.shape)
        tensor = _library.Tensor(8, 2, 0, x.ndim, _library.DataType(2, 64, 1), self.extents, None, 0)
        self.managed = ManagedTensor(tensor)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.argtypes, new.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
        return new(ctypes.addressof(self.managed), b"dltensor", None)


@pytest.mark.parametrize("place", range(4))
def test_the_memory_of_a_gpu_is_refused(place):
    everything = [*operands(), np.full((2, 4, 19, 3), 7.0)]
    out = everything[3]
    everything[place] = OnCuda(everything[place])
    name = ("query", "key", "value", "out")[place]
    text = f"cca: {name}: got memory of DLPack's device type 2, wants memory of the processor"
    with pytest.raises(ValueError, match=text):
        cca.attention(*everything[:3], out=everything[3])
    assert (out == 7).all()
    cache = cca.KvCache(batch=2, heads=4, kv_heads=2, dim=5, value_dim=3, dtype="float64")
    with pytest.raises(ValueError, match=text):
        cache.attend(*everything[:3], out=everything[3])
    assert (out == 7).all() and cache.length() == 0


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "everything", "value dim"])
def test_zero_sizes(empty):
    q, k, v = operands()
    q, k, v = {
        "batch": (q[:0], k[:0], v[:0]),
        "heads": (q[:, :0], k, v),
        "queries": (q[:, :, :0], k, v),
        "everything": (q[:0, :0, :0], k[:0, :0, :0], v[:0, :0, :0]),
        "value dim": (q, k, v[..., :0]),
    }[empty]
    if empty == "value dim":
        with pytest.raises(ValueError, match="cca: value: got dim 0"):
            cca.attention(q, k, v)
        return
    out, lse = cca.attention(q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:3], 3) and lse.shape == q.shape[:3]
    gradients = cca.attention_gradient(q, k, v, out, lse, out)
    assert all(not x.any() for x in gradients[:3])


def test_no_keys():
    q, k, v = operands()
    out, lse = cca.attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], return_lse=True)
    assert out.shape == (2, 4, 0, 3)
    none = np.zeros((2, 2, 0, 5)), np.zeros((2, 2, 0, 3))
    out, lse = cca.attend(q, *none, *none, np.zeros((2, 4, 19), np.int64), return_lse=True)
    assert not out.any() and (lse == -np.inf).all()  # a query that sees nothing


def test_capsules_by_hand():
    """NULL strides and an offset in bytes, as DLPack allows them."""
    x = np.random.default_rng(3).normal(size=(1, 1, 4, 2))
    shape = (ctypes.c_int64 * 4)(1, 1, 4, 2)
    tensor = _library.Tensor(x.ctypes.data - 64, 1, 0, 4, _library.DataType(2, 64, 1), shape, None, 64)
    address = ctypes.addressof(tensor)
    out = np.empty_like(x)
    call = _library.Call(ctypes.sizeof(_library.Call), query=address, key=address, value=address)
    exported = _library.Tensor()
    call.out = ctypes.addressof(exported)
    keeper = _library.export(out, "out", True, call.out)
    _library.check(_library.library.cca_attention(ctypes.addressof(call)))
    assert np.array_equal(out, cca.attention(x, x, x))
    del keeper
