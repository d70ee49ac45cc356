"""cca's operators of PyTorch."""

import pytest

torch = pytest.importorskip("torch")

import cca
import cca.torch  # defines torch.ops.cca

OPTIONS = {"group_size": 3, "window": 4}


def operands(dtype=torch.float64, grad=False, length=11, batch=2):
    torch.manual_seed(1)

    def make(heads, dim):  # [batch, length, heads, dim] in memory
        return torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_(grad)

    return make(4, 5), make(2, 5), make(2, 3)


def options_of(**more):
    return OPTIONS | more


def test_every_argument_is_in_the_schema():
    operators = cca.torch.OPERATORS
    assert set(operators["attention"].options) == {*cca.Options.__annotations__, "threads"}
    assert set(operators["attend"].options) == {*cca.Options.__annotations__, "block_rows", "block_queries", "threads"}
    for name, annotations in (("attention", cca.AttentionArguments), ("attend", cca.AttendArguments)):
        arguments = [x.name for x in operators[name].op._schema.arguments]
        assert {*annotations.__annotations__} <= {*arguments} and len(arguments) == len({*arguments})
    defaults = cca._library.options_of({})
    for name, default in operators["attention"].options.items():
        if name != "threads":
            assert bytes(cca._library.options_of({name: default})) == bytes(defaults), name


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_dense_is_that_of_pytorch(layout):
    q, k, v = operands()
    if layout == "bhld":
        q, k, v = (x.contiguous() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(cca.attention(q, k, v), want, rtol=0, atol=1e-12)


def test_operator_and_library_give_the_same_bits():
    q, k, v = operands(torch.float32)
    direct = cca.attention(q, k, v, return_lse=True, **OPTIONS)
    followed = cca.attention(*(x.detach().requires_grad_() for x in (q, k, v)), return_lse=True, **OPTIONS)
    for a, b in zip(direct, followed):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("terms", [False, True])
def test_gradcheck(terms):
    q, k, v = operands(grad=True)
    if terms:
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
        slopes = torch.rand(1, 4, 1, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(2, 2, 11, dtype=torch.float64, requires_grad=True)

        def call(*x):
            return cca.attention(*x[:3], sink_logits=x[3], alibi_slopes=x[4], key_bias=x[5], return_lse=True, window=4)

        assert torch.autograd.gradcheck(call, (q, k, v, sinks, slopes, bias))
    else:
        assert torch.autograd.gradcheck(lambda *x: cca.attention(*x, return_lse=True, **OPTIONS), (q, k, v))


def test_gradcheck_of_far_context():
    q, k, v = operands(grad=True)
    far_key, far_value = (x.detach()[:, :, :3].clone().requires_grad_() for x in (k, v))
    bias = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    seen = (torch.arange(11) // 3).clamp(max=3).expand(2, 4, 11)

    def call(q, k, v, far_key, far_value, bias):
        return cca.attend(q, k, v, far_key, far_value, seen, far_bias=bias, return_lse=True, window=4)

    assert torch.autograd.gradcheck(call, (q, k, v, far_key, far_value, bias))


@pytest.mark.parametrize("by", ["positions", "lists"])
def test_gradcheck_of_selected_rows(by):
    q, k, v = operands(grad=True)
    far_key, far_value = (x.detach()[:, :, :5].clone().requires_grad_() for x in (k, v))
    if by == "positions":
        who = {"visible_from": torch.arange(5).expand(1, 1, 5), "visible_until": torch.arange(5).expand(1, 1, 5) + 3}
    else:
        who = {"selected_blocks": torch.tensor([[0, 2], [1, -1], [0, 1]]).expand(1, 1, 3, 2), "block_rows": 2}
        who["block_queries"] = 4

    def call(*tensors):
        return cca.attend(*tensors, return_lse=True, window=4, **who)

    assert torch.autograd.gradcheck(call, (q, k, v, far_key, far_value))
    out = call(q, k, v, far_key, far_value)[0]
    assert torch.equal(out, torch.compile(call, fullgraph=True, backend="eager")(q, k, v, far_key, far_value)[0])


def test_operands_beside_those_that_require_gradients():
    q, k, v = operands(grad=True)
    for key, text in [
        (k.detach().long(), "key: got int64, wants float64"),
        (k.detach().to("meta"), "key: got a tensor on meta, wants one on the cpu"),
        (k.detach().float(), "key: got float32, wants float64"),
    ]:
        with pytest.raises(ValueError, match="^cca: " + text):
            cca.attention(q, key, v)
    with pytest.raises(ValueError, match="cca: out: got a tensor, wants None where PyTorch follows"):
        cca.attention(q, k, v, out=torch.empty(2, 4, 11, 3))
    with pytest.raises(ValueError, match="cca: lse: got a tensor, wants None where PyTorch follows"):
        cca.attention(q, k, v, lse=torch.empty(2, 4, 11))


def test_what_autograd_does_not_see_is_refused():
    q, k, v = operands(grad=True)
    with pytest.raises(ValueError, match="cca: query: got a tensor that requires gradients, wants none: pool has no"):
        cca.pool(q, k, v, group_size=3)
    with pytest.raises(ValueError, match="cca: key: got a tensor that requires gradients, wants none: a cache has no"):
        cache = cca.KvCache(batch=2, heads=4, kv_heads=2, dim=5, value_dim=3, dtype=torch.float64)
        cache.attend(q.detach(), k, v.detach())
    out, lse = cca.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="cca: out_a: got a tensor that requires gradients"):
        cca.merge(out, lse, out, lse)
    with torch.no_grad():
        assert cca.pool(q, k, v, group_size=3)[0].shape == (2, 4, 3, 5)


def test_releases_without_the_interface_for_c(monkeypatch):
    """Of DLPack, which older ones of PyTorch lack."""
    q, k, v = operands(grad=True)
    want = cca.attention(q, k, v, **OPTIONS)
    wanted = torch.autograd.grad(want.square().sum(), (q, k, v))
    monkeypatch.setattr(cca._library, "_exchange_of", lambda kind: None)
    monkeypatch.setattr(cca._library, "_exchanges", {})
    monkeypatch.setattr(cca._library, "_exporters", {})
    got = cca.attention(q, k, v, **OPTIONS)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(got.square().sum(), (q, k, v)), wanted))
    with torch.no_grad():
        assert torch.equal(cca.attention(q, k, v, **OPTIONS), want)
        with pytest.raises(ValueError, match="key: got a negated tensor"):
            cca.attention(q, torch.imag(torch.complex(k, k).conj()), v)
        with pytest.raises(ValueError, match="key: got a sparse"):
            cca.attention(q, k.to_sparse(), v)


