"""The files of a checkpoint: written with checksums, and read without executing anything that is in them."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.state import Encoded

SHARED = "shared.pt"
SHARDED = "sharded"
METADATA = "sharded/.metadata"
BLOCK = 1 << 22  # bytes read or written at once


class FileEntry(NamedTuple):
    """Size and checksum. CRC-32 finds accidents, not forgeries, which are met by trusting nothing that is read."""

    num_bytes: int
    crc32: int


def kill_point(name: str) -> None:
    """A place at which tests kill the writer."""


class _Checksummed:
    """A file that counts and sums what is written; torch hides the OSError of a full disk, so that is kept as well."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.crc32 = zlib.crc32(view, self.crc32)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def write_state(path: Path, encoded: Encoded) -> FileEntry:
    """Writes all of a state but its DTensors: tensors, and one text for the rest; syncs it and looks at its size.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"tree": json.dumps(encoded.tree), "tensors": encoded.tensors}
    with open(path, "xb", buffering=0) as raw:
        file = _Checksummed(io.BufferedWriter(raw, BLOCK))
        try:
            torch.save(content, file)  # type: ignore[arg-type]
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        file.flush()
        kill_point("file written")
        os.fsync(raw.fileno())
        size = os.fstat(raw.fileno()).st_size
    if size != file.num_bytes:
        raise OSError(errno.EIO, f"{path.name} has {size} bytes after {file.num_bytes} were written")
    kill_point("file synced")
    return FileEntry(file.num_bytes, file.crc32)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes DTensors; on all ranks of the group together, None for a single rank.

    Raises:
        OSError, ValueError: one of the ranks cannot write; the same on all ranks.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        def storage_meta(self) -> StorageMeta:
            return StorageMeta()  # else it holds the path of the temporary folder

    writer = Writer(folder / SHARDED)
    with _first_failure():
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raises the first of the errors that torch.distributed.checkpoint gathers in a BaseException of its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(first, OSError):
            raise OSError(first.errno, f"{first.strerror} (rank {rank})") from None
        raise ValueError(f"{type(first).__name__}: {_short(first)} (rank {rank})") from None


def shards_of(folder: Path, rank: int) -> dict[str, FileEntry]:
    """What a rank has written with `write_shards`, by the name of the file; rank 0 has written the metadata."""
    names = sorted(os.listdir(folder / SHARDED))
    own = [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and name == ".metadata")]
    return {f"{SHARDED}/{name}": entry_of(folder / SHARDED / name) for name in own}


def entry_of(path: Path) -> FileEntry:
    num_bytes = crc32 = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            crc32 = zlib.crc32(block, crc32)
            num_bytes += len(block)
    return FileEntry(num_bytes, crc32)


class Content(NamedTuple):
    """What a file of `write_state` holds."""

    tree: Any
    tensors: list[Tensor]


def read_state(data: bytes, name: str) -> Content:
    """Takes apart what `write_state` wrote, on the CPU; nothing in it is executed.

    Args:
        data: all bytes of the file; the tensors are copies.
        name: of the file, for messages.

    Raises:
        ValueError: it holds something else; the message is the reason.
    """
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise ValueError(f"{name} is refused ({_short(error)})") from None
    if not isinstance(content, dict) or set(content) != {"tree", "tensors"}:
        raise ValueError(f"{name} holds something else than a checkpoint")
    tensors = content["tensors"]
    if not isinstance(tensors, list) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"{name} holds something else than tensors")
    try:
        return Content(json.loads(content["tree"]), tensors)
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds no tree of values") from None


def _short(error: BaseException) -> str:
    """What is wrong with the bytes, in one line; torch's own text begins with how to load them all the same."""
    text = str(error)
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {asked[1]}"
    if inner := re.search(r"WeightsUnpickler error: (.+)", text):
        return inner[1][:200]
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def read_shards(folder: Path, metadata: Any, targets: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Reads DTensors into the tensors of the targets, each rank its part; on all ranks of the group together.

    Args:
        folder: of the checkpoint.
        metadata: from `read_metadata`.
        targets: tensors by name; DTensors get their part, others the whole.
        group: of gloo, None for a single rank.

    Raises:
        OSError, ValueError: one of the ranks cannot read its part; the same on all ranks.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    reader = Reader(folder / SHARDED)
    with warnings.catch_warnings(), _first_failure():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single rank does without
        load(dict(targets), storage_reader=reader, process_group=group, no_dist=group is None)


def read_metadata(folder: Path, names: Iterable[str]) -> Any:
    """The metadata of torch.distributed.checkpoint, a pickle: only with an unpickler that knows its few classes.

    Args:
        folder: of the checkpoint.
        names: its files; the metadata may refer to no others.

    Raises:
        ValueError: it holds anything else.
    """
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    except Exception as error:  # an unpickler raises whatever the bytes lead to
        raise ValueError(f"{METADATA} is refused ({_short(error)})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{METADATA} holds something else than metadata")
    strange = {f"{SHARDED}/{info.relative_path}" for info in metadata.storage_data.values()} - set(names)
    if strange:
        raise ValueError(f"{METADATA} refers to {min(strange)!r}, which is no file of the checkpoint")
    metadata.storage_meta = StorageMeta()
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of the metadata, all of which only hold data, and nothing else."""

    CLASSES: ClassVar[dict[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
