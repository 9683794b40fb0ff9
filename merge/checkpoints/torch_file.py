"""Files of torch.save, zip and older: tensors found from the pickle, nothing executed.

A record's claimed size is checked against the file: a mapped torch.load hands out the
neighbouring bytes silently.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from typing import Any

from merge.checkpoints.envelopes import unwrap
from merge.checkpoints.files import HEADER_BYTES_LIMIT, InputFile
from merge.checkpoints.pickles import Pickle, PickledTensor, read_pickle
from merge.checkpoints.tensors import Stored
from merge.errors import MergeError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def read_torch(
    file: InputFile, *, ema: bool = False, header_limit: int = HEADER_BYTES_LIMIT
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a torch.save file under the names of its state dict, and notes.

    `ema` chooses averaged weights; `header_limit` is the largest pickle, in bytes, that is read.
    Raises MergeError for a file that is not only weights, corrupt, or lies about its sizes.
    """
    is_zip = file.read_bytes(0, min(4, file.size)) == b"PK\x03\x04"
    pickle, places = _read_zip(file, header_limit) if is_zip else _read_legacy(file, header_limit)
    tensors, notes = unwrap(pickle.root, ema=ema, where=str(file))
    if not is_zip:
        notes.insert(0, "read from torch's old format (not zip)")
    stored = {name: _place(name, tensor, file, places) for name, tensor in tensors.items()}
    return stored, notes


def _place(name: str, tensor: PickledTensor, file: InputFile, places: dict[str, int]) -> Stored:
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise MergeError(f"{file}: the tensor name {name!r} is no valid text")
    if math.prod(tensor.shape) * tensor.dtype.itemsize > tensor.storage.nbytes:
        raise MergeError(
            f"{file}: '{name}' is an expanded view, {list(tensor.shape)} over a storage of "
            f"{tensor.storage.nbytes} bytes; save it as {name}.contiguous()"
        )
    offset = places[tensor.storage.key] + tensor.offset * tensor.dtype.itemsize
    contiguous, step = True, 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        contiguous &= size == 1 or stride == step
        step *= size
    stride = None if contiguous or 0 in tensor.shape else tensor.stride
    return Stored(file, offset, tensor.shape, tensor.dtype, stride)


def _read_zip(file: InputFile, header_limit: int) -> tuple[Pickle, dict[str, int]]:
    """The pickle of a zip file, and the byte where each of its storages begins."""
    records = _zip_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise MergeError(
            f"{file}: is a zip file without a torch checkpoint in it (no <name>/data.pkl); give a "
            "file of torch.save"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in records:
        order = _record(file, records[f"{root}byteorder"], 16)
        if order != b"little":
            raise MergeError(
                f"{file}: its byte order is {order.decode('ascii', 'replace')!r}, only 'little' is "
                "read; load and save it again on this machine"
            )
    pickle = read_pickle(io.BytesIO(_record(file, records[pickles[0]], header_limit)), str(file))
    places = {}
    for key, storage in pickle.storages.items():
        if f"{root}data/{key}" not in records:
            raise MergeError(
                f"{file}: has no record for storage {key!r}; the file is corrupt: get or write it "
                "again"
            )
        places[key], size = records[f"{root}data/{key}"]
        if size != storage.nbytes:
            raise MergeError(
                f"{file}: claims {storage.nbytes} bytes for storage {key!r}, its record has "
                f"{size}; the file is corrupt: get or write it again"
            )
    return pickle, places


def _record(file: InputFile, place: tuple[int, int], limit: int) -> bytes:
    offset, size = place
    if size > limit:
        raise MergeError(f"{file}: a record to be read whole has {size} bytes, limit {limit}")
    return bytes(file.read_bytes(offset, size))


def _zip_records(file: InputFile) -> dict[str, tuple[int, int]]:
    """The offset and size of the bytes of each record, stored as they are and not overlapping."""
    try:
        with file.buffered(file.size) as stream, zipfile.ZipFile(stream) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise MergeError(
            f"{file}: is a truncated or corrupt zip file ({error}); get or write it again"
        ) from error
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise MergeError(
            f"{file}: is a TorchScript archive, wanted weights only. Convert it once:\n"
            "    model = torch.jit.load(path)  # runs the file's code: only if you trust it\n"
            "    torch.save(model.state_dict(), new_path)"
        )
    records: dict[str, tuple[int, int]] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, start = info.filename, info.header_offset
        wrong = None
        if name in records:
            wrong = "appears twice"
        elif info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            wrong = "is compressed or encrypted; torch.save stores records as they are"
        elif info.compress_size != info.file_size:
            wrong = "has two sizes"
        elif start < free or start + LOCAL_HEADER.size > directory:
            wrong = "lies outside the file or over another record"
        else:
            head = file.read_bytes(start, LOCAL_HEADER.size)
            signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(head)
            offset = start + LOCAL_HEADER.size + name_length + extra_length
            free = offset + info.file_size
            if signature != b"PK\x03\x04" or free > directory:
                wrong = "lies outside the file"
            records[name] = (offset, info.file_size)
        if wrong:
            raise MergeError(f"{file}: record {name!r} {wrong}; get or write the file again")
    return records


def _read_legacy(file: InputFile, header_limit: int) -> tuple[Pickle, dict[str, int]]:
    """The main pickle of a file from before torch 1.6, and the byte where each storage begins.

    Five pickles in a row (magic, protocol, system, object, storage keys), then the storages, each
    as a count of elements and its bytes.
    """
    where = str(file)
    with file.buffered(header_limit) as stream:
        magic = read_pickle(stream, where).root
        if magic != LEGACY_MAGIC:
            raise MergeError(
                f"{file}: is a pickle, but not one that torch.save wrote; save the weights with "
                "torch.save(model.state_dict(), path)"
            )
        protocol = read_pickle(stream, where).root
        system: Any = read_pickle(stream, where).root
        little = isinstance(system, dict) and system.get("little_endian") is True
        if protocol != LEGACY_PROTOCOL or not little:
            raise MergeError(
                f"{file}: is of another version of torch's old format, or big endian; load and "
                "save it again with a current torch"
            )
        pickle = read_pickle(stream, where)
        keys = read_pickle(stream, where).root
        position = stream.tell()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(pickle.storages)
    ):
        raise MergeError(
            f"{file}: its list of storages does not match its tensors; the file is corrupt: get or "
            "write it again"
        )
    places = {}
    for key in keys:
        storage = pickle.storages[key]
        if position + 8 + storage.nbytes > file.size:
            raise MergeError(
                f"{file}: is truncated: storage {key!r} should end at byte "
                f"{position + 8 + storage.nbytes}, the file has {file.size}; get or write it again"
            )
        (numel,) = struct.unpack("<q", file.read_bytes(position, 8))
        if numel != storage.numel:
            raise MergeError(
                f"{file}: claims {storage.numel} elements for storage {key!r}, its data has "
                f"{numel}; the file is corrupt: get or write it again"
            )
        places[key] = position + 8
        position += 8 + storage.nbytes
    return pickle, places
