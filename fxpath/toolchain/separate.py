"""A captured graph becomes a module of its own, which fxpath reads: the graph stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, fx, nn

from fxpath.errors import source_line
from fxpath.toolchain.dynamo import (
    CHECKPOINT,
    Names,
    dynamic_axes,
    has_values,
    is_input,
    is_length,
    is_written,
    number,
)

#: Names that a call of a module keeps for itself.
_TAKEN = ("self", "args", "kwargs")


@dataclass(frozen=True)
class Separate:
    """A captured graph as a module.

    Attributes:
        module: holds the model's own tensors under their names; called with ``inputs`` by name.
        inputs: zeros in the form of the example inputs.
        dynamic: input name -> axes whose length may change.
        numbers: numbers that may change, with the values that were taken.
        outputs: how many outputs of floating point there are, inputs that are written into among
            them.
        source_line: where the first operation stands in the user's code.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, tuple[int, ...]]
    numbers: dict[str, float]
    outputs: int
    source_line: str


class _Module(nn.Module):
    """Runs a graph with tensors that it holds under the user's names, and with inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        # Names that Python spells differently, as the model may have any of its own.
        #: For each placeholder the tensor's path, or the input's name.
        self.__order: list[tuple[str, bool]] = []
        self.__graph = "graph"

    def hold(self, name: str, tensor: Tensor) -> None:
        """The next placeholder is a tensor of the model."""
        *path, last = name.split(".")
        owner: nn.Module = self
        for i, part in enumerate(path):
            if part in owner._modules:
                owner = owner.get_submodule(part)
            elif hasattr(owner, part):
                path[i:], last = [], "_".join([*path[i:], last])
                break
            else:
                inner = nn.Module()
                owner.add_module(part, inner)
                owner = inner
        while hasattr(owner, last):
            last += "_"
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
        self.__order.append((".".join([*path, last]), True))

    def take(self, name: str) -> None:
        """The next placeholder is an input."""
        self.__order.append((name, False))

    def adopt(self, graph_module: fx.GraphModule) -> None:
        """The graph itself, once all placeholders are known."""
        while hasattr(self, self.__graph):
            self.__graph += "_"
        self.add_module(self.__graph, graph_module)

    def forward(self, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of floating point, and the inputs that the graph writes into."""
        values = [_at(self, name) if held else inputs[name] for name, held in self.__order]
        # Where an operation stands in the user's code goes from node to node.
        with fx.traceback.preserve_node_meta():
            graph: Any = self.get_submodule(self.__graph)
            results: tuple[Tensor, ...] = fx.Interpreter(graph).run(*values)
        return results


def separate(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Separate:
    """A copy of a captured graph that shares the model's tensors, as in evaluation mode.

    Raises:
        ValueError: for an input that is neither a tensor nor a number, or has no value yet.
    """
    separation = _Separation(graph_module)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, example_inputs, strict=True):
        separation.take(node, example)
    return separation.finish()


