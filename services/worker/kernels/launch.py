"""How a kernel overlaps with the one in front of it: programmatic dependent launch (Hopper).

A kernel that is launched so may begin before the one in front has ended; what that one writes may be read only
behind `after_previous`. Each kernel that is launched so must call it, also where it has nothing to do: the next one
relies on it for all that came before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def prefetch(places):
    """Ask for the cache lines of places, to have them nearer later. Past the end of a tensor is no error."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [places.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Let the next kernel begin, and wait until the one in front has written all it writes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
