"""A program as an ``ExportedProgram``, which every toolchain takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath.graph.aten import CONVOLUTION_BACKWARD, METADATA
from fxpath.graph.convolution import convolution_backward
from fxpath.modes import TRACING
from fxpath.private import OpOverload


def exported(
    derived: fx.GraphModule, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> ExportedProgram:
    """Export a derived graph, with the model's tensors as buffers.

    Args:
        derived: the graph.
        names: of the model's tensors, by placeholder.
        tensors: the model's tensors, by placeholder.
    """
    read = [str(n.target) for n in derived.graph.nodes if n.op == "placeholder" and n.users]
    held = {names[key]: tensors[key].detach() for key in read}
    with TRACING:
        found = torch.export.export(_Holder(derived, names, held), (), strict=False)
        table = torch.export.default_decompositions()
        table[CONVOLUTION_BACKWARD] = convolution_backward
        plain = found.run_decompositions(table)
    for node in list(plain.graph.nodes):
        if node.target is METADATA:
            plain.graph.erase_node(node)  # what .to() says that it takes for granted
        elif node.op == "call_function":
            target = node.target
            known = isinstance(target, OpOverload) and target.namespace == "aten"
            assert known, f"{target} is no operator of ATen"
    plain.graph_module.recompile()
    return plain


class _Holder(nn.Module):
    """A derived graph as a module that holds the model's tensors under their own names."""

    def __init__(
        self, derived: fx.GraphModule, names: Mapping[str, str], held: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        for name, tensor in held.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, tensor)
        # What is not to be exchanged belongs to no state.
        for name, constant in list(derived.named_buffers()):
            derived.register_buffer(name, constant, persistent=False)
        own = "steps"
        while hasattr(self, own):
            own += "_"
        self.add_module(own, derived)
        self._own, self._order = (
            own,
            [
                names[str(n.target)] if n.users else None
                for n in derived.graph.nodes
                if n.op == "placeholder"
            ],
        )

    def forward(self) -> dict[str, Any]:
        """All that the graph computes."""
        values = [None if name is None else self.get_buffer(name) for name in self._order]
        found: dict[str, Any] = self.get_submodule(self._own)(*values)
        # These are looked at by those who can compute again in float64.
        return {key: found[key] for key in found if key not in ("lows", "highs")}