@pytest.mark.parametrize("grad", [False, True])
def test_options_are_no_tensors(grad):
    """Which change, while what is made of options is remembered."""
    q, k, v = operands(grad=grad)
    for name, x, wanted in (("window", torch.tensor(3), "an integer"), ("softcap", torch.tensor(3.0), "a number")):
        with pytest.raises(TypeError, match=f"cca: options.{name}: got a Tensor, wants {wanted}"):
            cca.attention(q, k, v, **{name: x})


@pytest.mark.parametrize("grad", [False, True])
def test_lengths_are_integers(grad):
    q, k, v = operands(grad=grad)
    want = cca.attention(q, k, v, key_lengths=torch.tensor([7, 4]))
    assert torch.equal(cca.attention(q, k, v, key_lengths=torch.tensor([7, 4], dtype=torch.uint8)), want)
    truths = torch.tensor([True, True])
    for wrong, name in ((torch.tensor([7.5, 4.0]), "float32"), (truths, "bool"), ([7.5, 4], "float32")):
        with pytest.raises(ValueError, match=f"cca: key_lengths: got {name}, wants integers"):
            cca.attention(q, k, v, key_lengths=wrong)


def test_rows_of_8_bits():
    q, k, v = operands(torch.float32)
    (kq, ks), (vq, vs) = cca.quantize(k), cca.quantize(v)
    assert kq.dtype == torch.int8 and ks.dtype == torch.float32
    scales = {"key_scales": ks, "value_scales": vs}
    want = cca.attention(q, kq.float() * ks[..., None], vq.float() * vs[..., None], window=4)
    got = cca.attention(q, kq, vq, window=4, **scales)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    none = [None] * (len(cca.torch.OPERATORS["attention"].tensors) - 5)
    assert torch.equal(torch.ops.cca.attention(q, kq, vq, *none, ks, vs, window=4)[0], got)
    with pytest.raises(ValueError, match="cca: key_scales: got a tensor, wants none where gradients are wanted"):
        cca.attention(q.requires_grad_(), kq, vq, **scales)
    with pytest.raises(ValueError, match="cca: rows: got a tensor that requires gradients"):
        cca.quantize(k.requires_grad_())


def test_operators_remember_their_plans(monkeypatch):
    """As the library's functions do."""
    q, k, v = operands()
    none = [None] * (len(cca.torch.OPERATORS["attention"].tensors) - 3)
    want = torch.ops.cca.attention(q, k, v, *none, window=4)
    monkeypatch.setattr(cca._library, "plan_of", None)
    assert torch.equal(torch.ops.cca.attention(q, k, v, *none, window=4)[0], want[0])


