"""Models of transformers, small ones with random weights, with cca's attention beside eager attention."""

import copy
import inspect
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import cca
import cca.hf
import small_models
from small_models import CONFIGS, CORES
from transformers import AttentionInterface, DynamicCache, StaticCache

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


@pytest.fixture(autouse=True)
def registered():
    cca.hf.register()


def model_of(name, implementation="cca"):
    return small_models.model_of(name, implementation).eval()


def tokens(batch=2, length=20):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def padded(side, lengths=(20, 13)):
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, slice(-n, None) if side == "left" else slice(0, n)] = 1
    return ids * mask, mask


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_dense_is_eager(name):
    ids = tokens()
    ours, eager = model_of(name), model_of(name, "eager")
    assert close(ours(ids).logits, eager(ids).logits)
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        a, b = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (ours, eager))
        assert close(a[mask.bool()], b[mask.bool()])


@torch.no_grad()
@pytest.mark.heavy
@pytest.mark.parametrize("name", CONFIGS)
def test_generate_is_eager(name):
    ids, mask = padded("left")
    want = model_of(name, "eager").generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    model = model_of(name)
    for cache in (None, "static", cca.hf.Cache(model.config)):
        more = {"cache_implementation": "static"} if cache == "static" else {CACHE: cache} if cache is not None else {}
        if cache == "static":
            more["disable_compile"] = True
        got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **more)
        assert torch.equal(got, want), cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_cache_gives_what_the_whole_gives(name):
    ids = tokens()
    model = model_of(name)
    with cca.hf.settings(**CORES):
        want = model(ids).logits
        assert not close(want, model_of(name, "eager")(ids).logits)
        for cuts in ([0, 20], [0, 1, 2, 3, 20], [0, 11, 12, 13, 17, 20]):
            cache = cca.hf.Cache(model.config)
            got = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in zip(cuts, cuts[1:])]
            assert close(torch.cat(got, 1), want)


@torch.no_grad()
def test_padded_rows_are_as_if_alone():
    model = model_of("llama")
    model.config.cca = CORES
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        for b in range(2):
            assert close(got[b][mask[b].bool()], model(ids[b][mask[b].bool()][None]).logits[0])
    # Row by row into the cache, then one token for each.
    ids, mask = padded("left")
    text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **{CACHE: cca.hf.Cache(model.config)})
    for b in range(2):
        alone = ids[b][mask[b].bool()][None]
        one = model.generate(alone, max_new_tokens=8, do_sample=False, **{CACHE: cca.hf.Cache(model.config)})
        assert torch.equal(text[b, -8:], one[0, -8:])


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model = model_of("llama")
    model.config.cca = CORES
    lengths = (7, 1, 2, 10)
    ids = tokens(1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(ids, position_ids=positions, use_cache=False).logits
    offsets = torch.tensor([0, 7, 8, 10, 20], dtype=torch.int32)
    alone = [model(x, use_cache=False).logits for x in ids.split(lengths, 1)]
    assert close(got, torch.cat(alone, 1))
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    more = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=10, max_length_k=10)
    packed = cca.hf.attention_forward(layer, q, k, k, None, **more)[0]
    parts = (x.split(lengths, 2) for x in (q, k, k))
    alone = [cca.hf.attention_forward(layer, *part, None)[0] for part in zip(*parts)]
    assert torch.equal(packed, torch.cat(alone, 1))


@torch.no_grad()
def test_a_later_token_changes_nothing_before():
    model, ids = model_of("llama"), tokens()
    model.config.cca = CORES
    want = model(ids).logits
    ids[:, 12] = 3
    assert torch.equal(model(ids).logits[:, :12], want[:, :12])


def test_dense_layers_stay_dense():
    model, ids = model_of("llama"), tokens()
    with torch.no_grad():
        dense = model(ids).logits
        model.config.cca = CORES | {"dense_layers": [0, 1]}
        assert torch.equal(model(ids).logits, dense)
        model.config.cca = CORES | {"dense_layers": [1]}
        assert not close(model(ids).logits, dense)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients_are_eager(name):
    ids = tokens()
    ours, eager = model_of(name), model_of(name, "eager")
    for model in (ours, eager):
        model(ids, labels=ids).loss.backward()
    for (n, a), b in zip(ours.named_parameters(), eager.parameters()):
        assert (a.grad is None) == (b.grad is None), n
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), n


def test_autocast_is_near():
    model, ids = model_of("llama"), tokens()
    with cca.hf.settings(**CORES):
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
            logits.float().square().sum().backward()
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.heavy
def test_assisted_decoding_gives_the_same_text():
    model, assistant = model_of("llama"), model_of("llama")
    torch.nn.init.normal_(assistant.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(9))
    assistant.lm_head.weight.mul_(0.3).add_(model.lm_head.weight)
    model.config.cca = CORES
    ids = tokens(1)
    want = model.generate(ids, max_new_tokens=24, do_sample=False, **{CACHE: cca.hf.Cache(model.config)})
    got = model.generate(
        ids, max_new_tokens=24, do_sample=False, assistant_model=assistant, **{CACHE: cca.hf.Cache(model.config, rewind=64)}
    )
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.heavy
def test_beams_are_eager():
    ids, mask = padded("left")
    more = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, num_beams=3)
    want = model_of("llama", "eager").generate(ids, **more)
    model = model_of("llama")
    assert torch.equal(model.generate(ids, **more, **{CACHE: cca.hf.Cache(model.config)}), want)


