"""Output files in the making.

A file is built as `.<name>.<plan>.part`, its bytes reserved, and its tensors are written at their planned offsets in any order. The
first 8 bytes, the header's length, stay zero until everything else is on the disk: a stray part never parses as safetensors. Then
the file is linked to its final name, which must be free. Worker processes build `Parts` of their own and only call `write`.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mxconv.artifact.failpoints import reach
from mxconv.artifact.names import part_path
from mxconv.artifact.system import fallocate, start_writeback, sync_directory, writing
from mxconv.checkpoint.boxes import ShortRead, fill, read_box, write_box
from mxconv.checkpoint.descriptors import Descriptors
from mxconv.errors import IntegrityError, MxconvError, OutputConflict
from mxconv.placement import PlacedFile
from mxconv.tensors import DTYPE_BYTES, Box, TensorSpec, whole

CHUNK_BYTES = 4 << 20
LENGTH_BYTES = 8
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A box of the output tensor `tensor` in `files[file]`; usually all of it."""

    file: int
    tensor: str
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHash:
    """A finished file: SHA-256 (hex) of all its bytes, as `sha256sum` prints it, and of each tensor's bytes."""

    path: str
    size_bytes: int
    sha256: str
    tensors: Mapping[str, str]


class Stopped(Exception):
    """Hashing was told to stop; the run is ending."""


