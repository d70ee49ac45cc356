"""libcca by ctypes: the structures of cca/dispatch/cca.h, and tensors as it takes them. ctypes releases the interpreter's
lock while a function of the library runs."""

import ctypes
import functools
import numbers
import operator
import os
import pathlib
import sys

# The type codes of DLPack.
INT, FLOAT, BFLOAT = 0, 2, 4
READ_ONLY = 1


class DataType(ctypes.Structure):
    """DLDataType"""

    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    """DLTensor"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class VersionedTensor(ctypes.Structure):
    """DLManagedTensorVersioned"""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


class ExchangeApi(ctypes.Structure):
    """DLPackExchangeAPI, as far as it is used."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
    ]


class Options(ctypes.Structure):
    """cca_options"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("group_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("sink_tokens", ctypes.c_int64),
        ("lookahead", ctypes.c_int64),
        ("prefix", ctypes.c_int64),
        ("pool", ctypes.c_int32),
        ("core_heads", ctypes.c_int32),
        ("core_bias", ctypes.c_int32),
        ("unit", ctypes.c_int32),
        ("softmax_scale", ctypes.POINTER(ctypes.c_double)),
        ("pooling_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("first_position", ctypes.POINTER(ctypes.c_int64)),
    ]


_TENSORS = (
    "query key value sink_logits alibi_slopes key_bias query_lengths query_begins query_offsets key_lengths key_begins "
    "key_offsets far_lengths far_begins far_offsets far_key far_value seen far_bias far_positions out lse out_a lse_a "
    "out_b lse_b core_key core_value grad_out grad_lse grad_core_key grad_core_value grad_query grad_key grad_value "
    "grad_far_key grad_far_value grad_sink_logits grad_alibi_slopes grad_key_bias grad_far_bias"
).split()


class Call(ctypes.Structure):
    """cca_call"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("options", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
        ("parallel_for_self", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("visible_from", ctypes.c_void_p),
        ("visible_until", ctypes.c_void_p),
        ("selected_blocks", ctypes.c_void_p),
        ("block_rows", ctypes.c_int64),
        ("block_queries", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales", "far_key_scales", "far_value_scales")),
    ]


class CacheShape(ctypes.Structure):
    """cca_cache_shape"""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "dim", "value_dim", "capacity", "rewind")),
    ]


class CacheCounts(ctypes.Structure):
    """cca_cache_counts"""

    _fields_ = [(name, ctypes.c_int64) for name in ("length", "cores", "raw", "least_length")]


WRITE = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
READ = WRITE

# CCA_LIBRARY is for tests of a library that was built elsewhere.
library = ctypes.CDLL(os.environ.get("CCA_LIBRARY") or str(pathlib.Path(__file__).parent / "libcca.so"))
library.cca_error.restype = library.cca_version.restype = library.cca_architecture.restype = ctypes.c_char_p
library.cca_cache_make.argtypes = [ctypes.c_void_p, ctypes.c_void_p, DataType, ctypes.c_void_p]
library.cca_cache_free.argtypes = [ctypes.c_void_p]
library.cca_cache_free.restype = None
library.cca_cache_truncate.argtypes = library.cca_cache_fork.argtypes = [
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
]
library.cca_cache_reset.argtypes = [ctypes.c_void_p, ctypes.c_int64]
library.cca_cache_get_shape.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
library.cca_cache_get_counts.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
library.cca_cache_get_bytes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
library.cca_cache_save.argtypes = [ctypes.c_void_p, WRITE, ctypes.c_void_p]
library.cca_quantize.argtypes = [ctypes.c_void_p] * 3
library.cca_cache_load.argtypes = [ctypes.c_void_p, DataType, ctypes.c_int32, READ, ctypes.c_void_p]


def check(status, error=library.cca_error):
    """Raises what a status of the library means."""
    if status == 0:
        return
    raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(error().decode())


def declare(function, *before):
    """A function of a call, with the types of the arguments before it."""
    function.argtypes = [*before, ctypes.c_void_p]
    return function, check


