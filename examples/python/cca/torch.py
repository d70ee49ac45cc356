"""cca's functions as operators of PyTorch: torch.ops.cca.attention and attend, which autograd and torch.compile follow.
cca.attention and cca.attend call them where a gradient is wanted or a graph is compiled; else they call the library at once.

What an operator makes has [batch, length, heads, dim] in memory, whatever the strides of its operands, and zeros where
sequences are padded. Gradients have the elements of their operands. There are no second derivatives and no vmap: both are
refused.
"""

import functools

import torch

from . import Gradients, _library

_INPUTS = "Tensor query, Tensor key, Tensor value"
_TERMS = "Tensor? sink_logits, Tensor? alibi_slopes, Tensor? key_bias"
_FAR = (
    "Tensor far_key, Tensor far_value, Tensor? seen, Tensor? far_bias, Tensor? far_positions, Tensor? visible_from, "
    "Tensor? visible_until, Tensor? selected_blocks"
)
_SCALES = "Tensor? key_scales, Tensor? value_scales"
_FAR_SCALES = "Tensor? far_key_scales, Tensor? far_value_scales"
_RANGES = (
    "Tensor? query_lengths, Tensor? query_begins, Tensor? query_offsets, "
    "Tensor? key_lengths, Tensor? key_begins, Tensor? key_offsets"
)
_FAR_RANGES = "Tensor? far_lengths, Tensor? far_begins, Tensor? far_offsets"
_OPTIONS = (
    "int group_size=0, int? window=None, int sink_tokens=0, int lookahead=0, int prefix=0, str pool='last_query', "
    "str core_heads='per_query_head', str core_bias='none', float? softmax_scale=None, float pooling_scale=1.0, "
    "float softcap=0.0, int? first_position=None, str unit='none'"
)

library = torch.library.Library("cca", "DEF")


def empty(like, extents, number=False, zero=False, dtype=None):
    """A tensor for results: [batch, length, heads, dim] in memory where it has four extents. dtype: by name."""
    dtype = like.dtype if dtype is None else getattr(torch, dtype)
    if number and dtype != torch.float64:
        dtype = torch.float32
    if len(extents) == 4:
        b, h, n, d = extents
        made = torch.empty_strided(extents, (n * h * d, d, h * d, 1), dtype=dtype, device=like.device)
    else:
        made = torch.empty(extents, dtype=dtype, device=like.device)
    return made.zero_() if zero else made


# Who follows a call but the caller: nobody, autograd alone, or also others, who see nothing but operators.
AUTOGRAD, OTHERS = 1, 2


def who_follows(tensors):
    """0, AUTOGRAD or OTHERS"""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return OTHERS
    followed = 0
    for x in tensors:
        if type(x) is not torch.Tensor and isinstance(x, torch.Tensor) and type(x) is not torch.nn.Parameter:
            return OTHERS  # a fake one, say
        if not followed and isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            followed = AUTOGRAD
    return followed


_SYMBOLS = (torch.SymInt, torch.SymFloat)


