"""cca.mpi: run by mpirun, with any number of ranks. Every rank makes the same whole problem and compares its own part."""

import contextlib
import os

import numpy as np
import pytest

if not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ):
    pytest.skip("needs mpirun", allow_module_level=True)
from mpi4py import MPI

import cca
import cca.mpi

world = MPI.COMM_WORLD
ranks = cca.mpi.Ranks(world)
LENGTHS = [37, 0, 70]
OPTIONS = {"group_size": 3, "window": 5, "sink_tokens": 2}


def problem(dtype=np.float64):
    """Whole sequences, one after the other."""
    rng = np.random.default_rng(1)
    total = sum(LENGTHS)
    return tuple(rng.normal(size=(1, heads, total, dim)).astype(dtype) for heads, dim in ((4, 5), (2, 5), (2, 3)))


def own(layout, x, axis=2):
    """This rank's part of packed tensors."""
    begins = np.cumsum([0, *LENGTHS])
    places = [np.arange(s.begin, s.end) + begins[s.sequence] for s in layout.segments_of(ranks.rank)]
    return np.take(x, np.concatenate([np.zeros(0, int), *places]), axis)


def layouts():
    made = {
        name: getattr(cca.mpi.Layout, name)(ranks.size, LENGTHS)
        for name in ("contiguous", "head_to_tail", "concatenated")
    }
    made["one rank"] = cca.mpi.Layout(ranks.size, LENGTHS, [(ranks.size - 1, q, 0, n) for q, n in enumerate(LENGTHS)])
    return made


OFFSETS = {"query_offsets": np.cumsum([0, *LENGTHS]), "key_offsets": np.cumsum([0, *LENGTHS])}


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("options", [{}, {"window": 6}, OPTIONS], ids=["dense", "window", "cores"])
@pytest.mark.parametrize("overlap", [False, True])
def test_attention_and_gradients_are_those_of_one_process(name, options, overlap):
    q, k, v = problem()
    layout = layouts()[name]
    want, want_lse = cca.attention(q, k, v, return_lse=True, **options, **OFFSETS)
    mine = [own(layout, x) for x in (q, k, v)]
    out, lse = cca.mpi.attention(ranks, layout, *mine, return_lse=True, overlap=overlap, **options)
    assert np.abs(out - own(layout, want)).max(initial=0) < 1e-12
    assert np.abs(lse - own(layout, want_lse)).max(initial=0) < 1e-12
    rng = np.random.default_rng(2)
    grad_out, grad_lse = rng.normal(size=want.shape), rng.normal(size=want_lse.shape)
    whole = cca.attention_gradient(q, k, v, want, want_lse, grad_out, grad_lse, **options, **OFFSETS)
    incoming = own(layout, grad_out), own(layout, grad_lse)
    part = cca.mpi.attention_gradient(ranks, layout, *mine, out, lse, *incoming, overlap=overlap, **options)
    for a, b in zip(part[:3], whole):
        assert np.abs(a - own(layout, b)).max(initial=0) < 1e-12


def test_terms():
    q, k, v = problem(np.float32)
    layout = cca.mpi.Layout.contiguous(ranks.size, LENGTHS)
    rng = np.random.default_rng(3)
    sinks, slopes, bias = (rng.normal(size=s).astype(np.float32) for s in ((4,), (4,), (1, 2, sum(LENGTHS))))
    terms = {"sink_logits": sinks, "alibi_slopes": slopes, "softcap": 4.0, "window": 9}
    want = cca.attention(q, k, v, key_bias=bias, **terms, **OFFSETS)
    got = cca.mpi.attention(ranks, layout, *(own(layout, x) for x in (q, k, v)), key_bias=own(layout, bias), **terms)
    assert np.abs(got - own(layout, want)).max(initial=0) < 1e-5


