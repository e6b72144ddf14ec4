"""What ``torch.compile(model, backend="fxpath")`` finds: outside of the package, as it is light.

Torch loads this module where the name is looked up, and the package when it compiles the first
graph.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

__all__ = ["fxpath"]


class _Backend:
    """A backend as torch calls it; see ``fxpath.toolchain.backend``."""

    __name__ = "fxpath"

    def __call__(
        self, graph_module: fx.GraphModule, example_inputs: list[Any], *, options: Any = None
    ) -> Any:
        """Analyses one captured graph and hands it on to the inner backend."""
        from fxpath.toolchain.backend import compile_part

        return compile_part(graph_module, example_inputs, options)

    def reset(self) -> None:
        """What ``torch._dynamo.reset()`` calls: reports begin anew."""
        backend = sys.modules.get("fxpath.toolchain.backend")
        if backend is not None:
            backend.forget()


fxpath = _Backend()