class _Call:
    """A call of an operator: the names of the tensors that are given, and the options."""

    def __init__(self, operator, names, options):
        self.operator, self.names, self.options = operator, names, options
        self.padded = _library.has_padding(names)
        self.plan = None
        self.gradient_plans = {}

    def results(self, query, value):
        """out and lse, not yet written."""
        try:
            b, h, n, _ = query.shape
            d = value.shape[3]
        except (IndexError, ValueError):
            name, x = ("query", query) if query.ndim != 4 else ("value", value)
            raise ValueError(f"cca: {name}: got {x.ndim} dimensions, wants 4") from None
        dtype, device = query.dtype, query.device
        # As `empty` makes them, without the calls: they are what a small attention costs.
        out = torch.empty_strided((b, h, n, d), (n * h * d, d, h * d, 1), dtype=dtype, device=device)
        if dtype != torch.float64:
            dtype = torch.float32
        lse = torch.empty_strided((b, h, n), (h * n, n, 1), dtype=dtype, device=device)
        return (out.zero_(), lse.zero_()) if self.padded else (out, lse)

    def run(self, tensors, threads):
        """out and lse"""
        query, key, value = tensors[:3]
        results = self.results(query, value)
        if self.plan is None:
            self.plan = _library.plan_of(self.operator.function, self.names, ("out", "lse"), self.options)
        self.plan(tensors + results, _library.threads_of(threads, query.numel() * key.shape[2] if key.ndim > 2 else 0))
        return results

    def run_gradient(self, tensors, results, grad_out, grad_lse, wanted, threads):
        """The gradients of the tensors that `wanted` has a True for, None for the others."""
        if grad_out.stride(-1) != 1:  # of a sum, say: one number for all
            grad_out = grad_out.contiguous()
        read = (*tensors, *results, grad_out) if grad_lse is None else (*tensors, *results, grad_out, grad_lse)
        places, plan = self._gradient_plan(tuple(wanted), grad_lse is not None)
        written = [empty(tensors[i], tuple(tensors[i].shape), number=True, zero=self.padded) for i in places]
        query, key = tensors[:2]
        plan((*read, *written), _library.threads_of(threads, query.numel() * key.shape[2]))
        answer = [None] * len(tensors)
        for i, gradient in zip(places, written):
            if wanted[i]:
                dtype = tensors[i].dtype
                answer[i] = gradient if gradient.dtype == dtype else gradient.to(dtype)
        return answer

    def _gradient_plan(self, wanted, has_grad_lse):
        """(the places of the tensors whose gradients are written, the plan)"""
        made = self.gradient_plans.get((wanted, has_grad_lse))
        if made is None:
            names = self.names
            always = ("query", "key", "value", "far_key", "far_value")
            places = [i for i, name in enumerate(names) if name in always or wanted[i]]
            read = (*names, "out", "lse", "grad_out", *(("grad_lse",) if has_grad_lse else ()))
            written = tuple("grad_" + names[i] for i in places)
            plan = _library.plan_of(self.operator.gradient_function, read, written, self.options)
            made = self.gradient_plans[wanted, has_grad_lse] = places, plan
        return made

    def in_order(self, values):
        """Values per tensor that is given, in the places of the operator's arguments."""
        given = dict(zip(self.names, values))
        return [given.get(name) for name in self.operator.tensors]


