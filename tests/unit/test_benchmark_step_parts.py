"""A step is taken apart at the seams that the code has today."""

from benchmarks.engine.step_parts import SEAMS, PartTimer, timers


def test_every_seam_of_a_step_is_where_the_table_says() -> None:
    with timers(PartTimer(), SEAMS):
        pass


def test_an_open_seam_leaves_their_time_to_those_inside_and_a_closed_one_does_not() -> None:
    timer = PartTimer()
    seam = {name: next(seam for seam in SEAMS if seam.part == name) for name in ("logits", "sampling", "runner's rest")}
    sampling = timer.around(seam["sampling"], lambda: None)
    logits = timer.around(seam["logits"], sampling)
    timer.around(seam["runner's rest"], logits)()
    assert timer.parts_s.keys() == {"logits", "runner's rest"}
    timer.around(seam["runner's rest"], sampling)()
    assert timer.parts_s.keys() == {"logits", "runner's rest", "sampling"}
