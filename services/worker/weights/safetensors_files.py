"""The safetensors files of a folder, mapped: one file, or shards with an index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.common.model.json_file import read_json_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Known ones stay below 200 KB.
MAX_INDEX_BYTES = 16 << 20
FLOATS = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"
"""Types of tensors, by their names in a file."""
# Old files hold these; they follow from the configuration, and transformers does not read them either.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    handle: Any
    """Of safe_open, which has no types."""


class SafetensorsFiles:
    """Tensors in mapped files; keeps count of those read."""

    def __init__(self, folder: Path) -> None:
        """Open a folder's files. Raises ModelFileError if one is missing, damaged or contradicts the index."""
        self.path = folder
        self._file_of: dict[str, _File] = {}
        self._read: set[str] = set()
        if (folder / SINGLE_FILE).exists():
            file = _open(folder / SINGLE_FILE)
            self._file_of = dict.fromkeys(file.handle.keys(), file)
        elif (folder / INDEX_FILE).exists():
            self._open_shards(_read_index(folder / INDEX_FILE))
        else:
            raise ModelFileError(folder, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; no other weights are read")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def path_of(self, name: str) -> Path:
        """Return the file that a tensor is in. Raises ModelFileError if it is in none."""
        return self._file(name).path

    def mapped(self, name: str, *shapes: Sequence[int], types: Sequence[str] = FLOATS) -> Tensor:
        """Return a tensor as it lies in its file, not copied and never to be written to. Raises ModelFileError if it is
        missing, has none of the shapes, or none of the types.
        """
        file = self._file(name)
        stored = file.handle.get_slice(name)
        if stored.get_shape() not in [[*shape] for shape in shapes]:
            expected = " or ".join(str([*shape]) for shape in shapes)
            raise ModelFileError(file.path, f"tensor {name!r} has shape {stored.get_shape()}; expected {expected}")
        if stored.get_dtype() not in types:
            raise ModelFileError(
                file.path, f"tensor {name!r} is stored as {stored.get_dtype()}; {', '.join(types)} can be read"
            )
        self._read.add(name)
        tensor: Tensor = file.handle.get_tensor(name)
        return tensor

    def check_all_read(self, unused_suffixes: Sequence[str] = ()) -> None:
        """Raise ModelFileError if there is a tensor that was never read: the model is not what it was taken for.

        `unused_suffixes`: of tensors' names that may be there all the same.
        """
        for name, file in self._file_of.items():
            if name not in self._read and not name.endswith((_DERIVED_SUFFIX, *unused_suffixes)):
                raise ModelFileError(file.path, f"tensor {name!r} has no place in this architecture")

    def _file(self, name: str) -> _File:
        if name not in self._file_of:
            raise ModelFileError(self.path, f"tensor {name!r} is missing from the {len(self._file_of)} in its files")
        return self._file_of[name]

    def _open_shards(self, shard_of: Mapping[str, str]) -> None:
        for shard in sorted(set(shard_of.values())):
            file = _open(self.path / shard)
            held = set(file.handle.keys())
            promised = {name for name, of in shard_of.items() if of == shard}
            for name in sorted(held ^ promised):
                where = "is missing from" if name in promised else "is in"
                raise ModelFileError(file.path, f"tensor {name!r} {where} this shard, unlike {INDEX_FILE} says")
            self._file_of |= dict.fromkeys(held, file)


def _open(path: Path) -> _File:
    try:
        return _File(path, safe_open(path, framework="pt"))
    except FileNotFoundError as error:
        raise ModelFileError(path, f"is missing, though {INDEX_FILE} names it") from error
    except (OSError, SafetensorError) as error:
        raise ModelFileError(path, f"cannot be read as safetensors; it is cut short or damaged: {error}") from error


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor. Shards lie beside the index: a name that leads elsewhere is refused."""
    shard_of = read_json_file(path, MAX_INDEX_BYTES).require("weight_map", dict)
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelFileError(
                path, f"the shard of tensor {name!r} is {shard!r}; expected the name of a file beside it"
            )
    return shard_of
