"""The fleet's own speed, without a model: `make bench-gateway`, or `python -m benchmarks.gateway --figures paced`.

A real gateway, tokenizer, scheduler, worker front, engine process and Redis; only the engine's steps are timed pauses.
"""

import argparse
import sys

from benchmarks.gateway.figures import FIGURES


def main() -> int:
    """Measure and print; return 1 if a figure is out of its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", default=",".join(FIGURES), metavar="A,B", help=", ".join(FIGURES))
    names = parser.parse_args().figures.split(",")
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(FIGURES)}")
    all_met = True
    for name in names:
        for figure in FIGURES[name]():
            bound = f"{'>=' if figure.at_least else '<='} {figure.bound:g}"
            verdict = "" if figure.met else "  NOT MET"
            value = f"{figure.value:,.{0 if figure.value >= 100 else 2}f} {figure.unit}"
            print(f"{figure.name:48} {value:>12}  (asked {bound}) {figure.note}{verdict}", flush=True)
            all_met &= figure.met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
