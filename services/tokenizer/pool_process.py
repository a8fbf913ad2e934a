"""One process of the pool: reads the model's files, then answers one frame at a time until the front is gone.

Started by the pool as `python -m services.tokenizer.pool_process <socket's file descriptor> <model's path>`.
"""

import signal
import socket
import sys
from pathlib import Path
from typing import BinaryIO

from services.common.log import described
from services.common.model.errors import ModelFileError
from services.common.model.stored_model import read_stored_model
from services.tokenizer.encoding import InputError, TextCodec
from services.tokenizer.frames import HEADER, Answer, Operation, frame


def main(arguments: list[str]) -> None:
    """Serve the front at the other end of the socket. Exits with status 1 if the model cannot be used."""
    # The front decides when the pool ends: a signal to the whole process group must not cut off its last answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor, model_path = arguments
    try:
        codec = TextCodec(read_stored_model(Path(model_path)))
    except ModelFileError as error:
        # The socket stays open until the message is out: the front kills a process that hangs up.
        sys.exit(f"tokenizer: {error}")
    with socket.socket(fileno=int(descriptor)) as link, link.makefile("rb") as requests:
        link.sendall(frame(Answer.READY, b""))
        _serve(link, requests, codec)


def _serve(link: socket.socket, requests: BinaryIO, codec: TextCodec) -> None:
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        num_bytes, code = HEADER.unpack(header)
        payload = requests.read(num_bytes)
        if len(payload) < num_bytes:
            return
        try:
            link.sendall(_answer(codec, Operation(code), payload))
        except (BrokenPipeError, ConnectionResetError):
            return


def _answer(codec: TextCodec, operation: Operation, payload: bytes) -> bytes:
    try:
        return frame(Answer.DONE, _compute(codec, operation, payload))
    except InputError as error:
        return frame(Answer.REFUSED, f"{error.field}\n{error.problem}".encode(errors="replace"))
    except Exception as error:  # noqa: BLE001 - the boundary: the front answers INTERNAL and logs it
        return frame(Answer.FAILED, described(error, with_text=False).encode(errors="replace"))


def _compute(codec: TextCodec, operation: Operation, payload: bytes) -> bytes:
    match operation:
        case Operation.ENCODE:
            return codec.encode(payload)
        case Operation.DECODE:
            return codec.decode(payload)
        case Operation.SPELL:
            return codec.spell(payload)
        case Operation.CHECK_FORMAT:
            return codec.check_format(payload)


if __name__ == "__main__":
    main(sys.argv[1:])
