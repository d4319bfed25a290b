"""Opens the arrays in files of `torch.save` without PyTorch: `pytorch_model.bin`, as one file or in shards.

Such a file is an uncompressed zip archive (PyTorch's caffe2/serialize/inline_container.h). It has `<root>/data.pkl`,
the pickle of a state dict, which `state_dict` reads; `<root>/data/<key>`, the entries of each storage; and, in newer
versions, `<root>/byteorder`.
"""

import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from prompt_tuning_jax.array_files.shards import open_shards
from prompt_tuning_jax.array_files.state_dict import Tensor, read_state_dict
from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray, first_line
from prompt_tuning_jax.array_files.strided import DTYPES, Run, strided_array
from prompt_tuning_jax.regular_files import regular

PICKLE, BYTE_ORDER = "data.pkl", "byteorder"
MOST_PICKLED = 2**21  # bytes; ten times the pickle of the largest T5
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
OLD = b"\x80"  # the first byte of a file that is a pickle, not an archive


def open_torch(folder: Path, name: str = "pytorch_model.bin") -> dict[str, StoredArray]:
    """Opens the arrays of a file of `torch.save`, or of the shards that `<name>.index.json` lists.

    Raises:
      ArrayError: there is no such file, it is truncated, or it is not a state dict of floating-point numbers.
    """
    return open_shards(folder, name, _open_file)


def _open_file(path: Path) -> dict[str, StoredArray]:
    try:
        with regular(path).open("rb") as file:
            if file.read(1) == OLD:
                raise ValueError(
                    "it is of torch.save's format before PyTorch 1.6; expected the zip format: torch.save it again"
                )
            tensors, runs = _read_archive(file)
        arrays: dict[Tensor, StoredArray] = {}
        for name, tensor in tensors.items():  # tensors with the same entries are one array, as T5's tied tables
            if tensor not in arrays:
                arrays[tensor] = _array(path, name, tensor, runs[tensor.storage.key])
        return {name: arrays[tensor] for name, tensor in tensors.items()}
    except ArrayError:
        raise
    except Exception as error:  # `zipfile` raises several types for a damaged archive
        raise ArrayError(f"{path} cannot be read ({first_line(error)})") from None


def _read_archive(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, Run]]:
    """Returns the tensors by name, and the first byte and the number of bytes of each storage by key."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        offsets = sorted(member.header_offset for member in archive.infolist())
        following = dict(zip(offsets, [*offsets[1:], archive.start_dir], strict=True))
        if len(members) < len(archive.infolist()):
            raise ValueError("two members of the archive have the same name")
        roots = [name.removesuffix(PICKLE) for name in members if name.count("/") == 1 and name.endswith(f"/{PICKLE}")]
        if len(roots) != 1:
            raise ValueError(f"expected one {PICKLE} in the archive, found {len(roots)}")
        (root,) = roots

        def read(name: str, at_most: int) -> bytes:
            member = members[root + name]
            _check_stored(member)
            if member.file_size > at_most:
                raise ValueError(f"its {name} has {member.file_size:,} bytes, expected at most {at_most:,}")
            return archive.read(member)

        if root + BYTE_ORDER in members and (order := read(BYTE_ORDER, 16)) != b"little":
            raise ValueError(f"its byte order is {order.decode('latin-1')!r}, expected 'little'")
        tensors = read_state_dict(BytesIO(read(PICKLE, MOST_PICKLED)))
        runs = {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            if storage.key not in runs:
                member = members.get(f"{root}data/{storage.key}")
                if member is None:
                    raise ValueError(f"it has no storage {storage.key!r:.60}, which {name!r:.100} is in")
                runs[storage.key] = _locate(file, member, following[member.header_offset])
    return tensors, runs


def _check_stored(member: zipfile.ZipInfo) -> None:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"{member.filename!r:.100} of the archive is compressed, which torch.save never does")
    if member.flag_bits & 1:
        raise ValueError(f"{member.filename!r:.100} of the archive is encrypted")


def _locate(file: BinaryIO, member: zipfile.ZipInfo, following: int) -> Run:
    """Returns the first byte and the number of bytes of a member of the archive.

    The member is not read, so its checksum is not verified. Instead, it must end where the next member begins, at byte
    `following`, so that a damaged header cannot shift it.
    """
    _check_stored(member)
    file.seek(member.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = member.header_offset + LOCAL_HEADER.size + name + extra
    if signature != b"PK\x03\x04" or file.read(name) != member.orig_filename.encode():
        raise ValueError(f"{member.filename!r:.100} of the archive is not where its directory says")
    file.seek(start + member.file_size)
    after = file.read(max(0, min(following - file.tell(), 24)))  # no data descriptor is longer
    if file.tell() != following or after not in _descriptors(member):
        raise ValueError(f"{member.filename!r:.100} of the archive does not end where its directory says")
    return Run(start, member.file_size)


def _descriptors(member: zipfile.ZipInfo) -> list[bytes]:
    """Returns the bytes that may follow a member: its data descriptor (checksum and sizes) if flag bit 3 is set."""
    if not member.flag_bits & 8:
        return [b""]
    sizes = ("<4sIQQ", "<4sIII") if member.file_size < 2**32 else ("<4sIQQ",)
    return [struct.pack(kind, b"PK\x07\x08", member.CRC, member.file_size, member.file_size) for kind in sizes]


def _array(path: Path, name: str, tensor: Tensor, run: Run) -> StoredArray:
    storage, dtype = tensor.storage, DTYPES.get(tensor.storage.dtype)
    if dtype is None:
        raise ArrayError(f"{name} of {path} is {storage.dtype}, expected {', '.join(DTYPES)}")
    if storage.count * dtype.itemsize != run.count:
        raise ArrayError(
            f"{name} of {path} cannot be read (its storage {storage.key!r:.60} has {run.count:,} bytes, "
            f"not {storage.count:,} of {dtype})"
        )
    entries = 1
    for size in tensor.shape:
        entries *= size
    last = tensor.first + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    if entries and (last >= storage.count or entries > storage.count):
        raise ArrayError(
            f"{name} of {path} cannot be read (it is {list(tensor.shape)}, and its storage {storage.key!r:.60} too "
            f"short with {storage.count:,} entries)"
        )
    entries_of_storage = Run(run.start, storage.count)
    return strided_array(path, name, dtype, tensor.shape, [entries_of_storage], tensor.strides, tensor.first)
