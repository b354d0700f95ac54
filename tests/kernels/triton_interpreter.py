"""Makes Triton's interpreter several times faster, for tests: `import triton_interpreter` in a process with TRITON_INTERPRET=1.

The interpreter replaces the builtins of `triton.language` by its own whenever a kernel calls another compiled function, tl.sum
and tl.zeros among them, which takes a millisecond and finds them replaced already. Here that is done once and kept. What
kernels compute is not touched. Where a version of Triton does it otherwise, nothing is done.
"""

from __future__ import annotations

import types

import triton.language as tl
from triton.runtime import interpreter


def _patch_once() -> None:
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "InterpretedFunction")):
        return
    everything = types.SimpleNamespace(
        __globals__={"tl": tl, "core": tl.core}
    )  # what a kernel and tl's own functions see
    interpreter._patch_lang(everything)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


_patch_once()