FUNCTIONS = {
    name: declare(getattr(library, name))
    for name in (
        "cca_attention cca_attend cca_pool cca_merge cca_attention_gradient cca_attend_gradient cca_pool_gradient"
    ).split()
}
"""By its name, what takes a call, and what checks its status."""
for _name in ("cca_cache_attend", "cca_cache_append"):
    FUNCTIONS[_name] = declare(getattr(library, _name), ctypes.c_void_p, ctypes.c_int64)


ENUMS = {
    "pool": ("last_query", "mean", "max", "select", "select_by_mass"),
    "core_heads": ("per_query_head", "per_kv_head"),
    "core_bias": ("none", "entropy"),
    "unit": ("none", "best", "avx512_bf16", "amx", "vnni"),
}
UNLIMITED = 2**63 - 1
OPTIONS = [name for name, _ in Options._fields_[1:]]
COUNTS = ("block_rows", "block_queries")
"""Numbers of a call that are no options."""


def _kind_refusal(name, value, wanted):
    got = repr(value) if isinstance(value, (int, float, str)) or value is None else f"a {type(value).__name__}"
    return TypeError(f"cca: {name}: got {got}, wants {wanted}")


def int64(name, value):
    """ctypes would cut off what does not fit."""
    try:
        value = operator.index(value)
    except TypeError:
        raise _kind_refusal(name, value, "an integer") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"cca: {name}: got {value}, wants a number of 64 bits")
    return value


_USUAL = dict.fromkeys([*OPTIONS, *COUNTS], int) | dict.fromkeys(ENUMS, str)
_USUAL |= dict.fromkeys(("softmax_scale", "pooling_scale", "softcap"), float)
"""What type an option or a count is, as a rule."""


_KINDS = {int: (numbers.Integral, "an integer"), float: (numbers.Real, "a number"), str: (str, "a word")}


def _plain(name, value):
    usual = _USUAL.get(name)
    if usual is None:
        raise unknown_option(name, OPTIONS)
    if value is None:
        return None
    where = name if name in COUNTS else "options." + name
    kind, wanted = _KINDS[usual]
    if not isinstance(value, kind):
        raise _kind_refusal(where, value, wanted)
    return operator.index(value) if usual is int else usual(value)


def unknown_option(name, known):
    return TypeError(f"cca: options: got {name}, wants one of {', '.join(known)}")


def plain(options):
    """Options and counts as plain numbers and words. What is made of them is remembered by their values, which those of an
    array or a tensor are not: it would be taken for what it once was."""
    for name, value in options.items():
        if type(value) is not _USUAL.get(name):
            return {name: _plain(name, value) for name, value in options.items()}
    return options


def options_of(given):
    """The structure for a dictionary of options."""
    options = Options(ctypes.sizeof(Options), window=UNLIMITED, pooling_scale=1.0)
    for name, value in plain(given).items():
        if name in COUNTS:
            raise unknown_option(name, OPTIONS)
        if name in ENUMS:
            if value not in ENUMS[name]:
                raise ValueError(f"cca: options.{name}: got {value}, wants one of {', '.join(ENUMS[name])}")
            value = ENUMS[name].index(value)
        elif value is None:
            if name not in ("softmax_scale", "first_position", "window"):
                raise ValueError(f"cca: options.{name}: got None, wants a number")
            if name != "window":
                continue
            value = UNLIMITED
        elif name == "softmax_scale":
            value = ctypes.pointer(ctypes.c_double(value))
        elif name == "first_position":
            value = ctypes.pointer(ctypes.c_int64(int64("options." + name, value)))
        elif _USUAL[name] is int:
            value = int64("options." + name, value)
        setattr(options, name, value)
    return options


# How a type of tensors is exported: its own fast way, or the protocol of DLPack. An exporter writes a DLTensor to an address
# and returns what has to live as long as it.

_TENSOR_SIZE = ctypes.sizeof(Tensor)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.argtypes, _capsule_name.restype = [ctypes.py_object], ctypes.c_char_p


