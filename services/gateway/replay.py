"""The rest of a stream whose request has ended elsewhere, out of its record: journaled tokens turned into text."""

from collections.abc import Sequence

from gen.shoal.fleet.v1 import request_pb2, tokenizer_pb2
from gen.shoal.inference.v1.inference_pb2 import TokenLogprobs
from services.common.errors import Aborted
from services.common.record.history import difference_from_end, first_difference
from services.common.record.record import Record
from services.common.record.states import RequestState
from services.gateway.endings import told_by_record
from services.gateway.streams import Stream
from services.gateway.tokenizer_client import TokenizerClient


class Replay:
    """Ends streams from records."""

    def __init__(self, tokenizer: TokenizerClient) -> None:
        self._tokenizer = tokenizer

    async def end(self, stream: Stream, record: Record) -> None:
        """Send what the client lacks of an ended request, then the end. Nothing else may deliver to the stream.

        Raises what the tokenizer raises; nothing of a choice was sent then that will be sent again.
        """
        if record.state == RequestState.FINISHED:
            differs = difference_from_end(record.journal, stream.delivered())
            if differs:
                stream.finish(diverged(*differs))
                return
        outcome = request_pb2.Outcome.FromString(record.outcome)
        payload = request_pb2.RequestPayload.FromString(record.payload)
        for choice, held in enumerate(stream.delivered()):
            journal = record.journal[choice]
            logprobs: Sequence[TokenLogprobs] = ()
            if payload.HasField("logprobs"):
                logprobs = outcome.logprobs[choice].tokens if choice < len(outcome.logprobs) else ()
                # A request that was cut off may have tokens that nobody told the log-probabilities of.
                journal = journal[: len(logprobs)]
            # Any other end than FINISHED may be behind, or beside, what was delivered: it is told as it is.
            if held.count < len(journal) and first_difference(journal, held) is None:
                hidden = choice < len(outcome.last_token_hidden) and outcome.last_token_hidden[choice]
                text = await self._tokenizer.decode(
                    tokenizer_pb2.DecodeRequest(
                        token_ids=journal,
                        from_index=held.count,
                        stop=payload.stop,
                        ended=record.state == RequestState.FINISHED,
                        last_token_hidden=hidden,
                    )
                )
                stream.deliver(choice, held.count, journal[held.count :], text, logprobs[held.count :])
        stream.finish(told_by_record(record))


def diverged(choice: int, index: int) -> Aborted:
    """The end of a stream whose client holds another text than the one that the request ended with."""
    return Aborted(
        f"the request has ended, and its choice {choice} differs from what this client holds at token {index}; "
        "GetRequest tells its state, Attach from index 0 reads the stored text",
        reason="DIVERGED",
    )