class _Separation:
    """A graph on its way to be a module."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.source = graph_module
        self.names, self.module, self.graph = Names(), _Module(), fx.Graph()
        #: What became of each node: a node of the copy, or a number.
        self.env: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, str] = {}
        self.zeros: dict[str, Tensor] = {}

    def take(self, node: fx.Node, example: object) -> None:
        """A placeholder: a number, a tensor of the model or an input."""
        value = number(node, example)
        if value is not None:
            self.env[node] = value
            return
        if not isinstance(example, Tensor):
            raise ValueError(f"its input {self.names.input(node)} is a {type(example).__name__}")
        self.env[node] = self.graph.placeholder(node.name)
        if isinstance(example, nn.Parameter) or not is_input(node):
            name = self.names.tensor(node, example)
            if not has_values(example):
                raise ValueError(f"{name} has no values while the part is compiled")
            self.module.hold(name, example)
            return
        name = self.names.input(node)
        while name in self.zeros or name in _TAKEN:
            name += "_"
        self.module.take(name)
        self.inputs[node], self.zeros[name] = name, _zeros(example)

    def finish(self) -> Separate:
        """The module, once all placeholders are known."""
        results = self._body(self.source, "")
        # What is written into stands in no output: the caller has it already.
        written = [node for node in self.inputs if is_written(node)]
        outputs = [node for node in dict.fromkeys([*results, *written]) if _is_float(node)]
        self.graph.output(tuple(self.env[node] for node in outputs))
        self.module.adopt(fx.GraphModule(self.source, self.graph))
        lines = [source_line(node) for node in self.graph.nodes if node.op.startswith("call")]
        return Separate(
            self.module,
            self.zeros,
            {name: dynamic_axes(x) for x, name in self.inputs.items() if dynamic_axes(x)},
            {
                self.names.number(node): value
                for node, value in self.env.items()
                if node.op == "placeholder" and isinstance(value, int | float)
                if not is_length(node)
            },
            len(outputs),
            next((line for line in lines if line != "unknown"), "unknown"),
        )

    def _body(self, source: fx.GraphModule, prefix: str) -> list[Any]:
        """Copy the operations of a graph whose placeholders are known, and return its outputs."""
        *nodes, output = source.graph.nodes
        for node in nodes:
            if node.op == "get_attr":
                self.env[node] = self.graph.get_attr(prefix + str(node.target))
            elif node.target is CHECKPOINT:
                self.env[node] = self._checkpointed(source, node, prefix)
            elif node.target == "item" and isinstance(self.env.get(node.args[0]), int | float):
                self.env[node] = self.env[node.args[0]]
            elif node.op != "placeholder":
                self.env[node] = _copied(node, self.graph, self.env, self.names)
        return list(output.args[0])

    def _checkpointed(self, source: fx.GraphModule, node: fx.Node, prefix: str) -> tuple[Any, ...]:
        """A block whose activations are computed anew for the backward pass: here, computed."""
        holder, *given = node.args
        assert isinstance(holder, fx.Node)
        body: Any = source.get_submodule(str(holder.target))
        inner = [x for x in body.graph.nodes if x.op == "placeholder"]
        for placeholder, value in zip(inner, given, strict=True):
            self.env[placeholder] = self.env[value] if isinstance(value, fx.Node) else value
        results = self._body(body, f"{prefix}{holder.target}.")
        return tuple(self.env[x] if isinstance(x, fx.Node) else x for x in results)


def _copied(node: fx.Node, graph: fx.Graph, env: Mapping[fx.Node, Any], names: Names) -> fx.Node:
    """A node in the copy, which says where it stands in the model, and runs as in evaluation."""
    copied = graph.node_copy(node, lambda n: env[n])
    stack = names.modules(node.meta.get("nn_module_stack") or {})
    # Where Dynamo has no line of the user's, tracing shall not put one of ours.
    trace = node.meta.get("stack_trace") or "unknown"
    copied.meta = {"nn_module_stack": stack, "stack_trace": trace}
    kind = list(stack.values())[-1][1] if stack else None
    if _follows_mode(kind) and inspect.isfunction(node.target):
        signature = inspect.signature(node.target)
        if "training" in signature.parameters:
            bound = signature.bind(*copied.args, **copied.kwargs)
            # Without statistics to use, a batch norm of torch goes by its batch in both modes.
            if bound.arguments.get("running_mean", copied) is not None:
                bound.arguments["training"] = False
            copied.args, copied.kwargs = bound.args, bound.kwargs
    return copied


def _follows_mode(kind: object) -> bool:
    """Whether it is torch's own code that passes a module's mode on to a function."""
    forward = getattr(kind, "forward", None)
    return getattr(forward, "__module__", "").startswith("torch.nn.modules.")


def _is_float(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _zeros(like: Tensor) -> Tensor:
    """Zeros of the same form, strides included: what a view accepts depends on them."""
    if like.layout != torch.strided or like.numel() == 0:
        return torch.zeros_like(like, requires_grad=False)
    last = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    memory = torch.zeros(last + 1, dtype=like.dtype, device=like.device)
    return memory.as_strided(like.shape, like.stride())


def _at(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor
