"""The safetensors files of a folder, mapped: one file, or shards with an index."""

from collections.abc import Mapping, Sequence
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
SUPPORTED_DTYPES = ("F32", "F16", "BF16")
# Old files hold these; they follow from the configuration, and transformers does not read them either.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"


class SafetensorsFiles:
    """Tensors in mapped files; keeps count of those read."""

    def __init__(self, folder: Path) -> None:
        """Open a folder's files. Raises ModelFileError if one is missing, damaged or contradicts the index."""
        self.path = folder
        self._handles: dict[str, Any] = {}  # by tensor; safe_open has no types
        self._read: set[str] = set()
        if (folder / SINGLE_FILE).exists():
            handle = _open(folder / SINGLE_FILE)
            self._handles = dict.fromkeys(handle.keys(), handle)
        elif (folder / INDEX_FILE).exists():
            self._open_shards(_read_index(folder / INDEX_FILE))
        else:
            raise ModelFileError(folder, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; no other weights are read")

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def mapped(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a tensor as it lies in its file, not copied and never to be written to. Raises ModelFileError if it is
        missing, has another shape, or a type that cannot be read.
        """
        if name not in self._handles:
            raise ModelFileError(self.path, f"tensor {name!r} is missing from the {len(self._handles)} in its files")
        stored = self._handles[name].get_slice(name)
        if stored.get_shape() != [*shape]:
            raise ModelFileError(self.path, f"tensor {name!r} has shape {stored.get_shape()}; expected {[*shape]}")
        if stored.get_dtype() not in SUPPORTED_DTYPES:
            raise ModelFileError(
                self.path,
                f"tensor {name!r} is stored as {stored.get_dtype()}; {', '.join(SUPPORTED_DTYPES)} can be read",
            )
        self._read.add(name)
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def check_all_read(self) -> None:
        """Raise ModelFileError if there is a tensor that was never read: the model is not what it was taken for."""
        for name in self._handles:
            if name not in self._read and not name.endswith(_DERIVED_SUFFIX):
                raise ModelFileError(self.path, f"tensor {name!r} has no place in this architecture")

    def _open_shards(self, shard_of: Mapping[str, str]) -> None:
        for shard in sorted(set(shard_of.values())):
            handle = _open(self.path / shard)
            held = set(handle.keys())
            promised = {name for name, of in shard_of.items() if of == shard}
            for name in sorted(held ^ promised):
                where = "is missing from" if name in promised else "is in"
                raise ModelFileError(self.path / shard, f"tensor {name!r} {where} this shard, unlike {INDEX_FILE} says")
            self._handles |= dict.fromkeys(held, handle)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
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
