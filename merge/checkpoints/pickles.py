"""A pickle reader that runs nothing: the opcodes of torch's files, into inert descriptions.

`pickle.Unpickler` with a strict `find_class` would still hash what a file nests without end (a
crash of the C stack), call what a file combines, and touch 32 GiB for one LONG_BINPUT opcode; so
the opcodes are interpreted here, from the standard library's own disassembler.
"""

from __future__ import annotations

import io
import pickletools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from merge.checkpoints.tensors import check_shape
from merge.errors import MergeError

# A tensor takes about 30 opcodes: enough for 100,000 of them, a second or two, a few hundred MB.
OPCODE_LIMIT = 4_000_000

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
TORCH_DTYPES = {f"torch.{k}": v for k, v in vars(torch).items() if isinstance(v, torch.dtype)}
DICTS = {"collections.OrderedDict", "collections.defaultdict"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}

# What real training files hold besides tensors. Nothing of it is built, all of it is ignored.
INERT = {
    "argparse.Namespace",
    "_codecs.encode",
    "collections.Counter",
    "copyreg._reconstructor",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Buffer",
    "torch.nn.parameter.Parameter",
    "torch.torch_version.TorchVersion",
    "torch._tensor._rebuild_from_type_v2",
    *(
        f"builtins.{kind}"
        for kind in (
            *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int"),
            *("list", "object", "range", "set", "slice", "str", "tuple"),
        )
    ),
}
INERT_PATTERN = re.compile(
    r"numpy(\._?core)?\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|(u?int|float|complex)\d+|bool_?|(str|bytes)_?)"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)
# Python 2 names of what protocol 2, torch's default, still writes.
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}

CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


