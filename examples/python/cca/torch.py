"""cca's functions as operators of PyTorch: torch.ops.cca.attention, attend and pool, which autograd and torch.compile follow.
cca.attention and cca.attend call them where a gradient is wanted or a graph is compiled; else they call the library at once.

What an operator makes has [batch, length, heads, dim] in memory, whatever the strides of its operands, and zeros where
sequences are padded. Gradients have the elements of their operands. There are no second derivatives and no vmap: both are
refused.
"""

import torch

from . import _library
from . import Gradients as _Gradients

_INPUTS = "Tensor query, Tensor key, Tensor value"
_TERMS = "Tensor? sink_logits, Tensor? alibi_slopes, Tensor? key_bias"
_FAR = "Tensor far_key, Tensor far_value, Tensor seen, Tensor? far_bias, Tensor? far_positions"
_RANGES = (
    "Tensor? query_lengths, Tensor? query_begins, Tensor? query_offsets, "
    "Tensor? key_lengths, Tensor? key_begins, Tensor? key_offsets"
)
_FAR_RANGES = "Tensor? far_lengths, Tensor? far_begins, Tensor? far_offsets"
_OPTIONS = (
    "int group_size=0, int? window=None, int sink_tokens=0, int lookahead=0, int prefix=0, str pool='last_query', "
    "str core_heads='per_query_head', str core_bias='none', float? softmax_scale=None, float pooling_scale=1.0, "
    "float softcap=0.0, int? first_position=None, str unit='none', int? threads=None"
)
_OPTION_NAMES = [part.split("=")[0].split()[-1] for part in _OPTIONS.split(", ")]
_OPTION_DEFAULTS = {
    "window": None, "softmax_scale": None, "first_position": None, "threads": None, "pool": "last_query",
    "core_heads": "per_query_head", "core_bias": "none", "pooling_scale": 1.0, "softcap": 0.0, "unit": "none",
}  # fmt: skip

library = torch.library.Library("cca", "DEF")


def empty(like, extents, number=False, zero=False):
    """A tensor for results: [batch, length, heads, dim] in memory where it has four extents."""
    dtype = like.dtype
    if number:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    make = torch.zeros if zero else torch.empty
    if len(extents) != 4:
        return make(extents, dtype=dtype, device=like.device)
    b, h, n, d = extents
    return make((b, n, h, d), dtype=dtype, device=like.device).transpose(1, 2)


