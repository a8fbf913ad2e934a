"""The end of a reign."""


class Deposed(Exception):
    """This process no longer leads, or cannot be sure that it does: it must stop at once. The text says why."""
