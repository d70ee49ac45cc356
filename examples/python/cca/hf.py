"""cca in models of Hugging Face's transformers.

    import cca.hf
    cca.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cca")
    model.config.cca = {"group_size": 16, "window": 1024, "sink_tokens": 4, "dense_layers": [0, 1]}
    model.generate(**inputs, cache=cca.hf.Cache(model.config))  # past_key_values= in releases before 5.24

Without settings attention is what the model was made with: dense, or a sliding window where the layer has one. Settings are
those of the model's config (of its text model, where there are several) or, in their place, of `with cca.hf.settings(..)`.
They are the options of `cca.attention`, for layers that see everything and are not among `dense_layers`; a layer with a
sliding window of its own keeps it.

Padding on either side, and documents packed one after the other (by position_ids or cu_seq_lens), are taken as sequences
that are each as if alone. Padding is answered with 0. What cca does not compute is refused by its name.
"""

import contextlib
import contextvars
import copy

import torch
import transformers.cache_utils
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from . import UNLIMITED, KvCache, Options, attention

__all__ = ["Cache", "CacheLayer", "register", "settings"]

_settings = contextvars.ContextVar("settings of cca", default=None)
_SETTINGS = {*Options.__annotations__, "dense_layers"} - {"softmax_scale", "softcap", "first_position", "lookahead", "prefix"}
# Keywords that say nothing about what is computed here, or say it again.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "max_length_q", "max_length_k", "cache", "past_key_values",
    "output_hidden_states", "return_dict", "num_items_in_batch", "logits_to_keep", "output_router_logits", "labels",
    "shift_labels",
}  # fmt: skip


def register(name: str = "cca") -> None:
    """Makes `attn_implementation=name` known to transformers: the attention and, beside it, its mask."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def _checked_settings(given):
    for name in given:
        if name not in _SETTINGS:
            raise ValueError(f"cca: settings: got {name}, wants one of {', '.join(sorted(_SETTINGS))}")
    return dict(given)


@contextlib.contextmanager
def settings(**options):
    """The settings of all models inside of `with`, in place of their config's."""
    token = _settings.set(_checked_settings(options))
    try:
        yield
    finally:
        _settings.reset(token)


def _refuse(name, got, wanted):
    raise ValueError(f"cca: {name}: got {got}, wants {wanted}")


# Masks.


def _free_variables(function):
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _understand(function):
    """What a mask function of transformers means: {"window": .., "packed": ids of sequences, "bidirectional": True}, of
    which what is not so is absent. They are known by their names: a mask that is only nearly like them would be lost."""
    if function is causal_mask_function:
        return {}
    if function is bidirectional_mask_function:
        return {"bidirectional": True}
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    place = name.removeprefix("transformers.masking_utils.")
    free = _free_variables(function) if hasattr(function, "__code__") else {}
    if place == "and_masks.<locals>.and_mask":
        meaning = {}
        for part in free["mask_functions"]:
            meaning |= _understand(part)
        return meaning
    if place == "sliding_window_overlay.<locals>.inner_mask":
        return {"window": free["sliding_window"]}
    if place == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _understand(free["mask_function"])
    if place == "packed_sequence_mask_function.<locals>.inner_mask":
        return {"packed": free["packed_sequence_mask"]}
    _refuse("mask function", name, "causal masks and sliding windows, padded or packed")


def attention_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    **_,
):
    """The mask of cca: None where every token sees those before it, or the ids of sequences [batch, kv length]: 0 is no
    token, and equal ones that lie together are a sequence of its own."""
    meaning = _understand(mask_function)
    q_length = q_length.shape[0] if isinstance(q_length, torch.Tensor) else q_length  # of older releases
    window = meaning.get("window")
    end = int(q_offset) + q_length - kv_offset  # behind it there are places of a static cache that hold nothing yet
    if meaning.get("bidirectional"):
        end = kv_length
    ids = None
    if "packed" in meaning:
        ids = meaning["packed"].expand(batch_size, -1).to(torch.int64) + 1
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.int64)
        if padding.shape[1] < kv_length:
            padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
        ids = padding if ids is None else ids * padding
    if end < kv_length:
        ids = torch.ones(batch_size, kv_length, dtype=torch.int64) if ids is None else ids
        ids = ids * (torch.arange(kv_length) < end)
    if ids is not None and not torch.compiler.is_compiling() and bool((ids == 1).all()):
        ids = None
    if window is not None and window < kv_length and not torch.compiler.is_compiling():
        # A layer that says nothing of the window would lose it.
        ids = torch.ones(batch_size, kv_length, dtype=torch.int64) if ids is None else ids
        ids.cca_window = window
    if end < kv_length:
        ids.cca_end = end
    return ids


