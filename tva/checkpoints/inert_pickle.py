"""Read PyTorch's pickled files without executing them: tensors become byte ranges, every other object stays inert.

A pickle names functions and classes to call. Here none of them is ever looked up: the few that rebuild tensors are
replaced by our own, which note where the tensor's bytes are, plain containers are made, and any other name becomes an
`Inert` object that keeps what was pickled and does nothing. So a checkpoint whose hyperparameters, optimizer or
callbacks hold foreign objects can be read for its weights, with its classes absent and its code, if any, unrun.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tva._torch import torch
from tva.checkpoints.foreign import shown
from tva.checkpoints.lazy import Entry, OpenFile, Stored
from tva.checkpoints.spec import NAMES_OF_DTYPES, Spec

TENSOR_TYPES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
DTYPES = {*NAMES_OF_DTYPES, "complex32", "complex128", "quint8", "qint8", "qint32", "float8_e8m0fnu"}
PICKLE_BYTES = 2**30  # of the pickle in an archive, whose tensors are beside it
MOST_OPCODES = 2**26  # of one pickle: the parts of the largest sharded checkpoints take fewer
KEY_COST = 10_000  # elements of nested tuples that one key of a mapping or one item of a set may have
REPEATED_BYTES = 2**32  # of a tensor that takes more memory than its storage has bytes


class Inert:
    """Stands in for an object whose class is not loaded.

    Attributes:
        name: The class or function, as ``module.name``.
        args: What it would have been called with.
        state: What its attributes would have been set from, or None.
    """

    name = "object"

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # an entry of a subclass of dict

    def append(self, value: Any) -> None:
        pass  # an item of a subclass of list, or, below, of set

    add = append

    def __repr__(self) -> str:
        return f"an object of class {self.name[:200]}"


class _Dict(dict):
    """A dict that takes the factory of a defaultdict and leaves it."""

    def __init__(self, factory: Any = None, *args: Any) -> None:
        super().__init__(*args)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    """Make a set of what is quickly hashed; the opcodes that make sets are checked in `check_pickle`."""
    items = list(items)
    _check_keys(map(_cost, items))
    return set(items)


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _size(sizes: Iterable[Any] = ()) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if not all(isinstance(size, int) for size in sizes):
        raise pickle.UnpicklingError("a torch.Size holds something other than integers")
    return sizes


def _cost(value: Any, budget: int = KEY_COST) -> int:
    """Count the elements of nested tuples, each as often as it is in one; counting ends at the budget."""
    if not isinstance(value, tuple):
        return 1
    cost = 1
    for item in value:
        cost += _cost(item, budget - cost)
        if cost > budget:
            break
    return cost


def _check_keys(costs: Iterable[int]) -> None:
    if max(costs, default=0) > KEY_COST:
        raise pickle.UnpicklingError(f"a key is a tuple of more than {KEY_COST} elements")


class _Ordered(collections.OrderedDict):
    """An OrderedDict made empty or from plain pairs."""

    def __init__(self, pairs: Iterable[Any] = ()) -> None:
        pairs = [tuple(pair) for pair in pairs]
        _check_keys(_cost(key) for key, _ in pairs)
        super().__init__(pairs)


PLAIN: dict[str, Any] = {
    "collections.OrderedDict": _Ordered,
    "collections.Counter": _Ordered,
    "collections.defaultdict": _Dict,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "torch.Size": _size,
}


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, tuple[int | None, ...]]:
    """Return what an opcode does to the stack: whether it takes all to the mark, how many it takes, what it leaves."""
    before = opcode.stack_before
    to_mark = pickletools.stackslice in before
    pops = before.index(pickletools.markobject) if to_mark else len(before)
    return to_mark, pops, tuple(None if kind is pickletools.markobject else 1 for kind in opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}


def check_pickle(data: io.BytesIO) -> None:
    """Refuse a pickle whose keys would take forever to hash, or whose memo would take all memory.

    A tuple that holds another twice, which holds another twice, and so on, takes a few bytes a level and doubles the
    time to hash it with each. The stack is followed here without making anything: of each object only the number of
    elements of its nested tuples.

    Args:
        data: At the start of a pickle; afterwards at its end.

    Raises:
        pickle.UnpicklingError: It has such a key or memo, or too many opcodes.
        ValueError: It is not a pickle.
    """
    stack: list[int | None] = []  # None: a mark
    memo: dict[int, int] = {}
    length = len(data.getbuffer())

    def since_mark() -> list[int]:
        items = []
        while (item := stack.pop()) is not None:
            items.append(item)
        return items[::-1]

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count > MOST_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MOST_OPCODES:,} opcodes")
        if name in ("BINGET", "GET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif name in ("BINPUT", "PUT", "LONG_BINPUT"):
            if int(argument) > length:
                raise pickle.UnpicklingError(f"it numbers an object {argument} in {length} bytes")
            memo[int(argument)] = stack[-1] or 0
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1] or 0
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            cost = 1 + (stack.pop() or 0)
            for _ in range(int(name[-1]) - 1):
                cost += stack.pop() or 0
            stack.append(cost)
        elif name == "TUPLE":
            stack.append(1 + sum(since_mark()))
        elif name == "SETITEM":
            _check_keys([stack[-2] or 0])
            del stack[-2:]
        elif name in ("SETITEMS", "DICT", "ADDITEMS", "FROZENSET"):
            items = since_mark()
            _check_keys(items[::2] if name in ("SETITEMS", "DICT") else items)
            stack += [1] if name in ("DICT", "FROZENSET") else []
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            to_mark, pops, pushes = _EFFECTS[name]
            if to_mark:
                since_mark()
            for _ in range(pops):
                stack.pop()
            stack += pushes


class _Storage(NamedTuple):
    dtype: torch.dtype | None  # None: bytes without a type
    file: OpenFile
    offset: int
    num_bytes: int


class _StorageType(NamedTuple):
    dtype: torch.dtype | None


class InertUnpickler(pickle.Unpickler):
    """Unpickle plain containers and tensors; everything else becomes an `Inert` object.

    Args:
        data: The pickle.
        storage: Gives ``(file, offset, number of bytes)`` of a storage by its key.
    """

    def __init__(self, data: bytes, storage: Callable[[str], tuple[OpenFile, int, int]] | None = None) -> None:
        check_pickle(io.BytesIO(data))
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage = storage
        self._made: dict[tuple[str, str], Any] = {}
        self.inert: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name: never the object of that name unless it is a plain container."""
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in self._made:
            self._made[module, name] = self._stand_in(module, name)
        return self._made[module, name]

    def _stand_in(self, module: str, name: str) -> Any:
        if (kind := PLAIN.get(f"{module}.{name}")) is not None:
            mapping = isinstance(kind, type) and issubclass(kind, dict)
            return type(name, (kind,), {}) if mapping else kind  # fresh: it may be given attributes
        if module == "torch" and name in DTYPES and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return _StorageType(_storage_dtype(name))
        rebuild = {
            "_rebuild_tensor": _rebuild,
            "_rebuild_tensor_v2": _rebuild,
            "_rebuild_tensor_v3": _rebuild_v3,
            "_rebuild_parameter": _rebuild_parameter,
            "_rebuild_parameter_with_state": _rebuild_parameter,
            "_rebuild_from_type_v2": _rebuild_from_type,
        }
        if module in ("torch._utils", "torch._tensor") and name in rebuild:
            function = rebuild[name]
            return lambda *args: function(*args)  # fresh for each file, which could set attributes on it
        qualified = f"{module}.{name}"
        if qualified not in TENSOR_TYPES:
            self.inert.add(qualified)
        return type("Inert", (Inert,), {"name": qualified})

    def persistent_load(self, pid: Any) -> Any:
        """Return where a storage's bytes are."""
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside itself that is not a storage")
        dtype = pid[1].dtype if isinstance(pid[1], _StorageType) else None
        return _Storage(dtype, *self._storage(str(pid[2])))