class _Operator:
    """An operator of attention and that of its gradient.

    tensors: the schema of its operands. differentiable: those of them that have gradients."""

    def __init__(self, name, tensors, function, gradient_function, differentiable):
        self.name = name
        self.tensors = [part.split()[-1] for part in tensors.split(", ")]
        self.function, self.gradient_function = function, gradient_function
        self.differentiable = [x for x in self.tensors if x in differentiable]
        gradient_tensors = f"{tensors}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse"
        library.define(f"{name}({tensors}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
        library.define(
            f"{name}_gradient({gradient_tensors}, bool[{len(self.differentiable)}] wanted, {_OPTIONS}) -> Tensor[]",
            tags=torch.Tag.pt2_compliant_tag,
        )
        self.op = getattr(torch.ops.cca, name).default
        self.gradient_op = getattr(torch.ops.cca, name + "_gradient").default
        library.impl(name, self.run, "CompositeExplicitAutograd")
        library.impl(name + "_gradient", self.run_gradient, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cca::{name}", self.results, lib=library)
        torch.library.register_fake(f"cca::{name}_gradient", self.gradients, lib=library)
        self._register_autograd()
        for op in (name, name + "_gradient"):
            library.impl(op, self.refuse_vmap, "FuncTorchBatched")

    def __call__(self, *tensors_options_threads):
        *tensors, options, threads = tensors_options_threads
        if not _is_eager(tensors):
            return self.op(*tensors, **options, threads=threads)
        _library.options_of(tuple(options.items()))  # refuses what is unknown
        values = (options.get(name, _OPTION_DEFAULTS.get(name, 0)) for name in _OPTION_NAMES[:-1])
        return self.function_of_autograd.apply(*tensors, *values, threads)  # the operator's own, at half of its cost

    def named(self, arguments, names):
        """(tensors by name, options, threads) of an operator's positional arguments and defaults."""
        read = dict(zip(names, arguments))
        values = arguments[len(names) :]
        options = {name: _OPTION_DEFAULTS.get(name, 0) for name in _OPTION_NAMES} | dict(zip(_OPTION_NAMES, values))
        return read, options, options.pop("threads")

    def results(self, *arguments, **options):
        """out and lse, not yet written."""
        read = dict(zip(self.tensors, arguments))
        query, value = read["query"], read["value"]
        ranged = any(read.get(x) is not None for x in ("query_lengths", "query_offsets"))
        extents = (query.shape[0], query.shape[1], query.shape[2], value.shape[3])
        return empty(query, extents, zero=ranged), empty(query, extents[:3], number=True, zero=ranged)

    def run(self, *arguments, **options):
        from . import _threads

        read, settings, threads = self.named(arguments, self.tensors)
        settings |= options
        threads = settings.pop("threads", threads)
        _require(read)
        out, lse = self.results(*arguments)
        threads = _threads(threads, read["query"], read["key"])
        _library.run(self.function, read, {"out": out, "lse": lse}, settings, threads)
        return out, lse

    def gradients(self, *arguments, **options):
        """Those that are wanted, not yet written, of the elements of the operands."""
        return [empty(x, tuple(x.shape)) for x in self._wanted(arguments).values()]

    def _wanted(self, arguments):
        read = dict(zip(self.tensors, arguments))
        wanted = arguments[len(self.tensors) + 4]
        return {x: read[x] for x, w in zip(self.differentiable, wanted) if w and read[x] is not None}

    def run_gradient(self, *arguments, **options):
        from . import _threads

        names = [*self.tensors, "out", "lse", "grad_out", "grad_lse", "wanted"]
        read, settings, threads = self.named(arguments, names)
        settings |= options
        threads = settings.pop("threads", threads)
        del read["wanted"]
        if read["grad_out"].stride(-1) != 1:  # of a sum, say: one number for all
            read["grad_out"] = read["grad_out"].contiguous()
        _require(read)
        ranged = any(read.get(x) is not None for x in read if x.endswith(("_lengths", "_offsets")))
        wanted = self._wanted(arguments)
        always = {x: read[x] for x in self.differentiable if x in ("query", "key", "value", "far_key", "far_value")}
        written = {x: empty(of, tuple(of.shape), number=True, zero=ranged) for x, of in (always | wanted).items()}
        threads = _threads(threads, read["query"], read["key"])
        _library.run(
            self.gradient_function, read, {"grad_" + x: to for x, to in written.items()}, settings, threads
        )
        return [written[x].to(of.dtype) for x, of in wanted.items()]

    def _register_autograd(self):
        operator = self

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                count = len(operator.tensors)
                if _is_eager(arguments[:count]):
                    results = operator.run(*arguments)
                else:
                    with torch._C._AutoDispatchBelowAutograd():
                        results = operator.op(*arguments)
                ctx.save_for_backward(*arguments[:count], *results)
                ctx.options = arguments[count:]
                ctx.set_materialize_grads(False)
                return results

            @staticmethod
            def backward(ctx, grad_out, grad_lse):
                count = len(operator.tensors)
                saved = ctx.saved_tensors
                needed = dict(zip(operator.tensors, ctx.needs_input_grad))
                wanted = [needed[x] for x in operator.differentiable]
                answer = [None] * (count + len(ctx.options))
                if grad_out is None and grad_lse is None:
                    return tuple(answer)
                if grad_out is None:
                    grad_out = torch.zeros_like(saved[count])
                gradients = iter(operator.gradient_op(*saved, grad_out, grad_lse, wanted, *ctx.options))
                for name, want in zip(operator.differentiable, wanted):
                    place = operator.tensors.index(name)
                    if want and saved[place] is not None:
                        answer[place] = next(gradients)
                return tuple(answer)

        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    return tuple(operator.gradient_op(*arguments))

            @staticmethod
            def backward(ctx, *gradients):
                raise NotImplementedError(f"cca: {operator.name}: it has no second derivatives")

        def follow(op, function):
            def impl(*arguments, **options):
                arguments = [*arguments, *operator._missing(arguments, options, op)]
                if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
                    return function.apply(*arguments)
                with torch._C._AutoDispatchBelowAutograd():
                    return op(*arguments)

            return impl

        self.function_of_autograd = Call
        library.impl(self.name, follow(self.op, Call), "Autograd")
        once = follow(self.gradient_op, Once)
        library.impl(self.name + "_gradient", lambda *a, **o: list(once(*a, **o)), "Autograd")

    @staticmethod
    def _missing(arguments, options, op):
        """What was not given by its place: by its name, or its default."""
        rest = op._schema.arguments[len(arguments) :]
        return [options.get(x.name, x.default_value) for x in rest]

    def refuse_vmap(self, *_, **__):
        raise NotImplementedError(f"cca: {self.name}: torch.func.vmap is not supported, give it a batch")


def _is_eager(tensors):
    """Whether nobody follows these tensors but autograd."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(x is None or type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def _require(read):
    for name, x in read.items():
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"cca: {name}: got a tensor on {x.device}, wants one on the cpu")


_differentiable = _Gradients._fields
attention = _Operator(
    "attention",
    f"{_INPUTS}, {_TERMS}, {_RANGES}",
    _library.library.cca_attention,
    _library.library.cca_attention_gradient,
    _differentiable,
)
attend = _Operator(
    "attend",
    f"{_INPUTS}, {_FAR}, {_TERMS}, {_RANGES}, {_FAR_RANGES}",
    _library.library.cca_attend,
    _library.library.cca_attend_gradient,
    _differentiable,
)
