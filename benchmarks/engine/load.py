"""How much of the machine others took while a figure was measured."""

from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import psutil

BESIDE_LOAD_CORES = 0.1
"""A figure taken while others used more than this is marked."""


@dataclass(frozen=True, slots=True)
class LoadMeter:
    """Processor time of the whole machine and of what is measured, at one moment."""

    measured_pid: int
    began_s: float
    busy_s: float
    own_s: float

    @classmethod
    def start(cls, measured_pid: int) -> "LoadMeter":
        """Begin. Not others': this process, and the measured one with its descendants. Idle engines are others."""
        return cls(measured_pid, perf_counter(), _busy_s(), _own_s(measured_pid))

    def others_cores(self) -> float:
        """Return the cores that others used since, on average; stolen time of a virtual machine is others'."""
        others_s = _busy_s() - self.busy_s - (_own_s(self.measured_pid) - self.own_s)
        return max(0.0, others_s) / (perf_counter() - self.began_s)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _own_s(measured_pid: int) -> float:
    measured = psutil.Process(measured_pid)
    total_s = 0.0
    for process in {psutil.Process(), measured, *measured.children(recursive=True)}:
        # One that has just ended takes nothing any more.
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s
