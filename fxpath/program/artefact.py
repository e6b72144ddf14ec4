"""A program as an ``ExportedProgram``, which every toolchain takes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath.certificate import FIXED, STEPS
from fxpath.graph.aten import CONVOLUTION_BACKWARD, INDEX_ADD, METADATA
from fxpath.graph.convolution import convolution_backward
from fxpath.modes import TRACING
from fxpath.private import OpOverload


def exported(
    derived: fx.GraphModule,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    baked: Iterable[str],
) -> ExportedProgram:
    """Export a derived graph, with the model's tensors as buffers.

    Args:
        derived: the graph.
        names: of the model's tensors, by placeholder.
        tensors: the model's tensors, by placeholder.
        baked: names of those whose numbers the graph was made for: others in their place would be
            read by some of its operations alone, so they stay as they are.
    """
    read = [str(n.target) for n in derived.graph.nodes if n.op == "placeholder" and n.users]
    held = {names[key]: tensors[key].detach() for key in read}
    with TRACING:
        found = torch.export.export(
            _Holder(derived, names, held, frozenset(baked)), (), strict=False
        )
        table = torch.export.default_decompositions()
        table[CONVOLUTION_BACKWARD] = convolution_backward
        table[INDEX_ADD] = _index_add
        plain = found.run_decompositions(table)
    for node in list(plain.graph.nodes):
        if node.target is METADATA:
            plain.graph.erase_node(node)  # what .to() says that it takes for granted
        elif node.op == "call_function":
            target = node.target
            # The results of an operation that has several, as torch.export takes them apart.
            item = target is operator.getitem
            known = item or (isinstance(target, OpOverload) and target.namespace == "aten")
            assert known, f"{target} is no operator of ATen"
    plain.graph_module.recompile()
    return plain


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """The same sums by ``scatter_add``, which becomes ScatterElements in ONNX.

    torch's own decomposition becomes ScatterND, by which ONNX Runtime adds in several threads at
    once, and loses terms where an index occurs twice.
    """
    shape = [1] * source.dim()
    shape[dim] = -1
    return x.scatter_add(dim, index.reshape(shape).expand_as(source), source)


class _Holder(nn.Module):
    """A derived graph as a module that holds the model's tensors under their own names."""

    def __init__(
        self,
        derived: fx.GraphModule,
        names: Mapping[str, str],
        held: Mapping[str, Tensor],
        baked: frozenset[str],
    ) -> None:
        super().__init__()
        for name, tensor in held.items():
            if name not in baked:
                _hold(self, name, tensor)
        # What is not to be exchanged belongs to no state.
        for name, constant in list(derived.named_buffers()):
            derived.register_buffer(name, constant, persistent=False)
        own = STEPS
        while hasattr(self, own):
            own += "_"
        self.add_module(own, derived)
        for name in sorted(held.keys() & baked):
            _hold(self, f"{own}.{FIXED}.{name}", held[name], persistent=False)
        # Names that Python spells differently, as the model may have any of its own.
        self.__own = own
        self.__order = [
            (f"{own}.{FIXED}.{name}" if name in baked else name) if n.users else None
            for n in derived.graph.nodes
            if n.op == "placeholder"
            for name in (names[str(n.target)],)
        ]

    def forward(self) -> dict[str, Any]:
        """All that the graph computes."""
        values = [None if name is None else self.get_buffer(name) for name in self.__order]
        found: dict[str, Any] = self.get_submodule(self.__own)(*values)
        # These are looked at by those who can compute again in float64.
        return {key: found[key] for key in found if key not in ("lows", "highs")}


def _hold(module: nn.Module, name: str, tensor: Tensor, persistent: bool = True) -> None:
    """Register a buffer under a name with dots."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(last, tensor, persistent=persistent)