def _storage_dtype(name: str) -> torch.dtype | None:
    names = {"Half": "float16", "Float": "float32", "Double": "float64", "Char": "int8", "Short": "int16"}
    names |= {"Int": "int32", "Long": "int64", "Byte": "uint8", "Bool": "bool", "BFloat16": "bfloat16"}
    names |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128"}
    found = names.get(name.removesuffix("Storage"))
    return getattr(torch, found) if found else None


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None) -> Any:
    dtype = dtype or storage.dtype
    if dtype is None or (len(rest) > 2 and rest[2]):  # quantized, or its bytes are to be conjugated or negated
        return Inert()
    if any(type(number) is not int for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor's offset, shape and strides must be integers")
    shape, stride = torch.Size(size), tuple(stride)
    contiguous = torch.empty(shape, device="meta").stride()
    extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if len(stride) != len(shape) or min((offset, *stride)) < 0:
        raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} has offset {offset} and strides {stride}")
    if (offset + extent) * dtype.itemsize > storage.num_bytes:
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(shape)} needs {(offset + extent) * dtype.itemsize} bytes of a storage of "
            f"{storage.num_bytes}"
        )
    if shape.numel() * dtype.itemsize > max(storage.num_bytes, REPEATED_BYTES):
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(shape)} repeats a storage of {storage.num_bytes} bytes to more than "
            f"{REPEATED_BYTES}"
        )
    same = (
        all(n == 1 or mine == theirs for n, mine, theirs in zip(shape, stride, contiguous, strict=True)) or 0 in shape
    )
    start = storage.offset + offset * dtype.itemsize
    return Stored(storage.file, start, Spec(dtype, shape), None if same else stride)


