"""What is said of a fleet's start is said in vain once nobody reads: the fleet goes on, and can be stopped."""

import os

from shoal.fleet.progress import Progress


def test_a_reader_of_standard_error_that_has_gone_is_no_error() -> None:
    """As in `shoal up 2>&1 | tee log`, of which Ctrl-C ends both: what is said of the stop stopped it."""
    reading, writing = os.pipe()
    os.close(reading)
    out = os.fdopen(writing, "w")
    progress = Progress(out)
    progress.say("shoal: stopping")
    progress.say("shoal: stopped")
    os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is buffered goes at the close
    out.close()
