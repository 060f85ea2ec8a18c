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
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from tva._torch import torch
from tva.checkpoints.lazy import Entry, OpenFile, Stored
from tva.checkpoints.spec import Spec

TENSOR_TYPES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    RuntimeError, OverflowError, MemoryError, NotImplementedError,
)  # fmt: skip  # what a reader of bytes that are not what they seem may raise


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
        return f"an object of class {self.name}"


class _Dict(dict):
    """A dict that takes the factory of a defaultdict and leaves it."""

    def __init__(self, factory: Any = None, *args: Any) -> None:
        super().__init__(*args)


PLAIN = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.OrderedDict,
    "collections.defaultdict": _Dict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "torch.Size": tuple,
}


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
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage = storage
        self._made: dict[tuple[str, str], Any] = {}
        self.inert: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Give what stands for a name: never the object of that name unless it is a plain container."""
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in self._made:
            self._made[module, name] = self._stand_in(module, name)
        return self._made[module, name]

    def _stand_in(self, module: str, name: str) -> Any:
        if (kind := PLAIN.get(f"{module}.{name}")) is not None:
            return type(name, (kind,), {}) if issubclass(kind, dict) else kind  # fresh: it may be given attributes
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return _StorageType(_storage_dtype(name))
        rebuild = {
            "_rebuild_tensor": _rebuild,
            "_rebuild_tensor_v2": _rebuild,
            "_rebuild_tensor_v3": _rebuild_v3,
            "_rebuild_parameter": lambda data, *_: data,
            "_rebuild_parameter_with_state": lambda data, *_: data,
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
        """Give where a storage's bytes are."""
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"it refers to {pid!r} outside itself")
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
    same = (
        all(n == 1 or mine == theirs for n, mine, theirs in zip(shape, stride, contiguous, strict=True)) or 0 in shape
    )
    start = storage.offset + offset * dtype.itemsize
    return Stored(storage.file, start, Spec(dtype, shape), None if same else stride)


def _rebuild_v3(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    return _rebuild(storage, offset, size, stride, grad, hooks, *rest, dtype=dtype)


def _rebuild_from_type(function: Callable[..., Any], kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    made = function(*args)
    name = getattr(kind, "name", "object")
    return made if isinstance(made, Entry) and name in TENSOR_TYPES else type("Inert", (Inert,), {"name": name})()


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

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
        Exception: One of ``DAMAGED``: it is no such archive.
    """
    length = file.size - start if length is None else length
    with zipfile.ZipFile(io.BufferedReader(_Window(file, start, length))) as archive:
        members = {info.filename: info for info in archive.infolist()}
        root = next(
            (name[: -len("data.pkl")] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")), None
        )
        if root is None:
            raise zipfile.BadZipFile(f"it is a zip file without data.pkl; it holds {len(members)} other files")
        if f"{root}constants.pkl" in members:
            raise ValueError("it is a TorchScript archive: load it with torch.jit.load and save its state_dict()")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its bytes are in big-endian order: load and save it again on the machine that wrote it")

        def storage(key: str) -> tuple[OpenFile, int, int]:
            info = members[f"{root}data/{key}"]
            header = file.read(start + info.header_offset, 30)
            if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"its member {info.filename} is damaged or compressed")
            # The lengths of name and extra field (padding) in the member's own header, which may differ from the index.
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            return file, start + info.header_offset + 30 + skip, info.file_size

        unpickler = InertUnpickler(archive.read(f"{root}data.pkl"), storage)
        return unpickler.load(), unpickler.inert
