"""Flags that say how a GPU holds a model: of `shoal up`, and of the benchmarks of an engine alone."""

import argparse


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them; the engine's own defaults hold for those that are not given."""
    parser.add_argument("--dtype", choices=("float32", "bf16", "fp8"), help="how a GPU holds weights (bf16)")
    parser.add_argument(
        "--kv-dtype", choices=("auto", "fp8"), help="how a GPU holds keys and values (auto: as what is computed)"
    )
    parser.add_argument("--dummy", action="store_true", help="random weights of the folder's shape on a GPU")
