"""A model's file is read fast, and whatever is wrong with it is named: never a crash, never a silent misreading."""

import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.model import location
from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile, read_gguf
from services.common.model.location import default_model_path
from tests.unit.gguf_files import ARRAY, BOOL, F32, I32, STRING, U32, U64, Value, gguf_bytes

METADATA: dict[str, Value] = {
    "name": (STRING, "tiny"),
    "number": (U32, 7),
    "big": (U64, 1 << 40),
    "scale": (F32, 0.5),
    "flag": (BOOL, 1),
    "numbers": (ARRAY, (I32, [1, -2, 3])),
    "texts": (ARRAY, (STRING, ["a", "", "ü"])),
}
TENSORS = {"first": ((4, 2), 0, bytes(32)), "second": ((32, 3), 3, bytes(range(60)))}
SMALL = gguf_bytes(METADATA, TENSORS)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "file.gguf"


def read_bytes(path: Path, raw: bytes) -> GgufFile:
    path.write_bytes(raw)
    return read_gguf(path)


def problem_of(path: Path, raw: bytes) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_bytes(path, raw)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value.problem


def test_metadata_of_every_kind_are_read(scratch: Path) -> None:
    file = read_bytes(scratch, SMALL)
    assert file.metadata == {
        "name": "tiny",
        "number": 7,
        "big": 1 << 40,
        "scale": 0.5,
        "flag": True,
        "numbers": (1, -2, 3),
        "texts": ("a", "", "ü"),
    }


def test_tensors_are_where_the_file_says(scratch: Path) -> None:
    file = read_bytes(scratch, SMALL)
    first, second = file.tensor("first"), file.tensor("second")
    assert (first.shape, first.ggml_type, first.num_bytes) == ((4, 2), 0, 32)
    assert (second.shape, second.ggml_type, second.num_bytes) == ((32, 3), 3, 60)
    assert SMALL[second.offset : second.offset + second.num_bytes] == bytes(range(60))


def test_the_default_model_is_found_and_read_quickly() -> None:
    started_s = time.perf_counter()
    file = read_gguf(default_model_path())
    elapsed_s = time.perf_counter() - started_s
    assert file.require("general.architecture", str) == "llama"
    assert len(file.require_tuple("tokenizer.ggml.tokens", str)) == 49152
    assert len(file.tensors) == 272
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    assert last.offset + last.num_bytes <= file.path.stat().st_size
    assert elapsed_s < 1  # about 0.05 s where nothing else runs


def test_an_absent_package_of_the_default_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "DEFAULT_MODEL_PACKAGE", "no_such_package_of_models")
    with pytest.raises(ModelFileError, match="pip install"):
        default_model_path()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "4 bytes are missing in the version"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "number of metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "number of tensors"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + bytes(40),
            "bytes are missing in the key",
        ),
    ],
)
def test_a_foreign_or_damaged_beginning_is_named(scratch: Path, raw: bytes, named: str) -> None:
    assert named in problem_of(scratch, raw)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"odd": (ARRAY, (13, []))}, "unknown value type 13"),
        ({"general.alignment": (U32, 0)}, "power of two"),
        ({"general.alignment": (STRING, "32")}, "power of two"),
        ({"flag": (BOOL, 2)}, "true or false"),
    ],
)
def test_an_impossible_value_is_named(scratch: Path, metadata: dict[str, Value], named: str) -> None:
    assert named in problem_of(scratch, gguf_bytes(metadata, {}))


def test_an_array_longer_than_the_file_is_refused_without_memory_for_it(scratch: Path) -> None:
    raw = gguf_bytes({"numbers": (ARRAY, (I32, [1, 2, 3, 4, 5]))}, {})
    assert "'numbers' is given as" in problem_of(scratch, raw.replace(struct.pack("<Q", 5), struct.pack("<Q", 1 << 50)))


def test_text_that_is_not_utf8_is_named(scratch: Path) -> None:
    raw = gguf_bytes({"texts": (ARRAY, (STRING, ["good", "bad!", "good"]))}, {}).replace(b"bad!", b"b\xffd!")
    assert "'texts', element 1 is not UTF-8" in problem_of(scratch, raw)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"w": ((4,), 99, b"")}, "ggml type 99"),
        ({"w": ((33,), 3, bytes(40))}, "rows of 33 values"),
        ({"w": ((1, 1, 1, 1, 1), 0, bytes(4))}, "5 dimensions"),
        ({"w": ((1 << 40, 1 << 40), 0, bytes(4))}, "bytes are missing: tensor 'w'"),
        ({"a": ((16,), 0, bytes(4)), "b": ((8,), 0, bytes(64))}, "'a' and 'b' overlap"),
    ],
)
def test_an_impossible_tensor_is_named(
    scratch: Path, tensors: dict[str, tuple[tuple[int, ...], int, bytes]], named: str
) -> None:
    assert named in problem_of(scratch, gguf_bytes({}, tensors))


def test_a_file_cut_in_its_data_says_which_tensor_lacks_how_many_bytes(scratch: Path) -> None:
    cut = SMALL[: read_bytes(scratch, SMALL).tensor("second").offset + 50]
    assert "10 bytes are missing: tensor 'second'" in problem_of(scratch, cut)


def test_a_file_cut_anywhere_is_refused(scratch: Path) -> None:
    end_of_data = read_bytes(scratch, SMALL).tensor("second").offset + 60
    for num_bytes in range(end_of_data):
        problem_of(scratch, SMALL[:num_bytes])


@pytest.mark.parametrize("num_bytes", [3, 23, 100, 40_000, 1_000_000, 1_785_663, 1_785_664, 50_000_000])
def test_the_default_model_cut_short_is_refused(scratch: Path, num_bytes: int) -> None:
    with default_model_path().open("rb") as file:
        problem = problem_of(scratch, file.read(num_bytes))
    assert "missing" in problem or "not a GGUF file" in problem or "cut short" in problem


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(SMALL) * 8 - 1))
def test_a_flipped_bit_gives_a_clear_error_or_another_value(scratch: Path, bit: int) -> None:
    raw = bytearray(SMALL)
    raw[bit // 8] ^= 1 << bit % 8
    try:
        file = read_bytes(scratch, bytes(raw))
    except ModelFileError:
        return
    for tensor in file.tensors.values():
        assert 0 < tensor.offset <= tensor.offset + tensor.num_bytes <= len(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_after_a_right_beginning_is_never_another_exception(scratch: Path, noise: bytes) -> None:
    try:
        read_bytes(scratch, b"GGUF\x03\x00\x00\x00" + noise)
    except ModelFileError:
        return


def test_a_missing_key_or_tensor_is_named(scratch: Path) -> None:
    file = read_bytes(scratch, SMALL)
    with pytest.raises(ModelFileError, match="'block_count' is missing"):
        file.require("block_count", int)
    with pytest.raises(ModelFileError, match="'name' should be of type int, but is a str"):
        file.require("name", int)
    with pytest.raises(ModelFileError, match="'flag' should be of type int, but is a bool"):
        file.require("flag", int)
    with pytest.raises(ModelFileError, match="element 0 is a int"):
        file.require_tuple("numbers", str)
    with pytest.raises(ModelFileError, match="tensor 'third' is missing"):
        file.tensor("third")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_gguf(tmp_path)
