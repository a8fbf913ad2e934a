"""Why a fleet cannot be started, found or stopped; the text says what to do."""


class FleetError(Exception):
    """For a person to read: it is printed without a traceback."""