def _sequences(ids):
    """The sequences [begin, end) of each row of a mask."""
    known = getattr(ids, "cca_sequences", None)
    if known is not None:
        return known
    rows = []
    for row in ids:
        edges = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()
        edges = [0, *edges, len(row)]
        names = row[edges[:-1]].tolist()
        found = [(begin, end) for begin, end, name in zip(edges, edges[1:], names) if name != 0]
        if len(found) != len({name for name in names if name != 0}):
            _refuse("attention_mask", "a row with holes", "rows that are padded before or behind their tokens")
        rows.append(found)
    ids.cca_sequences = rows
    return rows


# Attention.


def _settings_of(module):
    given = _settings.get()
    if given is None:
        given = getattr(module.config, "cca", None)
        given = _checked_settings(given) if given else {}
    return given


def _options(module, causal, scaling, sliding_window, softcap):
    options = {}
    if scaling is not None:
        options["softmax_scale"] = scaling
    if softcap is not None:
        options["softcap"] = softcap
    given = dict(_settings_of(module))
    dense = given.pop("dense_layers", ())
    if not causal:
        if sliding_window is not None:
            _refuse("sliding_window", f"{sliding_window} without causality", "None")
        return options | {"lookahead": UNLIMITED, "first_position": 0}
    if sliding_window is not None:
        return options | {"window": sliding_window}
    return options if getattr(module, "layer_idx", None) in dense else options | given


def _understood(
    module,
    query,
    attention_mask,
    mask_function,
    *,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    sinks=None,
    **more,
):
    """The options of a layer's call, and its sink logits. mask_function: what has to be registered beside the attention.
    Refuses what cca does not compute."""
    for name, x in more.items():
        if name not in _HARMLESS and x is not None and x is not False:
            _refuse(name, f"a {type(x).__name__}", "None: cca does not compute it")
    if dropout:
        _refuse("dropout", dropout, "0")
    implementation = module.config._attn_implementation
    if implementation in AttentionInterface._global_mapping and (
        AttentionMaskInterface._global_mapping.get(implementation) is not mask_function
    ):
        _refuse("attn_implementation", f"{implementation} without its mask function", f"{mask_function.__module__}.register()")
    if attention_mask is not None and attention_mask.ndim != 2:
        _refuse("attention_mask", f"{attention_mask.ndim} dimensions", "2: masks of pairs of tokens are not computed")
    said = getattr(attention_mask, "cca_window", None)
    if said is not None and said != sliding_window:
        _refuse("sliding_window", sliding_window, f"{said}, which the mask has")

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options = _options(module, causal, scaling, sliding_window, softcap)
    sink_logits = s_aux if s_aux is not None else sinks
    if sink_logits is not None:
        sink_logits = sink_logits.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return options, sink_logits


def _of_one_type(query, value):
    """The values: autocast's projections are of 16 bits, and RoPE makes queries and keys float32."""
    return value.to(query.dtype) if torch.is_autocast_enabled(query.device.type) else value