class _Operator:
    """An operator of attention and that of its gradient.

    tensors: the schema of its operands. counts: that of its numbers that are no options."""

    def __init__(self, name, tensors, counts, function, gradient_function):
        self.name = name
        self.tensors = [part.split()[-1] for part in tensors.split(", ")]
        self.function, self.gradient_function = function, gradient_function
        self.differentiable = [x for x in self.tensors if x in Gradients._fields]
        options = f"{_OPTIONS}{counts}, int? threads=None"
        library.define(f"{name}({tensors}, {options}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
        library.define(
            f"{name}_gradient({tensors}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
            f"bool[{len(self.differentiable)}] wanted, {options}) -> Tensor[]",
            tags=torch.Tag.pt2_compliant_tag,
        )
        self.op = getattr(torch.ops.cca, name).default
        self.gradient_op = getattr(torch.ops.cca, name + "_gradient").default
        self.options = {x.name: x.default_value for x in self.op._schema.arguments[len(self.tensors) :]}
        self.call_of = functools.lru_cache(256)(lambda names, options: _Call(self, names, dict(options)))
        library.impl(name, self._run, "CompositeExplicitAutograd")
        library.impl(name + "_gradient", self._run_gradient, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cca::{name}", self._fake_run, lib=library)
        torch.library.register_fake(f"cca::{name}_gradient", self._fake_gradient, lib=library)
        self._register_autograd()
        for op in (name, name + "_gradient"):
            library.impl(op, self._refuse_vmap, "FuncTorchBatched")

    def __call__(self, followed, operands, options, threads, return_lse):
        """Calls the operator: operands are its tensors by their names."""
        if followed == AUTOGRAD:
            call = self.call_of(tuple(operands), tuple(_library.plain(options).items()))
            return self.apply(
                call, threads, return_lse, True, *operands.values()
            )  # the operator's own, at a third of its cost
        for name in options:
            if name not in self.options:
                raise _library.unknown_option(name, self.options)
        results = self.op(*(operands.get(name) for name in self.tensors), **options, threads=threads)
        return results if return_lse else results[0]

    def _call(self, arguments, options):
        """(call, its tensors, threads) of the operator's arguments."""
        settings = self.options | dict(zip(self.options, arguments[len(self.tensors) :])) | options
        threads = settings.pop("threads")
        given = {name: x for name, x in zip(self.tensors, arguments) if x is not None}
        names, tensors = tuple(given), tuple(given.values())
        if any(isinstance(x, _SYMBOLS) for x in settings.values()):  # of a graph, not yet known
            return _Call(self, names, settings), tensors, threads
        return self.call_of(names, tuple(settings.items())), tensors, threads

    def _gradient_call(self, arguments, options):
        """The same of the gradient's, and (out, lse, grad_out, grad_lse, wanted)."""
        count = len(self.tensors)
        return self._call([*arguments[:count], *arguments[count + 5 :]], options), arguments[count : count + 5]

    def _run(self, *arguments, **options):
        call, tensors, threads = self._call(arguments, options)
        return call.run(tensors, threads)

    def _fake_run(self, *arguments, **options):
        call, tensors, _ = self._call(arguments, options)
        return call.results(tensors[0], tensors[2])

    def _run_gradient(self, *arguments, **options):
        (call, tensors, threads), (out, lse, grad_out, grad_lse, wanted) = self._gradient_call(arguments, options)
        wanted = dict(zip(self.differentiable, wanted))
        wanted = [wanted.get(name, False) for name in call.names]
        gradients = call.run_gradient(tensors, (out, lse), grad_out, grad_lse, wanted, threads)
        return [x for x in gradients if x is not None]

    def _fake_gradient(self, *arguments, **options):
        (call, tensors, _), (*_, wanted) = self._gradient_call(arguments, options)
        given = dict(zip(call.names, tensors))
        names = [name for name, want in zip(self.differentiable, wanted) if want and name in given]
        return [empty(given[name], tuple(given[name].shape)) for name in names]

    def _register_autograd(self):
        operator = self

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, call, threads, return_lse, directly, *tensors):
                for name in call.names:
                    if name.endswith("_scales"):
                        raise ValueError(f"cca: {name}: got a tensor, wants none where gradients are wanted: int8 has none")
                if directly:
                    results = call.run(tensors, threads)
                else:
                    with torch._C._AutoDispatchBelowAutograd():
                        results = operator.op(*call.in_order(tensors), **call.options, threads=threads)
                ctx.save_for_backward(*tensors, *results)
                ctx.call, ctx.threads = call, threads
                ctx.set_materialize_grads(False)
                return results if return_lse else results[0]

            @staticmethod
            def backward(ctx, grad_out, grad_lse=None):
                call, threads, wanted = ctx.call, ctx.threads, ctx.needs_input_grad[4:]
                *tensors, out, lse = ctx.saved_tensors
                if grad_out is None and grad_lse is None:
                    return (None,) * (4 + len(tensors))
                if grad_out is None:
                    grad_out = torch.zeros_like(out)
                if not torch.is_grad_enabled() and who_follows((*tensors, grad_out, grad_lse)) != OTHERS:
                    results = call.run_gradient(tensors, (out, lse), grad_out, grad_lse, wanted, threads)
                    return None, None, None, None, *results
                flags = dict(zip(call.names, wanted))
                gradients = operator.gradient_op(
                    *call.in_order(tensors), out, lse, grad_out, grad_lse,
                    [flags.get(name, False) for name in operator.differentiable], **call.options, threads=threads,
                )  # fmt: skip
                by_name = iter(gradients)
                found = {name: next(by_name) for name in operator.differentiable if flags.get(name)}
                return None, None, None, None, *(found.get(name) for name in call.names)

        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    return tuple(operator.gradient_op(*arguments))

            @staticmethod
            def backward(ctx, *gradients):
                raise NotImplementedError(f"cca: {operator.name}: it has no second derivatives")

        def follow(*arguments, **options):
            if _requires_grad(arguments):
                call, tensors, threads = operator._call(arguments, options)
                return Call.apply(call, threads, True, who_follows(tensors) != OTHERS, *tensors)
            with torch._C._AutoDispatchBelowAutograd():
                return operator.op(*arguments, **options)

        def follow_once(*arguments, **options):
            rest = operator.gradient_op._schema.arguments[len(arguments) :]
            if _requires_grad(arguments):
                return list(Once.apply(*arguments, *(options.get(x.name, x.default_value) for x in rest)))
            with torch._C._AutoDispatchBelowAutograd():
                return operator.gradient_op(*arguments, **options)

        self.apply = super(torch.autograd.Function, Call).apply  # without the look for functorch, which is not there
        library.impl(self.name, follow, "Autograd")
        library.impl(self.name + "_gradient", follow_once, "Autograd")

    def _refuse_vmap(self, *_, **__):
        raise NotImplementedError(f"cca: {self.name}: torch.func.vmap is not supported, give it a batch")


def _requires_grad(arguments):
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


OPERATORS = {
    "attention": _Operator(
        "attention",
        f"{_INPUTS}, {_TERMS}, {_RANGES}, {_SCALES}",
        "",
        "cca_attention",
        "cca_attention_gradient",
    ),
    "attend": _Operator(
        "attend",
        f"{_INPUTS}, {_FAR}, {_TERMS}, {_RANGES}, {_FAR_RANGES}, {_SCALES}, {_FAR_SCALES}",
        ", int block_rows=1, int block_queries=1",
        "cca_attend",
        "cca_attend_gradient",
    ),
}
