"""What Dynamo notes beside a graph that it captured: where each input comes from, and its name.

All that fxpath reads of these notes is read in this file.  Dynamo hands over a graph of torch's
functions in which everything is an input: activations, the model's tensors, numbers that may
change.  Which is which it notes at each placeholder, in ``node.meta["grapharg"]``: the example, and
its source, a chain of steps such as ``L['self']._modules['conv1']._parameters['weight']``.

*What is a tensor of the model*: any ``nn.Parameter``, and what is reached through a module, a
global variable or a variable of an enclosing function.  All else (arguments, activations that the
part before has left in local variables, also inside of containers) is an input of the part.

*How the model's tensors are called*: as the compiled module calls them (``torch.compile(module)``
and ``module.compile()``), which is on the stack also when a part deep inside of it is compiled on
its own, behind a graph break.  A tensor that it does not have, and every one where a function is
compiled, is called by the path on which Dynamo reached it, the variable first:
``model.layer1.weight``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath import private
from fxpath.model import named_tensors

__all__ = [
    "CHECKPOINT",
    "Names",
    "dynamic_axes",
    "has_values",
    "is_input",
    "is_length",
    "is_written",
    "number",
]

#: Calls a block of operations whose activations are not kept for the backward pass.
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
#: In which of its dictionaries a module keeps something is no part of its name.
_KEPT_IN = ("_modules", "_parameters", "_buffers")
_STEP = re.compile(r"\[['\"]?([^\[\]]*?)['\"]?\]|\.?(\w+)")


def is_input(node: fx.Node) -> bool:
    """Whether a tensor that is no parameter comes into a part from outside of the model."""
    *steps, root = _chain(_source(node))
    if any(isinstance(step, private.NNModuleSource) for step in steps):
        return False
    if isinstance(root, private.LocalSource):
        return not root.is_derefed_cell_contents
    return not isinstance(root, private.GlobalSource)


def number(node: fx.Node, example: object) -> float | None:
    """The value of an input that is a number in the user's code; ``None`` for what is none.

    Raises:
        ValueError: if it has no value yet.
    """
    if isinstance(example, torch.SymInt | torch.SymFloat | torch.SymBool):
        # Its hint: to ask for its value would bind the compiled code to it.
        example = example.node.hint
        if example is None:
            raise ValueError(f"the number {node.name} has no value while the part is compiled")
    argument = node.meta.get("grapharg")
    if isinstance(example, Tensor) and argument is not None and argument.pass_arg_as_tensor:
        # Random numbers that Python draws come in the same way, and have no source of their own.
        *_, root = _chain(_source(node))
        known = isinstance(root, private.LocalSource | private.GlobalSource)
        return example.item() if known else None
    return example if isinstance(example, int | float) else None


def is_length(node: fx.Node) -> bool:
    """Whether a number is the length of a tensor's axis."""
    return isinstance(_source(node), private.TensorPropertySource)


def dynamic_axes(node: fx.Node) -> tuple[int, ...]:
    """Axes of an input whose length may change without another compilation."""
    shape = getattr(node.meta.get("example_value"), "shape", ())
    return tuple(axis for axis, n in enumerate(shape) if isinstance(n, torch.SymInt))


def has_values(example: Tensor) -> bool:
    """Whether a tensor is one, and not only its form."""
    return not isinstance(example, private.FakeTensor)


def is_written(node: fx.Node) -> bool:
    """Whether the captured code writes into a tensor that it is given."""
    # Made by Dynamo for this graph, and all of its operations ran on it.
    example = node.meta.get("example_value")
    return isinstance(example, Tensor) and private.write_count(example) > 0


class Names:
    """Names of the tensors and modules of one captured graph."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        #: Variable of the code that is compiled -> name of the module that it holds.
        self._variables: dict[str, str] = {}
        for module in _compiled_modules(inspect.currentframe()):
            for name, tensor in named_tensors(module).items():
                self._known.setdefault(id(tensor), name)

    def input(self, node: fx.Node) -> str:
        """What a part's input is called in the code that is compiled."""
        return _dotted(_source(node), node).replace(".", "_")

    def tensor(self, node: fx.Node, tensor: Tensor) -> str:
        """What one of the model's tensors is called."""
        path = _dotted(_source(node), node)
        known = self._known.get(id(tensor))
        if known is None:
            return path
        variable, _, rest = path.partition(".")
        if known.endswith(rest):
            self._variables.setdefault(variable, known[: -len(rest)].rstrip("."))
        return known

    def number(self, node: fx.Node) -> str:
        """What a number is called, relative to the module that holds it if that one is known."""
        return self._relative(_dotted(_source(node), node))

    def modules(self, stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
        """A node's modules under the names that they have beside its tensors' names."""
        return {
            key: (self._relative(".".join(_steps(path))), kind)
            for key, (path, kind) in stack.items()
        }

    def _relative(self, path: str) -> str:
        variable, _, rest = path.partition(".")
        owner = self._variables.get(variable, variable)
        return f"{owner}.{rest}".strip(".")


def _source(node: fx.Node) -> Any:
    argument = node.meta.get("grapharg")
    return None if argument is None else argument.source


def _chain(source: Any) -> Iterator[Any]:
    """The steps of a source, the last one first, down to the variable that it starts from."""
    yield source
    while isinstance(source, private.ChainedSource):
        source = source.base
        yield source


def _dotted(source: Any, node: fx.Node) -> str:
    if source is None:
        return node.name
    return ".".join(_steps(source.name)) or node.name


def _steps(path: str) -> list[str]:
    """``L['self']._modules['conv1'].weight`` -> ``self``, ``conv1``, ``weight``."""
    found = [key or word for key, word in _STEP.findall(path)]
    return [step.strip("_") or step for step in found[1:] if step not in _KEPT_IN]


def _compiled_modules(frame: FrameType | None) -> Iterator[nn.Module]:
    """Modules on the stack that torch compiles, outermost first."""
    found: list[nn.Module] = []
    while frame is not None:
        module = private.called_compiled(frame)
        if module is not None:
            found.append(module)
        frame = frame.f_back
    return reversed(found)
