"""A model's shape alone is enough for a fleet with random weights: its tokenizer is made up."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.common.model.folder import read_folder
from services.common.text.folder_vocabulary import read_folder_vocabulary
from services.tokenizer.folder_tokenizer import read_folder_tokenizer
from shoal.fleet.dummy_model import with_tokenizer
from shoal.fleet.errors import FleetError

VOCABULARY = 1200


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_each_token_has_a_text_of_its_own(shape: Path, tmp_path: Path) -> None:
    made = with_tokenizer(shape, tmp_path / "made")
    token_bytes = read_folder_vocabulary(read_folder(made)).token_bytes
    assert len(set(token_bytes)) == len(token_bytes) == VOCABULARY
    assert all(token_bytes)


def test_any_text_is_encoded_and_comes_back(shape: Path, tmp_path: Path) -> None:
    folder = read_folder(with_tokenizer(shape, tmp_path / "made"))
    tokenizer = read_folder_tokenizer(folder, lambda: datetime.now(UTC))
    token_ids = tokenizer.tokenizer.encode("The 日本 sea").ids
    token_bytes = read_folder_vocabulary(folder).token_bytes
    assert b"".join(token_bytes[token_id] for token_id in token_ids).decode() == "The 日本 sea"


def test_a_models_own_tokenizer_is_taken(shape: Path, tmp_path: Path) -> None:
    (shape / "tokenizer.json").write_text("{}")
    assert with_tokenizer(shape, tmp_path / "made") == shape


def test_a_file_has_no_shape_to_take(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"model\.gguf is a file"):
        with_tokenizer(tmp_path / "model.gguf", tmp_path / "made")