@torch.no_grad()
def test_rows_are_selected_and_repeated():
    model, ids = model_of("llama"), tokens(3)
    model.config.cca = CORES

    def answer(sources):
        cache = cca.hf.Cache(model.config)
        model(ids[:, :15], **{CACHE: cache})
        sources(cache)
        return cache

    for change, rows in [
        (lambda c: c.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ]:
        cache = answer(change)
        want = model(ids).logits[rows, 15:]
        got = [model(ids[rows, i : i + 1], **{CACHE: cache}).logits for i in range(15, 20)]
        assert close(torch.cat(got, 1), want)


@torch.no_grad()
@pytest.mark.heavy
def test_crops():
    model, ids = model_of("llama"), tokens(2)
    model.config.cca = CORES
    want = model(ids).logits
    for first in range(8, 16):
        for count in range(1, 5):
            cache = cca.hf.Cache(model.config, rewind=4)
            model(ids[:, :first], **{CACHE: cache})
            for _ in range(2):
                model(torch.full((2, count), 7), **{CACHE: cache})
                cache.crop(-count)
            assert close(model(ids[:, first:], **{CACHE: cache}).logits, want[:, first:])
    with pytest.raises(ValueError, match="crop: got 15 tokens"):
        cache.crop(-15)


@torch.no_grad()
def test_refusals():
    model, ids = model_of("llama"), tokens()
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)

    def call(mask=None, **more):
        cca.hf.attention_forward(layer, q, k, k, mask, **more)

    for more, text in [
        (dict(dropout=0.1), "dropout: got 0.1"),
        (dict(position_bias=torch.zeros(1)), "position_bias: got a Tensor"),
        (dict(output_attentions=True), "output_attentions: got a bool"),
        (dict(indices=torch.zeros(1)), "indices"),
        (dict(a_new_one=1), "a_new_one"),
        (dict(mask=torch.zeros(1, 1, 5, 5)), "attention_mask: got 4 dimensions"),
        (dict(mask=torch.tensor([[1, 0, 1, 1, 1]])), "attention_mask: got a row with holes"),
        (dict(is_causal=False, sliding_window=3), "sliding_window: got 3 without causality"),
    ]:
        with pytest.raises(ValueError, match=text):
            call(**more)
    with pytest.raises(ValueError, match="mask function: got .*or_mask"):
        from transformers.masking_utils import or_masks, causal_mask_function

        cca.hf.attention_mask(1, 5, 5, mask_function=or_masks(causal_mask_function, causal_mask_function))
    with pytest.raises(ValueError, match="mask function: got .*chunked_overlay"):
        from transformers.masking_utils import chunked_causal_mask_function

        cca.hf.attention_mask(1, 5, 5, mask_function=chunked_causal_mask_function(3, torch.zeros(1)))
    with pytest.raises(ValueError, match="settings: got windo"):
        with cca.hf.settings(windo=3):
            pass
    with cca.hf.settings(**CORES):
        with pytest.raises(ValueError, match="cache: got one that keeps keys and no cores"):
            cache = DynamicCache(config=model.config)
            model(ids, **{CACHE: cache})
            model(ids[:, :1], **{CACHE: cache})

    cache = cca.hf.Cache(model.config)
    model(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="query: got a batch of 1, wants the cache's, 2"):
        model(ids[:1, :1], **{CACHE: cache})
    cache = cca.hf.Cache(model.config)
    model(ids, **{CACHE: cache})
    with cca.hf.settings(**CORES):
        with pytest.raises(ValueError, match="cache: got the options"):
            model(ids[:, :1], **{CACHE: cache})
    cache = cca.hf.Cache(model.config)
    model(ids, **{CACHE: cache})
    other = model_of("llama", "sdpa")
    with pytest.raises(RuntimeError, match="another attention than cca's"):
        other(ids[:, :1], **{CACHE: cache})
        other(ids[:, :1], **{CACHE: cache})


def test_the_cache_of_another_model_is_refused():
    model, ids = model_of("llama"), tokens()
    for change, text in [
        ({"num_hidden_layers": model.config.num_hidden_layers - 1}, "cache: got one of 1 layers"),
        ({"num_attention_heads": 8}, "query: got"),
        ({"num_key_value_heads": 4}, "key: got"),
        ({"head_dim": 16}, "cache: got the options"),  # another scale
    ]:
        config = copy.deepcopy(model.config)
        for name, x in change.items():
            setattr(config, name, x)
        cache = cca.hf.Cache(config)
        with torch.no_grad():
            if "num_hidden_layers" not in change:
                other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cca")
                other(ids, **{CACHE: cache})
            with pytest.raises(ValueError, match="^cca: " + text):
                model(ids[:, :1], **{CACHE: cache})


def test_a_stale_cache_is_refused():
    """Its tokens are not those before the new ones."""
    model = model_of("llama")
    cache = cca.hf.Cache(model.config)
    ids, mask = padded("left")
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"cache: got \d+ tokens, wants \d+, which the mask says"), torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})  # without the mask, padding would be tokens


def test_half_a_registration_is_refused():
    AttentionInterface.register("half_cca", cca.hf.attention_forward)
    model = model_of("llama", "half_cca")
    with pytest.raises(ValueError, match="half_cca without its mask function"):
        model(tokens())


def test_perplexity():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    import perplexity

    model, ids = model_of("llama"), tokens(1, 60)
    nats = {name: perplexity.losses(model, ids, options)[0] for name, options in perplexity.SETTINGS.items()}
    assert all(x.shape == (59,) and close(x, nats["dense"]) for x in nats.values())  # shorter than the window