def attention_forward(module, query, key, value, attention_mask, *, cu_seq_lens_q=None, cu_seq_lens_k=None, **more):
    """transformers' attention function: query [batch, heads, query length, dim], key and value
    [batch, kv heads, key length, dim]; returns out [batch, query length, heads, value dim], and None for the weights."""
    options, sink_logits = _understood(module, query, attention_mask, globals()["attention_mask"], **more)
    value = _of_one_type(query, value)
    layer = getattr(key, "cca_layer", None)
    if layer is not None:
        if cu_seq_lens_q is not None:
            _refuse("cu_seq_lens_q", "offsets beside a cache", "None")
        out = layer.attend(query, key, value, attention_mask, sink_logits, options)
    else:
        _require_queries(query, key, options)
        ranges = _ranges(query, key, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
        out = attention(query, key, value, sink_logits=sink_logits, **ranges, **options)
    return out.transpose(1, 2), None


def _require_queries(query, key, options):
    if options.get("group_size", 0) > 1 and query.shape[2] < key.shape[2] and options.get("pool") not in ("mean", "max"):
        _refuse("cache", "one that keeps keys and no cores", "cca.hf.Cache(model.config) where groups are pooled")


def _ranges(query, key, ids, cu_seq_lens_q, cu_seq_lens_k):
    """Sequences of their own lengths, as arguments of `cca.attention`."""
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1 or ids is not None:
            _refuse("cu_seq_lens_q", "offsets beside a mask or a batch", "a batch of 1, and no mask")
        return {"query_offsets": cu_seq_lens_q, "key_offsets": cu_seq_lens_k if cu_seq_lens_k is not None else cu_seq_lens_q}
    if ids is None:
        return {}
    rows = _sequences(ids)
    queries, keys = query.shape[2], key.shape[2]
    if ids.shape != (key.shape[0], keys):
        _refuse("attention_mask", list(ids.shape), f"[{key.shape[0]}, {keys}]")
    if all(len(row) <= 1 for row in rows):
        if all(row == [(0, keys)] for row in rows):
            return {}
        begins, ends = zip(*(row[0] if row else (0, 0) for row in rows))
        first = getattr(ids, "cca_end", keys) - queries  # the key of query 0
        query_begins = [max(begin - first, 0) for begin in begins]
        return {
            "key_begins": list(begins),
            "key_lengths": [end - begin for begin, end in zip(begins, ends)],
            "query_begins": query_begins,
            "query_lengths": [max(end - first - begin, 0) for begin, end in zip(query_begins, ends)],
        }
    if len(rows) != 1 or queries != keys:
        _refuse("attention_mask", "packed sequences in a batch or beside a cache", "a batch of 1 without one")
    offsets = sorted({0, keys, *(edge for sequence in rows[0] for edge in sequence)})  # padding is answered and not used
    return {"query_offsets": offsets, "key_offsets": offsets}


# The cache.


class CacheLayer(transformers.cache_utils.CacheLayerMixin):
    """One layer of `Cache`: a `cca.KvCache`, made when the first tokens come. `update` keeps nothing: it hands the new keys
    and values to cca's attention, which appends and answers in one step."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, rewind=0):
        super().__init__()
        self.rewind = rewind
        self.rows = []  # of the batch: (cache, its sequence)
        self.options = None
        self.seen = 0  # tokens, padding among them
        self.waits = False  # for attention, since `update`

    @property
    def batch_size(self):
        if not self.rows:
            raise AttributeError("batch_size")
        return len(self.rows)

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *_, **__):
        self._require_answered()
        self.waits = True
        self.seen += key_states.shape[2]
        key_states = key_states.view_as(key_states)
        key_states.cca_layer = self
        return key_states, value_states

    def _require_answered(self):
        if self.waits:
            raise RuntimeError("cca: cache: its last tokens went to another attention than cca's, and are not in it")

    def _make(self, query, key, value, options):
        batch, heads, _, dim = query.shape
        settings = {name: x for name, x in options.items() if name != "first_position"}
        cache = KvCache(
            batch=batch, heads=heads, kv_heads=key.shape[1], dim=dim, value_dim=value.shape[3], rewind=self.rewind,
            dtype=query.dtype, **settings,
        )  # fmt: skip
        self.rows = [(cache, b) for b in range(batch)]
        self.options = options
        self.is_initialized = True

    def attend(self, query, key, value, ids, sink_logits, options):
        """Appends new tokens and answers their queries; `ids` is the mask over all tokens so far."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            _refuse("cache", "tensors that require gradients", "torch.no_grad(): a cache has none")
        if not self.rows:
            self._make(query, key, value, options)
        if options != self.options:
            _refuse("cache", f"the options {options}", f"those it was made with, {self.options}")
        if len(self.rows) != query.shape[0]:
            _refuse("query", f"a batch of {query.shape[0]}", f"the cache's, {len(self.rows)}")
        count = query.shape[2]
        new = self._new_tokens(ids, count)
        query, key, value = (x.detach() for x in (query, key, value))
        if all(n == count for n in new) and self._whole():
            out = self._attend_all(query, key, value, sink_logits)
        else:
            out = query.new_zeros(query.shape[0], count, query.shape[1], value.shape[3]).transpose(1, 2)
            for b, ((cache, sequence), n) in enumerate(zip(self.rows, new)):
                if n > 0:
                    part = (x[b : b + 1, :, count - n :] for x in (query, key, value))
                    to = out[b : b + 1, :, count - n :]
                    cache.attend(*part, sequence=sequence, out=to, sink_logits=sink_logits)
        self.waits = False
        return out

    def _new_tokens(self, ids, count):
        """How many of `count` new tokens each row has; the others are padding before its first one."""
        if ids is None:
            begins = [0] * len(self.rows)
        else:
            begins = []
            if ids.shape != (len(self.rows), self.seen):
                _refuse("attention_mask", list(ids.shape), f"[{len(self.rows)}, {self.seen}]: all tokens of the cache")
            for row in _sequences(ids):
                if len(row) > 1 or (row and row[0][1] != self.seen):
                    _refuse("attention_mask", "tokens with padding behind them", "padding before them, beside a cache")
                begins.append(row[0][0] if row else self.seen)
        new = [min(count, self.seen - begin) for begin in begins]
        for (cache, sequence), begin, n in zip(self.rows, begins, new):
            if cache.length(sequence) + n != self.seen - begin:
                _refuse("cache", f"{cache.length(sequence)} tokens", f"{self.seen - begin - n}, which the mask says")
        return new

    def _whole(self):
        """Whether the rows are all sequences of one cache, in whatever order."""
        cache = self.rows[0][0]
        return len(self.rows) == cache.shape.batch and all(c is cache for c, _ in self.rows)

    def _attend_all(self, query, key, value, sink_logits):
        order = [sequence for _, sequence in self.rows]
        cache = self.rows[0][0]
        if order == list(range(len(order))):
            return cache.attend(query, key, value, sink_logits=sink_logits)
        rows = torch.tensor(order).argsort()
        out = cache.attend(query[rows], key[rows], value[rows], sink_logits=sink_logits)
        return out[torch.tensor(order)]

    def get_mask_sizes(self, query_length):
        self._require_answered()
        query_length = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.seen + query_length, 0

    def get_seq_length(self, *_):
        return self.seen

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length  # of older releases

    def reset(self):
        for cache, sequence in self.rows:
            cache.reset(sequence)
        self.rows, self.options, self.seen, self.waits, self.is_initialized = [], None, 0, False, False

    def crop(self, tokens_to_remove):
        """Takes back the last -tokens_to_remove tokens (a positive number is the length that stays, as it once was)."""
        self._require_answered()
        count = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count <= 0:
            return
        lengths = [cache.length(sequence) - count for cache, sequence in self.rows]
        for (cache, sequence), length in zip(self.rows, lengths):
            if length < cache.least_length(sequence):
                _refuse("crop", f"{count} tokens", f"at most {self.rewind}: cca.hf.Cache(config, rewind=..)")
        for (cache, sequence), length in zip(self.rows, lengths):
            cache.truncate(sequence, length)
        self.seen -= count

    def activate_past_recording(self):
        """`rewind` says how many tokens can be taken back."""

    def _select(self, sources):
        """Makes row i what row sources[i] is."""
        self._require_answered()
        if not self.rows:
            return
        rows, free = [], []
        taken = {(id(c), s) for c, s in (self.rows[i] for i in sources)}
        for cache in {id(c): c for c, _ in self.rows}.values():
            free += [(cache, s) for s in range(cache.shape.batch) if (id(cache), s) not in taken]
        used = set()
        for i in sources:
            cache, sequence = self.rows[i]
            if (id(cache), sequence) in used:
                place = next((x for x in free if x[0] is cache), None)
                if place is None:
                    copied = copy.deepcopy(cache)
                    place = (copied, sequence)
                    free += [(copied, s) for s in range(cache.shape.batch) if s != sequence]
                else:
                    free.remove(place)
                    cache.fork(sequence, place[1])
                rows.append(place)
            else:
                used.add((id(cache), sequence))
                rows.append((cache, sequence))
        self.rows = rows

    def reorder_cache(self, beam_idx):
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats):
        self._select([b for b in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices):
        indices = torch.as_tensor(indices)
        self._select((torch.nonzero(indices).flatten() if indices.dtype == torch.bool else indices).tolist())


class Cache(transformers.cache_utils.Cache):
    """A cache of transformers that keeps what cca's attention can still see: cores, sink tokens and the window, or the
    window alone, or everything in layers that see everything.

    config: the model's. rewind: how many tokens assisted decoding takes back at most.
    """

    def __init__(self, config, rewind: int = 32):
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[CacheLayer(rewind) for _ in range(layers)])

    def update(self, key_states, value_states, layer_idx, *more, **named):
        if layer_idx >= len(self.layers):
            _refuse("cache", f"one of {len(self.layers)} layers", "one that was made with this model's config")
        return super().update(key_states, value_states, layer_idx, *more, **named)