def test_gradients_of_16_bits_have_their_elements():
    q, k, v = operands(torch.bfloat16, grad=True)
    gradients = torch.autograd.grad(cca.attention(q, k, v, **OPTIONS).sum(), (q, v))
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 2


def test_lse_alone_has_gradients():
    q, k, v = operands(grad=True)
    gradient = torch.autograd.grad(cca.attention(q, k, v, return_lse=True)[1].sum(), q)[0]
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / 5**0.5
    scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    assert torch.allclose(gradient, torch.autograd.grad(scores.logsumexp(-1).sum(), q)[0], atol=1e-12)


def test_no_second_derivative():
    q, k, v = operands(grad=True)
    (first,) = torch.autograd.grad(cca.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_no_vmap():
    q, k, v = operands()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda q, k, v: cca.attention(q[None], k[None], v[None]))(q, k, v)


def variants():
    q, k, v = operands(torch.float32, grad=True)
    lengths = torch.tensor([7, 4])
    offsets = torch.tensor([0, 4, 4, 11])
    one = [x[:1] for x in (q, k, v)]
    return {
        "cores": ((q, k, v), OPTIONS),
        "odd": ((q[:, :, 3:], k, v), {}),
        "lengths": ((q, k, v), OPTIONS | {"query_lengths": lengths, "key_lengths": lengths}),
        "offsets": (one, OPTIONS | {"query_offsets": offsets, "key_offsets": offsets}),
        "terms": ((q, k, v), {"sink_logits": torch.randn(4, requires_grad=True), "softcap": 3.0, "window": 5}),
    }


@pytest.mark.parametrize("name", variants())
def test_opcheck(name):
    tensors, options = variants()[name]
    options = dict(options)
    more = [options.pop(x, None) for x in cca.torch.OPERATORS["attention"].tensors[3:]]
    torch.library.opcheck(torch.ops.cca.attention.default, (*tensors, *more), options)


@pytest.mark.heavy
@pytest.mark.parametrize("name", variants())
def test_compiled_is_eager_to_the_bit(name):
    tensors, options = variants()[name]

    def call(q, k, v):
        out, lse = cca.attention(q * 2, k, v, return_lse=True, **options)
        return out.transpose(1, 2).flatten(2) + 1, lse

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for length in (11, 11 if "offsets" in name or "lengths" in name else 8):
        part = [x[:, :, -length:] for x in tensors]
        want, got = call(*part), compiled(*part)
        assert all(torch.equal(a, b) for a, b in zip(want, got))
        wanted = torch.autograd.grad(want[0].square().sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(wanted, torch.autograd.grad(got[0].square().sum(), tensors)))


def test_padding_is_zero_and_changes_nothing():
    q, k, v = operands()
    lengths = torch.tensor([7, 4])
    out = cca.attention(q, k, v, query_lengths=lengths, key_lengths=lengths, **OPTIONS)
    for b, n in enumerate(lengths):
        alone = cca.attention(*(x[b : b + 1, :, :n] for x in (q, k, v)), **OPTIONS)
        assert torch.equal(out[b : b + 1, :, :n], alone) and not out[b, :, n:].any()


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda q, k, v: (q.float(), k, v), "key: got float64, wants float32"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "query: got int32, wants float32"),
        (lambda q, k, v: (q.to("meta"), k, v), "query: got a tensor on meta, wants one on the cpu"),
        (lambda q, k, v: (q, k[..., ::2].repeat(1, 1, 1, 2)[..., :5], v[..., ::2]), "value: got strides"),
        (lambda q, k, v: (q, k.to_sparse(), v), "key: got a sparse"),
        (lambda q, k, v: (q, torch.imag(torch.complex(k, k).conj()), v), "key: got a negated"),
        (lambda q, k, v: (q[0], k, v), "query: got 3 dimensions, wants 4"),
        (lambda q, k, v: (q, k, v[0]), "value: got 3 dimensions, wants 4"),
        (lambda q, k, v: (q[:, :3], k, v), "key: got 2 heads, wants a divisor of the 3 query heads"),
        (lambda q, k, v: (q, k[..., :0], v), "key: got dim 0"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_refusals(change, text, grad):
    q, k, v = change(*operands())
    if grad and (not q.is_floating_point() or q.is_meta):  # those of PyTorch's own concern
        return
    with pytest.raises(ValueError, match="^cca: " + text.replace("[", r"\[")):
        cca.attention(q.requires_grad_(grad), k, v)
