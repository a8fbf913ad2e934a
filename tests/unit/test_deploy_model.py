"""The tokenizer's image holds a copy of the model without weights: to a tokenizer it is the same model."""

from pathlib import Path

import pytest

from deploy.vocabulary_file import write_vocabulary
from gen.shoal.fleet.v1 import tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.tokenizer.encoding import TextCodec
from services.tokenizer.server import describe_model


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "vocabulary.gguf"
    write_vocabulary(default_model_path(), path)
    return path


def test_the_copy_says_the_same_of_the_model_in_a_fortieth_of_its_bytes(copy: Path) -> None:
    model = default_model_path()
    assert read_gguf(copy).metadata == read_gguf(model).metadata
    assert describe_model(read_gguf(copy), "m") == describe_model(read_gguf(model), "m")
    assert copy.stat().st_size * 40 < model.stat().st_size


def test_a_tokenizer_encodes_the_same_by_the_copy(copy: Path) -> None:
    text = "Name three oceans. 東京 🙂\n\t<|im_end|>"
    question = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=text)])
    for request in (tokenizer_pb2.EncodeRequest(prompt=text), tokenizer_pb2.EncodeRequest(chat=question)):
        by_copy, by_model = (
            TextCodec(read_gguf(path)).encode(request.SerializeToString()) for path in (copy, default_model_path())
        )
        assert by_copy == by_model