class Parts:
    """The files of one plan under `root`, by number; every method may be called from any thread."""

    def __init__(self, root: Path, *, plan_digest: str, files: Sequence[PlacedFile], finished: Iterable[int] = ()) -> None:
        self._root = root
        self._plan = plan_digest
        self._files = files
        self._specs: list[dict[str, TensorSpec]] = [{tensor.name: tensor for tensor in file.tensors} for file in files]
        self._writers = Descriptors(lambda number: os.open(self.part(number), _WRITE))
        self._readers = Descriptors(lambda number: os.open(self.final(number), _READ))
        self._finished = set(finished)
        self.stop = threading.Event()

    def final(self, number: int) -> Path:
        """The name of a finished file."""
        return self._root / self._files[number].path

    def part(self, number: int) -> Path:
        """The name of a file in the making."""
        return part_path(self.final(number), self._plan)

    def close(self) -> None:
        """Close all files."""
        self._writers.close()
        self._readers.close()

    def create(self, number: int) -> None:
        """Create the part with its bytes reserved, or take over the one that an earlier run of this plan left."""
        part = self.part(number)
        with writing(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            if part.parent != self._root and part.parent.is_symlink():
                raise OutputConflict("a symbolic link is in the way", where=part.parent, hint="remove it")
            try:
                fd = os.open(part, _WRITE | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                fd = os.open(part, _WRITE)
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
                    raise OutputConflict("not a file that mxconv left here", where=part, hint="remove it")
                fallocate(fd, self._files[number].size_bytes)
                os.ftruncate(fd, self._files[number].size_bytes)
                os.pwrite(fd, bytes(LENGTH_BYTES), 0)
            finally:
                os.close(fd)
        reach("part-created")

    def write(self, region: Region, data: memoryview | np.ndarray) -> str:
        """Write the C-contiguous bytes of a region at its place; their SHA-256 (hex).

        A region of a file that is finished is only hashed. Raises ResourceError when the disk gives out.
        """
        spec = self._spec(region)
        view = data if isinstance(data, memoryview) else data.data
        view = view.cast("B") if view.nbytes else memoryview(b"")
        expected = self.region_bytes(region)
        if len(view) != expected:
            raise MxconvError(
                "data does not fill its region", where=f"{region.tensor} {region.box}", expected=expected, got=len(view)
            )
        digest = hashlib.sha256(view).hexdigest()
        if region.file in self._finished:
            return digest
        offset = self._files[region.file].offsets[spec.name]
        with writing(self.part(region.file)), self._writers.use(region.file) as fd:
            write_box(fd, offset, spec.shape, region.box, DTYPE_BYTES[spec.dtype], view)
            start_writeback(fd, offset, spec.size_bytes)
        reach("region-written")
        return digest

    def hash_region(self, region: Region) -> str:
        """SHA-256 (hex) of what a region holds on the disk. Raises FileNotFoundError when there is no such file."""
        spec = self._spec(region)
        itemsize = DTYPE_BYTES[spec.dtype]
        offset = self._files[region.file].offsets[spec.name]
        digest = hashlib.sha256()
        pool = self._readers if region.file in self._finished else self._writers
        with pool.use(region.file) as fd:
            for box in _slabs(region.box, itemsize):
                if self.stop.is_set():
                    raise Stopped
                out = np.empty(_box_bytes(box, itemsize), dtype=np.uint8)
                read_box(fd, offset, spec.shape, box, itemsize, out)
                digest.update(out.data)
        return digest.hexdigest()

    def region_bytes(self, region: Region) -> int:
        """Bytes of a region."""
        return _box_bytes(region.box, DTYPE_BYTES[self._spec(region).dtype])

    def covers_tensor(self, region: Region) -> bool:
        """Whether a region is a whole tensor, so that the hash of one is the hash of the other."""
        return region.box == whole(self._spec(region).shape)

    def mark_finished(self, number: int) -> None:
        """The file stands under its final name and is not written any more."""
        self._finished.add(number)
        self._writers.forget(number)

    def demote(self, number: int) -> None:
        """Take a file that stands under its final name without proof back into the making; only unpublished files are."""
        with writing(self.final(number)):
            self.part(number).unlink(missing_ok=True)
            os.rename(self.final(number), self.part(number))
            sync_directory(self.final(number).parent)

    def finish(self, number: int, written: Mapping[str, str]) -> FileHash:
        """Hash the file, put header and length, make it durable and give it its final name.

        `written` holds the SHA-256 of tensors as they were handed to `write`; IntegrityError when the disk holds something else.
        """
        file, part, final = self._files[number], self.part(number), self.final(number)
        length = len(file.header).to_bytes(LENGTH_BYTES, "little")
        with writing(part), self._writers.use(number) as fd:
            start_writeback(fd, 0, 0)
            _pwrite(fd, file.header, LENGTH_BYTES)
            reach("header-written")
            try:
                hashes = hash_file(fd, file, length=length, stop=self.stop.is_set)
            except ShortRead:
                raise IntegrityError("something cut the file while it was being written", where=part) from None
            for name, digest in hashes.tensors.items():
                if written.get(name, digest) != digest:
                    raise IntegrityError(
                        f"tensor {name!r} is not on the disk as it was written",
                        where=part,
                        hint="check memory and disk, then --resume",
                    )
            os.fdatasync(fd)
            reach("header-synced")
            _pwrite(fd, length, 0)
            reach("length-written")
            os.fdatasync(fd)
            reach("length-synced")
        with writing(final):
            link(part, final)
        self.mark_finished(number)
        return hashes

    def hash_final(self, number: int, progress: Callable[[int], None]) -> FileHash:
        """The hashes of a file that stands under its final name; IntegrityError when its size or header is not the plan's."""
        file, final = self._files[number], self.final(number)
        fd = os.open(final, _READ)
        try:
            info = os.fstat(fd)
            head = os.pread(fd, LENGTH_BYTES + len(file.header), 0)
            if not stat.S_ISREG(info.st_mode) or info.st_size != file.size_bytes:
                raise IntegrityError("finished file has another size", where=final, expected=file.size_bytes, got=info.st_size)
            if head != len(file.header).to_bytes(LENGTH_BYTES, "little") + file.header:
                raise IntegrityError("finished file has another header than its plan", where=final)
            return hash_file(fd, file, length=head[:LENGTH_BYTES], stop=self.stop.is_set, progress=progress)
        except ShortRead:
            raise IntegrityError("finished file is too short", where=final) from None
        finally:
            os.close(fd)

    def _spec(self, region: Region) -> TensorSpec:
        return self._specs[region.file][region.tensor]


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _box_bytes(box: Box, itemsize: int) -> int:
    return math.prod(stop - start for start, stop in box) * itemsize


def _slabs(box: Box, itemsize: int) -> Iterator[Box]:
    """`box` in pieces of about `CHUNK_BYTES` along its first axis, in the order of its bytes."""
    if not box:
        yield box
        return
    (start, stop), inner = box[0], box[1:]
    row = max(1, _box_bytes(inner, itemsize))
    step = max(1, CHUNK_BYTES // row)
    for first in range(start, stop, step):
        yield ((first, min(stop, first + step)), *inner)


def link(part: Path, final: Path) -> None:
    """Give a finished, durable part its final name, which must be free, and make that durable."""
    os.link(part, final, follow_symlinks=False)
    reach("part-linked")
    os.unlink(part)
    reach("part-unlinked")
    sync_directory(final.parent)


def hash_file(
    fd: int,
    file: PlacedFile,
    *,
    length: bytes,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _: None,
) -> FileHash:
    """One pass over the data of a placed file: SHA-256 of the whole file, its first 8 bytes being `length`, and of each tensor.

    Raises Stopped between chunks when `stop` says so.
    """
    whole_file = hashlib.sha256(length + file.header)
    tensors: dict[str, str] = {}
    buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)
    for tensor in file.tensors:
        digest = hashlib.sha256()
        start = file.offsets[tensor.name]
        for offset in range(start, start + tensor.size_bytes, CHUNK_BYTES):
            if stop():
                raise Stopped
            chunk = buffer[: min(CHUNK_BYTES, start + tensor.size_bytes - offset)]
            fill(fd, chunk, offset)
            whole_file.update(chunk.data)
            digest.update(chunk.data)
            progress(len(chunk))
        tensors[tensor.name] = digest.hexdigest()
    return FileHash(path=file.path, size_bytes=file.size_bytes, sha256=whole_file.hexdigest(), tensors=tensors)