# What wrong bytes lead to: an operand of the wrong type, an empty stack, a size without end.
CORRUPT = (
    *(AttributeError, IndexError, KeyError, MemoryError, OverflowError),
    *(RecursionError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle refers to: its record's name, and the size it claims."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class PickledTensor:
    """A strided view into a storage; `offset` and `stride` are in elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names and that is allowed; it is never imported."""

    name: str


class Ignored:
    """A value that is no tensor and no dict, list or constant."""


@dataclass
class Pickle:
    """What one pickle holds: its root value, and every storage that it refers to."""

    root: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)


def read_pickle(
    stream: io.BytesIO | io.BufferedReader, where: str, *, opcode_limit: int = OPCODE_LIMIT
) -> Pickle:
    """Interpret one pickle from `stream`, which is left just behind it.

    Dicts (also ordered ones), lists, tuples and constants come out as themselves, tensors as
    PickledTensor, everything else that is allowed as Ignored.
    Raises MergeError, beginning with `where`, for a name that is not allowed and a corrupt pickle.
    """
    machine = _Machine(where)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == opcode_limit:
                raise ValueError(f"it has more than {opcode_limit} opcodes")
            machine.step(opcode.name, argument)
    except MergeError:
        raise
    except CORRUPT as error:
        raise MergeError(
            f"{where}: its pickle is corrupt or of an unknown kind "
            f"({type(error).__name__}: {str(error)[:300]}); get or write the file again"
        ) from error
    return machine.result


class _Machine:
    """The stack machine of pickle, without its power to import and call."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.result = Pickle()
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in CONSTANTS:
            stack.append(argument)
            return
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                self.result.root = stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Ignored())
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                values = tuple(stack[-size:])
                if len(values) < size:
                    raise IndexError("stack underflow")
                del stack[-size:]
                stack.append(values)
            case "TUPLE":
                values = tuple(self._to_mark())
                self.stack.append(values)
            case "LIST":
                values = self._to_mark()
                self.stack.append(values)
            case "DICT":
                values = self._to_mark()
                self.stack.append({})
                self._set_items(values)
            case "FROZENSET":
                self._to_mark()
                self.stack.append(Ignored())
            case "APPEND":
                value = stack.pop()
                self._extend([value])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._to_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._to_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "GLOBAL":
                stack.append(self._name(*argument.split(" ")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._name(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                stack.pop()  # an object's state: attributes, none of which is a weight
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise ValueError(f"opcode {opcode}")

    def _to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Ignored):
            raise TypeError(f"items are appended to {type(target).__name__}")

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            _update(target, zip(values[::2], values[1::2], strict=True))
        elif not isinstance(target, Ignored):
            raise TypeError(f"items are set in {type(target).__name__}")

    def _name(self, module: Any, name: Any) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no string")
        module = RENAMED.get(module, module)
        full = f"{module}.{name}"
        if len(full) > 300:
            raise ValueError("a name without end")
        if (
            full in DICTS | PARAMETERS | TENSORS | INERT
            or full in TORCH_DTYPES
            or _storage_dtype(full) is not None
            or INERT_PATTERN.fullmatch(full)
        ):
            return Named(full)
        if full.startswith(("torch._utils._rebuild", "torch.Q")) or "Storage" in name:
            raise MergeError(
                f"{self.where}: holds a tensor that is not a plain strided one ({full}: quantized, "
                "sparse or of another device); make it plain (.dequantize(), .to_dense()) and save "
                "the file again"
            )
        looks_like_class = name.split(".")[-1].lstrip("_")[:1].isupper()
        if looks_like_class and module.split(".")[0] not in sys.stdlib_module_names:
            raise MergeError(
                f"{self.where}: holds an object of class '{full}', perhaps a whole pickled module, "
                "and loading that would run code; wanted weights only. Convert it once:\n"
                "    model = torch.load(path, weights_only=False)"
                "  # runs the file's code: only if you trust it\n"
                "    torch.save(model.state_dict(), new_path)"
            )
        raise MergeError(
            f"{self.where}: wants to run {full}; a checkpoint is data, and nothing of it was run: "
            "load it in no other way, unless you trust where it comes from, and save its state "
            "dict alone"
        )

    def _storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage", Named(name), str(key), _, int(numel), *view) if view in ([], [None]):
                dtype = _storage_dtype(name)
            case _:
                raise ValueError("a reference to something that is not a plain storage")
        if dtype is None or numel < 0:
            raise ValueError(f"a storage of kind {name} with {numel} elements")
        storage = Storage(key, dtype, numel)
        if self.result.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError(f"storage {key!r} appears with two sizes")
        return storage


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise TypeError(f"{type(function).__name__} is called")
    name = function.name
    if name in TENSORS:
        return _tensor(name, *arguments)
    if name in PARAMETERS:
        if not isinstance(arguments[0], PickledTensor):
            raise TypeError("a parameter that is no tensor")
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes of its own
        return _call(arguments[0], arguments[2])
    if name in DICTS:
        built: dict[Any, Any] = {}
        if name == "collections.OrderedDict" and arguments:
            _update(built, arguments[0])
        return built
    return Ignored()


def _tensor(
    function: str, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any
) -> PickledTensor:
    """The view that torch._utils._rebuild_tensor_v2 and _v3 would make, checked to lie inside."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise TypeError("a tensor without a storage or a place in it")
    dtype, metadata = storage.dtype, rest[2:]
    if function.endswith("_v3"):
        dtype, metadata = TORCH_DTYPES[rest[2].name], rest[3:]
    if any(metadata):
        raise ValueError("a tensor that is conjugated or negated lazily; save it resolved")
    shape, stride = check_shape(shape, dtype), check_shape(stride, dtype)
    if len(stride) != len(shape):
        raise ValueError(f"a tensor of shape {list(shape)} with strides {list(stride)}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"a tensor reaches to element {last} of storage {storage.key!r}, which has "
            f"{storage.nbytes} bytes of {dtype}"
        )
    return PickledTensor(storage, dtype, offset, shape, stride)


def _storage_dtype(name: str) -> torch.dtype | None:
    """The element type of a storage class, `torch.FloatStorage`; None for other names."""
    module, _, kind = name.rpartition(".")
    known = module in {"torch", "torch.cuda", "torch.storage"}
    return STORAGE_DTYPES.get(kind) if known else None


def _update(target: dict[Any, Any], pairs: Any) -> None:
    for key, value in pairs if not isinstance(pairs, dict) else pairs.items():
        # Hashing a tuple goes down all of it: without end, where a file nests tuples.
        flat: Sequence[Any] = key if isinstance(key, tuple) else (key,)
        if not all(part is None or isinstance(part, str | bytes | int | float) for part in flat):
            key = Ignored()  # kept apart: a number of entries is reported
        target[key] = value