@pytest.mark.parametrize("name", layouts())
def test_far_rows(name):
    """Each three tokens have a far row on the rank of the last of them."""
    q, k, v = problem()
    layout, count = layouts()[name], [n // 3 for n in LENGTHS]
    rng = np.random.default_rng(7)
    far_key, far_value, bias = (rng.normal(size=(1, 2, sum(count), dim)) for dim in (5, 3, 1))
    bias = bias[..., 0]
    seen = np.concatenate([np.arange(n) // 3 for n in LENGTHS]) * np.ones((1, 4, 1), int)
    offsets = np.cumsum([0, *count])
    more = {"window": 4, "return_lse": True}
    wanted = cca.attend(q, k, v, far_key, far_value, seen, far_bias=bias, far_offsets=offsets, **OFFSETS, **more)
    rows, own_offsets = [np.zeros(0, int)], [0]
    for s in layout.segments_of(ranks.rank):
        rows.append(offsets[s.sequence] + np.arange(s.begin // 3, s.end // 3))
        own_offsets.append(own_offsets[-1] + len(rows[-1]))
    rows = np.concatenate(rows)
    got = cca.mpi.attend(
        ranks, layout, *(own(layout, x) for x in (q, k, v)), far_key[:, :, rows], far_value[:, :, rows],
        own(layout, seen), far_bias=bias[:, :, rows], far_offsets=own_offsets, **more,
    )  # fmt: skip
    for a, b in zip(got, wanted):
        assert np.abs(a - own(layout, b)).max(initial=0) < 1e-12
    last = ranks.size - 1
    with pytest.raises(ValueError, match=f"rank {last}: far_offsets: got|far_offsets: got float64, wants integers"):
        wrong = np.array(own_offsets) + 0.5 if ranks.rank == last else own_offsets
        cca.mpi.attend(
            ranks, layout, *(own(layout, x) for x in (q, k, v)), far_key[:, :, rows], far_value[:, :, rows],
            own(layout, seen), far_offsets=wrong, window=4,
        )  # fmt: skip


POOLINGS = [{}, {"pool": "mean"}, {"core_heads": "per_kv_head"}, {"pooling_scale": 2.0}]


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("more", POOLINGS, ids=["own", "mean", "shared", "sharper"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pool(name, more, dtype):
    """A core is on the rank of its group's last token, the cores of segments one after the other."""
    q, k, v = problem(dtype)
    layout, begins = layouts()[name], np.cumsum([0, *LENGTHS])
    options = {"group_size": 3, "sink_tokens": 2, **more}
    got = cca.mpi.pool(ranks, layout, *(own(layout, x) for x in (q, k, v)), **options)
    offsets = layout.core_offsets_of(ranks.rank, 3, 2)
    for s, first, last in zip(layout.segments_of(ranks.rank), offsets, offsets[1:]):
        tokens = slice(begins[s.sequence], begins[s.sequence + 1])
        whole = cca.pool(*(x[:, :, tokens] for x in (q, k, v)), **options)
        held = [c for c in range(whole[0].shape[2]) if s.begin <= 2 + 3 * c + 2 < s.end]
        assert last - first == len(held)
        for a, b in zip(got, whole):
            assert a.dtype == dtype
            bound = 1e-6 if dtype == np.float32 else 1e-14
            assert np.abs(a[:, :, first:last] - b[:, :, held]).max(initial=0) < bound
    assert offsets[-1] == got[0].shape[2] == got[1].shape[2]
    assert world.allreduce(offsets[-1]) == sum(max(n - 2, 0) // 3 for n in LENGTHS)


def test_pool_refuses():
    layout, last = layouts()["contiguous"], ranks.size - 1
    mine, wrong = [own(layout, x) for x in problem()], ranks.rank == ranks.size - 1
    with pytest.raises(ValueError, match=f"rank {last}: options.group_size: got 0"):
        cca.mpi.pool(ranks, layout, *mine, group_size=0 if wrong else 3)
    with pytest.raises(ValueError, match=f"rank {last}: options.sink_tokens: got -1"):
        cca.mpi.pool(ranks, layout, *mine, group_size=3, sink_tokens=-1 if wrong else 0)
    with refused(last, TypeError, ValueError, "sink_logits: got a ndarray, wants none"):
        cca.mpi.pool(ranks, layout, *mine, group_size=3, **({"sink_logits": np.zeros(4)} if wrong else {}))
    if ranks.size > 1:
        with pytest.raises(ValueError, match="options.group_size: got 3 on one rank and 4 on another"):
            cca.mpi.pool(ranks, layout, *mine, group_size=4 if wrong else 3)
        with pytest.raises(ValueError, match="different functions on different ranks"):
            if wrong:
                cca.mpi.pool(ranks, layout, *mine, group_size=3)
            else:
                cca.mpi.attention(ranks, layout, *mine, group_size=3)
    with pytest.raises(ValueError, match="group_size, sink_tokens: got 0, 0, wants at least 1 and 0"):
        layout.core_offsets_of(0, 0)
    assert cca.mpi.pool(ranks, layout, *mine, group_size=3)[0].shape[:2] == (1, 4)  # nobody is out of step


@contextlib.contextmanager
def refused(rank, error, others, match):
    """Raises on every rank: on one what it got wrong, on the others that it did."""
    kind, text = (error, match) if ranks.rank == rank else (others, f"rank {rank}: {match}")
    with pytest.raises(kind, match=text):
        yield


def test_what_one_rank_gets_wrong_all_refuse():
    layout = cca.mpi.Layout.contiguous(ranks.size, LENGTHS)
    mine = [own(layout, x) for x in problem()]
    last = ranks.size - 1
    wrong = ranks.rank == last
    with refused(last, TypeError, ValueError, "options.window: got '5', wants an integer"):
        cca.mpi.attention(ranks, layout, *mine, window="5" if wrong else 5)
    with refused(last, TypeError, ValueError, "key: got NoneType, wants a tensor"):
        cca.mpi.attention(ranks, layout, mine[0], None if wrong else mine[1], mine[2])
    with refused(last, ValueError, ValueError, r"value: got \[1, 2, 1, 3\], wants \[1, heads, "):
        cca.mpi.attention(ranks, layout, *mine[:2], np.zeros((1, 2, 1, 3)) if wrong else mine[2])
    # What the library itself refuses names the rank on all of them.
    with pytest.raises(ValueError, match=f"rank {last}: key: got float32, wants float64"):
        cca.mpi.attention(ranks, layout, mine[0], mine[1].astype(np.float32) if wrong else mine[1], mine[2])
    with pytest.raises(ValueError, match="threads: got -1"):
        cca.mpi.attention(ranks, layout, *mine, threads=-1 if wrong else 1)
    if ranks.size > 1:
        with pytest.raises(ValueError, match="options.window: got 5 on one rank and 6 on another"):
            cca.mpi.attention(ranks, layout, *mine, window=6 if wrong else 5)
    assert cca.mpi.attention(ranks, layout, *mine).shape == (1, 4, mine[0].shape[2], 3)  # nobody is out of step


def test_layouts_are_checked():
    with pytest.raises(ValueError, match="layout.segments: got token 4 of sequence 0 on no rank"):
        cca.mpi.Layout(2, [6], [(0, 0, 0, 4), (1, 0, 5, 6)])
    with pytest.raises(ValueError, match="layout.ranks: got 0"):
        cca.mpi.Layout.contiguous(0, [6])
    head_to_tail = cca.mpi.Layout.head_to_tail(2, [8])
    assert [head_to_tail.segments_of(r) for r in (0, 1)] == [[(0, 0, 0, 2), (0, 0, 6, 8)], [(1, 0, 2, 4), (1, 0, 4, 6)]]
    assert cca.mpi.Layout.contiguous(2, [4, 2]).segments == [(0, 0, 0, 2), (0, 1, 0, 1), (1, 0, 2, 4), (1, 1, 1, 2)]
    assert cca.mpi.Layout.concatenated(2, [4, 2]).segments == [(0, 0, 0, 3), (1, 0, 3, 4), (1, 1, 0, 2)]
    layout = cca.mpi.Layout(2, [6], [(0, 0, 0, 4), (1, 0, 4, 6)])
    assert layout.segments_of(1) == [(1, 0, 4, 6)] and layout.offsets_of(0) == [0, 4]
    of_two = cca.mpi.Layout.contiguous(2, [4, 3])
    assert of_two.places_of(1) == [2, 3, 5, 6] and of_two.positions_of(1) == [2, 3, 1, 2]
    assert of_two.core_offsets_of(1, 2) == [0, 1, 2] and of_two.core_offsets_of(0, 2, 1) == [0, 0, 0]
    with pytest.raises(TypeError, match="communicator: got int"):
        cca.mpi.Ranks(3)
    with pytest.raises(TypeError, match="ranks: got int, wants cca.mpi.Ranks"):
        cca.mpi.merge(3, np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)))


def test_freed_ranks():
    freed = cca.mpi.Ranks(world)
    cache = cca.mpi.KvCache(freed, heads=4, kv_heads=2, dim=5)
    freed.free()
    with pytest.raises(ValueError, match="cca: ranks: got freed ones"):
        cca.mpi.merge(freed, np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match="cca: ranks: got freed ones"):
        cache.attend(*(np.zeros((1, heads, 1, 5), np.float32) for heads in (4, 2, 2)))


def test_merge():
    rng = np.random.default_rng(4)
    q = rng.normal(size=(1, 2, 3, 4))
    parts = rng.normal(size=(2, ranks.size, 1, 2, 8, 4))
    k, v = parts[:, ranks.rank]
    out, lse = cca.attention(q, k, v, lookahead=cca.UNLIMITED, return_lse=True)
    whole = [np.concatenate(list(x), 2) for x in parts]
    want, want_lse = cca.attention(q, *whole, lookahead=cca.UNLIMITED, return_lse=True)
    got, got_lse = cca.mpi.merge(ranks, out, lse)
    assert np.abs(got - want).max() < 1e-12 and np.abs(got_lse - want_lse).max() < 1e-12


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_cache(dtype):
    rng = np.random.default_rng(5)
    made = [rng.normal(size=(2, heads, 40, dim)) for heads, dim in ((4, 5), (2, 5), (2, 3))]
    if dtype == "bfloat16":
        made = [x.astype(pytest.importorskip("ml_dtypes").bfloat16) for x in made]
    want = cca.attention(*made, **OPTIONS).astype(float)
    layout = cca.mpi.Layout.contiguous(ranks.size, [30, 30])
    cache = cca.mpi.KvCache(
        ranks, batch=2, heads=4, kv_heads=2, dim=5, value_dim=3, dtype=dtype, window_rank=ranks.size - 1, **OPTIONS
    )
    mine = layout.segments_of(ranks.rank)
    cache.append(layout, *(np.concatenate([x[s.sequence][None, :, s.begin : s.end] for s in mine], 2) for x in made))
    for t in range(30, 40):
        out = cache.attend(*(x[:, :, t : t + 1] for x in made))
        bound = 1e-12 if dtype == "float64" else 2e-2
        assert np.abs(out.astype(float) - want[:, :, t : t + 1]).max() < bound
        assert world.bcast(out.tobytes()) == out.tobytes()
    assert cache.length() == 40 and world.allreduce(cache.core_count()) == (40 - 2) // 3
    assert (cache.raw_count() > 0) == (ranks.rank == ranks.size - 1)
    last = ranks.size - 1
    with refused(last, TypeError, ValueError, "query: got NoneType, wants a tensor"):
        cache.attend(None if ranks.rank == last else made[0][:, :, :1], *(x[:, :, :1] for x in made[1:]))
    with pytest.raises(ValueError, match="window_rank: got 77"):
        cca.mpi.KvCache(ranks, heads=4, kv_heads=2, dim=5, window_rank=77)
    assert cache.length() == 40


@pytest.mark.parametrize("terms", [False, True])
def test_autograd(terms):
    torch = pytest.importorskip("torch")
    layout = cca.mpi.Layout.head_to_tail(ranks.size, LENGTHS)
    whole = [torch.tensor(x, requires_grad=True) for x in problem()]
    mine = [torch.tensor(own(layout, x.detach().numpy()), requires_grad=True) for x in whole]
    rng = np.random.default_rng(6)
    more = {"sink_logits": torch.tensor(rng.normal(size=4), requires_grad=True)} if terms else {}
    weights = rng.normal(size=(1, 4, sum(LENGTHS), 3))
    offsets = {name: torch.tensor(x) for name, x in OFFSETS.items()}
    (cca.attention(*whole, **OPTIONS, **more, **offsets) * torch.tensor(weights)).sum().backward()
    wanted = [x.grad.numpy() for x in whole]
    shared = [x.grad.clone() for x in more.values()]
    for x in more.values():
        x.grad = None
    out, lse = cca.mpi.attention(ranks, layout, *mine, **OPTIONS, **more, return_lse=True)
    assert out.requires_grad
    # The log-sum-exps have a part on one rank alone.
    loss = (out * torch.tensor(own(layout, weights))).sum()
    (loss + 0 * lse.sum() if ranks.rank == 0 else loss).backward()
    for x, want in zip(mine, wanted):
        assert np.abs(x.grad.numpy() - own(layout, want)).max(initial=0) < 1e-12
    for x, want in zip(more.values(), shared):
        assert torch.allclose(x.grad, want, rtol=0, atol=1e-12)