def _rebuild_v3(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    return _rebuild(storage, offset, size, stride, grad, hooks, *rest, dtype=dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, Entry) else Inert()


def _rebuild_from_type(function: Callable[..., Any], kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    made = function(*args)
    name = getattr(kind, "name", "object")
    return made if isinstance(made, Entry) and name in TENSOR_TYPES else type("Inert", (Inert,), {"name": name})()


class _Window(io.RawIOBase):
    def __init__(self, file: OpenFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(
            0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.read_into(memoryview(buffer)[:count], self._start + self._position)
        self._position += count
        return count


def load_archive(file: OpenFile, start: int = 0, length: int | None = None) -> tuple[Any, set[str]]:
    """Read the zip archive that ``torch.save`` writes, leaving its tensors on disk.

    Args:
        file: The file.
        start: First byte of the archive.
        length: Bytes of the archive; by default up to the end of the file.

    Returns:
        What was saved, with an `Entry` for each tensor, and the names of the classes and functions not loaded.

    Raises:
        ValueError: It is a TorchScript archive, or was written in another byte order.
        Exception: Of any class: it is not such an archive.
    """
    length = file.size - start if length is None else length
    with zipfile.ZipFile(io.BufferedReader(_Window(file, start, length))) as archive:
        members = {info.filename: info for info in archive.infolist()}
        root = next(
            (name[: -len("data.pkl")] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")), None
        )
        if root is None:
            found = ", ".join(shown(name) for name in list(members)[:3])
            raise zipfile.BadZipFile(f"it is a zip file without data.pkl; it holds {len(members)} files: {found}")
        if f"{root}constants.pkl" in members:
            raise ValueError("it is a TorchScript archive: load it with torch.jit.load and save its state_dict()")

        def read(name: str, limit: int) -> bytes:
            info = members[root + name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:  # torch compresses nothing
                raise zipfile.BadZipFile(f"its {name} is compressed, or larger than {limit} bytes")
            return archive.read(info)

        if f"{root}byteorder" in members and read("byteorder", 16) != b"little":
            raise ValueError("its bytes are in big-endian order: load and save it again on the machine that wrote it")

        def storage(key: str) -> tuple[OpenFile, int, int]:
            info = members[f"{root}data/{key}"]
            header = file.read(start + info.header_offset, 30)
            if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"its member {info.filename} is damaged or compressed")
            # The lengths of name and extra field (padding) in the member's own header, which may differ from the index.
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            return file, start + info.header_offset + 30 + skip, info.file_size

        unpickler = InertUnpickler(read("data.pkl", PICKLE_BYTES), storage)
        return unpickler.load(), unpickler.inert