def _by_protocol(x, name, written, to):
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 1))
        except TypeError:  # an older producer
            capsule = x.__dlpack__()
    except (BufferError, RuntimeError) as error:
        raise _refusal(x, name, error) from None
    kind = _capsule_name(capsule)
    address = _pointer(capsule, kind)
    if kind == b"dltensor_versioned":
        managed = VersionedTensor.from_address(address)
        if managed.major > 1:
            raise ValueError(f"cca: {name}: got version {managed.major} of DLPack, wants 0 or 1")
        if written and managed.flags & READ_ONLY:
            raise ValueError(f"cca: {name}: got a read-only tensor, wants one that can be written")
        address += VersionedTensor.tensor.offset
    ctypes.memmove(to, address, _TENSOR_SIZE)
    return capsule


_ARRAY_TYPES = {"float32": FLOAT, "float64": FLOAT, "float16": FLOAT, "bfloat16": BFLOAT, "int64": INT, "int8": INT}


def _by_array(x, name, written, to):
    """NumPy's, which exports no bfloat16 and, before 2.1, nothing that is read-only."""
    if not x.dtype.isnative:
        raise ValueError(f"cca: {name}: got {x.dtype.name} in the other byte order, wants the processor's")
    if written and not x.flags.writeable:
        raise ValueError(f"cca: {name}: got a read-only array, wants one that can be written")
    if x.flags.writeable and x.dtype.kind != "V":
        try:
            capsule = x.__dlpack__()  # the old kind, of which nothing has to be asked
        except (BufferError, RuntimeError) as error:
            raise _refusal(x, name, error) from None
        ctypes.memmove(to, _pointer(capsule, b"dltensor"), _TENSOR_SIZE)
        return capsule
    if x.dtype.name not in _ARRAY_TYPES or any(stride % x.itemsize for stride in x.strides):
        raise ValueError(
            f"cca: {name}: got {x.dtype.name} with strides {x.strides}, wants whole elements of a known type"
        )
    extents, count = ctypes.c_int64 * x.ndim, x.ndim
    shape, strides = extents(*x.shape), extents(*(stride // x.itemsize for stride in x.strides))
    dtype = DataType(_ARRAY_TYPES[x.dtype.name], 8 * x.itemsize, 1)
    tensor = Tensor(x.ctypes.data, 1, 0, count, dtype, shape, strides, 0)
    ctypes.memmove(to, ctypes.addressof(tensor), ctypes.sizeof(tensor))
    return tensor, x


_exchanges = {}
"""PyTorch's exporters by the types of tensors, where it has DLPack's interface for C: a tenth of the time."""


def _exchange_of(kind):
    """A function of a tensor and an address."""
    api = getattr(kind, "__dlpack_c_exchange_api__", None)
    if api is not None and hasattr(kind, "is_neg"):
        table = ExchangeApi.from_address(_pointer(api, b"dlpack_exchange_api"))
        if table.major == 1 and table.tensor_from_object:
            return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(table.tensor_from_object)
    return None


def _refusal(x, name, error):
    """Of a tensor that its library does not export."""
    if getattr(x, "is_sparse", False) or getattr(x, "is_quantized", False):
        return ValueError(f"cca: {name}: got a sparse or quantized tensor, wants a dense one")
    device = getattr(x, "device", "cpu")
    if getattr(device, "type", "cpu") != "cpu":
        return ValueError(f"cca: {name}: got a tensor on {device}, wants one on the cpu")
    return ValueError(f"cca: {name}: {str(error).splitlines()[0]}")


def _exporter_of(kind):
    if kind.__module__.startswith("numpy.ma"):
        return None  # its mask would be lost
    exchange = _exchange_of(kind)
    if exchange is not None:
        _exchanges[kind] = exchange
    if hasattr(kind, "is_neg"):
        return _by_torch
    if kind.__module__ == "numpy":
        return _by_array
    if hasattr(kind, "__dlpack__"):
        return _by_protocol
    return None


def _by_torch(x, name, written, to):
    if x.is_neg():
        raise ValueError(f"cca: {name}: got a negated tensor, wants one whose memory holds its numbers")
    exchange = _exchanges.get(type(x))
    if exchange is None:  # an older release, which exports nothing that requires gradients
        return _by_protocol(x.detach(), name, written, to)
    try:
        exchange(x, to)
    except (BufferError, RuntimeError) as error:
        raise _refusal(x, name, error) from None


_exporters = {}


def export(x, name, written, to):
    """Writes what the library sees of a tensor to the DLTensor at an address; returns what has to live as long as it."""
    kind = type(x)
    exporter = _exporters.get(kind)
    if exporter is None:
        exporter = _exporter_of(kind)
        if exporter is None:
            raise TypeError(
                f"cca: {name}: got {kind.__name__}, wants a tensor: NumPy's, PyTorch's, or any that has __dlpack__"
            )
        _exporters[kind] = exporter
    return exporter(x, name, written, to)


class Plan:
    """A function of the library with the names of the tensors and the options that it is called with. What they need in the
    library's form is made once, for as many calls as run at a time."""

    def __init__(self, function, read, written, options):
        self.function, self.check = FUNCTIONS[function]
        self.tensors = [*((name, False) for name in read), *((name, True) for name in written)]
        options = dict(options)
        self.counts = {name: int64(name, options.pop(name)) for name in COUNTS if name in options}
        self.options = options_of(options) if options else None
        self.free = []

    def _frame(self):
        """A structure of the call, its address, and the names and places of its tensors."""
        call, tensors = Call(ctypes.sizeof(Call)), (Tensor * len(self.tensors))()
        for (name, _), tensor in zip(self.tensors, tensors):
            setattr(call, name, ctypes.addressof(tensor))
        for name, count in self.counts.items():
            setattr(call, name, count)
        if self.options is not None:
            call.options = ctypes.addressof(self.options)
        places = [(*named, ctypes.addressof(tensor)) for named, tensor in zip(self.tensors, tensors)]
        return call, ctypes.addressof(call), places, tensors

    def __call__(self, tensors, threads, *before):
        """Calls the function. tensors: those that are read, then those that are written, in the order of the names.
        before: arguments of the function that come before the structure."""
        try:
            frame = self.free.pop()
        except IndexError:
            frame = self._frame()
        call, address, places, _ = frame
        call.threads = threads
        keepers = []
        for x, place in zip(tensors, places):
            exchange = _exchanges.get(type(x))
            if exchange is None or x.is_neg():
                keepers.append(export(x, *place))
                continue
            try:  # `_by_torch` without the calls: they are what a small attention costs
                exchange(x, place[2])
            except (BufferError, RuntimeError) as error:
                raise _refusal(x, place[0], error) from None
        status = self.function(*before, address)
        self.free.append(frame)
        if status != 0:
            self.check(status)
        del keepers  # not before


_plan_of = functools.lru_cache(maxsize=256)(Plan)


def plan_of(function, read, written, options):
    """The plan of a function of this name, the names of its tensors, and a dictionary of options."""
    return _plan_of(function, read, written, tuple(plain(options).items()))


def run(function, read, written, options, threads, *before):
    """Calls a function of the library. read, written: tensors by their names in cca_call; None is not given. options: a
    dictionary. before: arguments that come before the structure."""
    read = {name: x for name, x in read.items() if x is not None}
    written = {name: x for name, x in written.items() if x is not None}
    plan = plan_of(function, tuple(read), tuple(written), options)
    plan((*read.values(), *written.values()), threads, *before)


def quantize(rows, to, scales):
    """cca_quantize"""
    tensors = (Tensor * 3)()
    places = [ctypes.addressof(tensor) for tensor in tensors]
    given = ((rows, "rows", False), (to, "to", True), (scales, "scales", True))
    keepers = [export(*tensor, place) for tensor, place in zip(given, places)]
    check(library.cca_quantize(*places))
    del keepers  # not before


def has_padding(names):
    """Whether results of a call with these tensors may have tokens of no sequence, which the library does not write."""
    return any(name.endswith(("_lengths", "_offsets")) for name in names)


_THREADED = 2**21  # multiply-adds of queries and keys: less takes no longer than to make a thread


def threads_of(threads, multiply_adds):
    """How many: what is given, else PyTorch's number where it is loaded, else that of the processors that this process may
    use; for small calls 1."""
    if threads is not None:
        return int64("threads", threads)
    if multiply_adds < _THREADED:
        return 1
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.get_num_threads()
    return len(os.sched_getaffinity(0))
