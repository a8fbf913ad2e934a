"""Which forms of answers can be kept: asked of the tokenizers once, and remembered."""

import hashlib
from collections import OrderedDict

from gen.shoal.inference.v1 import inference_pb2
from services.gateway.tokenizer_client import TokenizerClient

MAX_REMEMBERED = 1_024


class AcceptedFormats:
    """Forms that a tokenizer has accepted, by their digest, the last used at the end. Refused ones are asked again."""

    def __init__(self, tokenizer: TokenizerClient) -> None:
        self._tokenizer = tokenizer
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, form: inference_pb2.ResponseFormat, within_s: float | None) -> None:
        """Raise InvalidRequest if no answer of this form can be generated, and whatever the tokenizers raise."""
        if form.WhichOneof("format") == "json_object":
            return
        digest = hashlib.sha256(form.SerializeToString(deterministic=True)).digest()
        if digest not in self._accepted:
            await self._tokenizer.check_format(form, within_s)
            self._accepted[digest] = None
            if len(self._accepted) > MAX_REMEMBERED:
                self._accepted.popitem(last=False)
        self._accepted.move_to_end(digest)
