"""Write a checkpoint of known names and shapes, in any order and from any thread: whole under its name, or not at all.

Tensors go straight to their places in ``.NAME.partial``, which is synced while the arithmetic goes on; a journal beside
it lists the tensors that are on disk, so that an interrupted run can be continued. The files take their names at the
end.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy

from tva.checkpoints.atomic import can_write
from tva.checkpoints.dcp_writer import DcpShard, dcp_files
from tva.checkpoints.fingerprint import TensorHash
from tva.checkpoints.foreign import parse_json
from tva.checkpoints.formats import safetensors
from tva.checkpoints.lazy import Info, LazyWeights
from tva.checkpoints.shards import NO_LINK, Shard, shard_names, shard_tensors
from tva.checkpoints.spec import Elements, Spec
from tva.console import size_text
from tva.errors import some

try:
    import fcntl
except ImportError:  # no POSIX: two runs into one output are not noticed
    fcntl = None

SYNC_BYTES = 2**26  # bytes between two syncs; what is synced survives a loss of power


class Output:
    """A checkpoint being written; use it as a context manager, and `commit` when every tensor is finished.

    Left by an error in what was given (`ValueError`), it removes what it wrote; left in any other way, it keeps the
    partial files and their journal, from which a later run with ``resume`` goes on.

    Args:
        path: A ``.safetensors`` file, or a folder that is new or empty.
        tensors: Name to dtype and shape, in the order of the file.
        metadata: Text for the header. `commit` may replace values by others of the same length.
        job: All that determines the bytes: only an equal job continues a run.
        max_shard_bytes: Maximum size of a file in a folder, in bytes.
        resume: Continue what an interrupted run has left.
        stem: Start of the file names in a folder, such as ``model``.
        parts: Prefixes of names to the sub-folders of their weights, which have the names without the prefix.
        dcp: Write a folder of ``torch.distributed.checkpoint``; the metadata is then beside it.

    Attributes:
        done: Record of each tensor that an earlier run finished.
        size: Bytes of all tensors.

    Raises:
        ValueError: Another run writes there, the folder is not empty, or the journal is of another job.
        OSError: There is not enough room.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Spec],
        metadata: Mapping[str, str],
        job: Mapping[str, Any],
        max_shard_bytes: int,
        resume: bool = False,
        stem: str = "model",
        parts: Mapping[str, str] | None = None,
        dcp: bool = False,
    ) -> None:
        self.stem, self._parts, self._dcp = stem, parts or {"": ""}, dcp
        self.path, self.metadata, self.done = path, dict(metadata), {}
        self.size = sum(spec.num_bytes for spec in tensors.values())
        self._single = path.suffix == ".safetensors" and not dcp
        self._partial = path.with_name(f".{path.name}.partial")
        self._journal_path = path.with_name(f".{path.name}.journal")
        self._job = json.loads(json.dumps(dict(job)))
        self._shards = self._cut(tensors, max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.tensors}
        self._headers = [shard.header(self.metadata) for shard in self._shards]
        self._beside: dict[Path, Path] = {}
        self._finished: list[tuple[str, Any]] = []  # not yet synced
        self._unsynced = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._failed: OSError | None = None
        self._resume = resume

    def _cut(self, tensors: Mapping[str, Spec], max_shard_bytes: int) -> Sequence[Shard]:
        if self._single:
            return [Shard(self._partial, dict(tensors))]
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"output must end in .safetensors, or be a new or empty folder; {self.path} is neither. Remove what is "
                f"there, or give another one."
            )
        if self._dcp:
            cut = shard_tensors(tensors, max_shard_bytes)
            return [DcpShard(self._partial / f"__0_{number}.distcp", part) for number, part in enumerate(cut)]
        shards = []
        for prefix, folder in self._parts.items():
            cut = shard_tensors({n: spec for n, spec in tensors.items() if n.startswith(prefix)}, max_shard_bytes)
            stem = "model" if folder else self.stem
            part = {name: spec for shard in cut for name, spec in shard.items()}
            names = shard_names(part, max_shard_bytes, stem)[: len(cut)]
            shards += [Shard(self._partial / folder / n, part, prefix) for n, part in zip(names, cut, strict=True)]
        return shards

    def spec(self, name: str) -> Spec:
        """Return the dtype and shape of a tensor."""
        return self._shard_of[name].tensors[name]

    def beside(self, path: Path) -> Path:
        """Return where to write a file that gets its name together with the weights.

        In a folder it is one step; beside a single file it gets it just after them, so that for a moment it has its
        hidden name only, ``.NAME.partial``.
        """
        if not self._single:
            return self._partial / path.name
        hidden = path.with_name(f".{path.name}.partial")
        hidden.unlink(missing_ok=True)  # which might be a link of somebody else's
        self._beside[hidden] = path
        return hidden

    def weights(self) -> LazyWeights:
        """Open what was written so far."""
        opened = [(shard.prefix, safetensors.open(shard.path)) for shard in self._shards]
        entries = {prefix + name: weights.entry(name) for prefix, weights in opened for name in weights}
        return LazyWeights(Info(self.path, "not yet whole"), entries)

    # --- the context: partial files, and a thread that syncs them

    def __enter__(self) -> Output:
        with can_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            if self._resume:
                self._read_journal()
            if not self.done:
                self._try_to_begin()
            for shard in self._shards:
                shard.open()
            self._check_done()
        except BaseException:
            self._close()
            raise
        self._syncer = threading.Thread(target=self._sync_behind, name="tva-sync", daemon=True)
        self._syncer.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._stop_syncing()
        for hidden in self._beside:
            hidden.unlink(missing_ok=True)
        if error is None or isinstance(error, ValueError):  # whole by now, or wrong: nothing to go on with
            self._journal_path.unlink(missing_ok=True)
            self._remove_partial()
        elif isinstance(error, OSError):
            self._close()
            kept = f"the completed part is kept in {self._partial}: run again with resume to continue, or remove it"
            raise OSError(error.errno, f"{error.strerror or error}; {kept}", str(self.path)) from error
        self._close()

    def _lock(self) -> None:
        """Open the journal, which is the lock as well; in a folder that others write to, theirs is not taken."""
        busy = f"Another run is writing {self.path}. Wait for it, or give another output."
        while True:
            self._journal = self._open_journal()
            try:
                if fcntl is not None:
                    fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.lstat(self._journal_path), os.fstat(self._journal.fileno())):
                    return
            except BlockingIOError as error:
                self._journal.close()
                raise ValueError(busy) from error
            except FileNotFoundError:
                pass
            self._journal.close()  # of a run that ended between the two: once more

    def _open_journal(self) -> IO[str]:
        path = self._journal_path
        if path.is_symlink():
            raise ValueError(f"{path} is a link, which tva does not write through. Remove it.")
        with can_write(self.path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
        found = os.fstat(descriptor)
        others = hasattr(os, "geteuid") and found.st_uid != os.geteuid()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or others:
            os.close(descriptor)
            raise ValueError(
                f"{path} is not a file of yours only, and tva would write to it. Remove it, or give another output."
            )
        return os.fdopen(descriptor, "a+", errors="replace")

    def _try_to_begin(self) -> None:
        try:
            self._begin()
        except OSError as error:
            self._journal_path.unlink(missing_ok=True)
            self._remove_partial()
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, f"{error.strerror or error}: it was not written", str(self.path)) from error

    def _begin(self) -> None:
        self._remove_partial()
        needed = self.size + sum(map(len, self._headers))
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                f"{self.path} takes {size_text(needed)}, and {size_text(free)} are free on its disk. Make room."
            )
        if not self._single:
            self._partial.mkdir()
        for shard, header in zip(self._shards, self._headers, strict=True):
            shard.path.parent.mkdir(exist_ok=True)
            shard.begin(header)
        self._journal.truncate(0)
        self._journal.write(json.dumps(self._job) + "\n")
        self._journal.flush()

    def _read_journal(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split("\n")
        lines = lines[:-1]  # a line that was cut off has no end
        if self._partial.is_symlink() or not lines or not all(shard.path.exists() for shard in self._shards):
            return
        where = f"{self._journal_path}: line"
        job = parse_json(lines[0], f"{where} 1", dict)
        other = sorted(key for key in job.keys() | self._job.keys() if job.get(key) != self._job.get(key))
        if other:
            raise ValueError(
                f"The run that was interrupted at {self.path} was another: {some(other)} differ. Give the same "
                f"command, or leave out resume to start over."
            )
        for number, line in enumerate(lines[1:], 2):
            done = parse_json(line, f"{where} {number}", [(str, {"edited": str})])
            if len(done) != 2 or done[0] not in self._shard_of or not isinstance(done[1], dict) or not done[1]:
                raise ValueError(f"{where} {number} does not name a tensor of {self.path}. Run without resume.")
            self.done[done[0]] = done[1]

    def _check_done(self) -> None:
        """Read back what an earlier run left: a tensor that is not what the journal says is done again."""
        for name, record in list(self.done.items()):
            shard = self._shard_of[name]
            spec, digest = shard.tensors[name], TensorHash(shard.tensors[name])
            for start in range(0, spec.num_bytes, 2**22):
                length = min(2**22, spec.num_bytes - start)
                data = os.pread(shard.file, length, shard.offsets[name] + start)
                digest.update(numpy.frombuffer(data, numpy.uint8))
            if digest.hexdigest() != record["edited"]:
                del self.done[name]

    def _remove_partial(self) -> None:
        if self._partial.is_dir() and not self._partial.is_symlink():
            shutil.rmtree(self._partial)
        else:
            self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        self._journal.close()
        for shard in self._shards:
            shard.close()

    # --- writing

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Write elements of a tensor, flattened, from ``start`` on; any thread may.

        Raises:
            OSError: The disk is full, or the file cannot be written.
        """
        if self._failed:
            raise self._failed
        self._shard_of[name].write(name, start, chunk)

    def hand_out(self) -> list[Shard]:
        """Return the shards that are not whole, closed, so that other processes can write them.

        Two machines that have one file of a network disk open see each other's writes late; one that opens a file sees
        what others have closed before.
        """
        shards = [shard for shard in self._shards if any(name not in self.done for name in shard.tensors)]
        for shard in shards:
            os.fsync(shard.file)
            shard.close()
        return shards

    def take_back(self, shard: Shard, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Open a shard that another process has written, and note that its tensors are whole."""
        shard.open()
        for name, record in records.items():
            self.finish(name, record)

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Mark a tensor as complete; ``record["edited"]`` is its digest."""
        with self._wake:
            self._finished.append((name, record))
            self._unsynced += self._shard_of[name].tensors[name].num_bytes
            if self._unsynced >= SYNC_BYTES:
                self._wake.notify()

    def _sync_behind(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._unsynced >= SYNC_BYTES)
                if self._stopping:
                    return
            try:
                self._sync()
            except OSError as error:  # raised by the next write
                self._failed = error
                return

    def _sync(self) -> None:
        with self._wake:
            finished, self._finished, self._unsynced = self._finished, [], 0
        for shard in {id(s): s for s in (self._shard_of[name] for name, _ in finished)}.values():
            os.fdatasync(shard.file)
        self._journal.write("".join(json.dumps([name, record]) + "\n" for name, record in finished))
        self._journal.flush()
        os.fdatasync(self._journal.fileno())

    def _stop_syncing(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._syncer.join()
        try:
            self._sync()
        except OSError as error:
            self._failed = self._failed or error

    def commit(self, metadata: Mapping[str, str], side_files: Mapping[str, bytes | Path]) -> None:
        """Rename the partial files to their final names.

        Args:
            metadata: Values of the header to replace, of the same length.
            side_files: Path in the folder to contents, or to a file to copy, of what is beside the weights.
        """
        self._stop_syncing()
        if self._failed:
            raise self._failed
        self.metadata |= metadata
        for shard, header in zip(self._shards, self._headers, strict=True):
            final = shard.header(self.metadata)
            assert len(final) == len(header), "metadata of another length"
            os.pwrite(shard.file, final, 0)
            os.fsync(shard.file)
        if not self._single:
            found = dcp_files(self._shards, self.metadata) if self._dcp else self._index()
            for name, data in {**side_files, **found}.items():
                path = self._partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data) if isinstance(data, bytes) else shutil.copyfile(data, path)
        os.replace(self._partial, self.path)
        beside, self._beside = self._beside, {}  # from here on they belong to what has its name
        for hidden, path in beside.items():
            os.replace(hidden, path)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)

    def _index(self) -> dict[str, bytes]:
        found = {}
        for prefix, folder in self._parts.items():
            shards = [shard for shard in self._shards if shard.prefix == prefix]
            if len(shards) > 1:
                weight_map = {name.removeprefix(prefix): s.path.name for s in shards for name in s.tensors}
                size = sum(spec.num_bytes for shard in shards for spec in shard.tensors.values())
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                name = f"{'model' if folder else self.stem}.safetensors.index.json"
                found[f"{folder}/{name}" if folder else name] = json.dumps(index, indent=2).encode()
        return found
