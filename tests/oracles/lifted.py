"""The machine of the float64 oracle: a forward pass on tensors that are lifted as they are read."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree


class UnknownOperation(NotImplementedError):
    """The oracle has no rule for an operation."""


# --------------------------------------------------------------------------------------------------
# The machine


@dataclass
class Affine:
    """Where a convolution's or linear map's output comes from, for a BatchNorm that reads it."""

    call: int
    without_bias: Tensor
    bias: Tensor | None
    lifted_bias: Tensor | None
    channels_at_axis_1: bool


class Lifted(torch.Tensor):
    """An activation of the lifted network.

    Its shape and dtype are what the model's code sees; the number is `value`, an ordinary tensor
    with an autograd history, which in-place operations replace.
    """

    value: Tensor
    lifting: Lifting
    affine: Affine | None
    aliased: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _operation_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lifted = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Lifted))
        return lifted.lifting.call(name, func, args, kwargs)


class _Stop(Exception):
    """Ends the forward pass at the module named by ``until``."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Lifting:
    """One forward pass of the lifted network.

    Calls of a convolution or linear map that are ``shared`` have other readers than a BatchNorm.
    """

    def __init__(
        self,
        model: nn.Module,
        q: float,
        rules: Mapping[str, Callable[..., Any]],
        shared: frozenset[int] = frozenset(),
    ) -> None:
        self.model = model
        self.q = q
        self.rules = rules
        self.shared = shared
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.module_stack: list[str] = []
        self.readers: Counter[int] = Counter()
        self.coordinates: dict[int, tuple[str, Tensor]] = {}
        self.calls = itertools.count()

    def run(self, shapes: Sequence[tuple[int, ...]], until: str | None) -> Tensor:
        """Return the sum of all entries of all outputs."""
        if until is not None and until not in dict(self.model.named_modules()):
            raise ValueError(f"no module is called {until!r}")
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True))
            handles.append(module.register_forward_hook(self._leave(path == until)))
        inputs = [self.wrap(torch.ones(1, *shape, dtype=torch.float64)) for shape in shapes]
        try:
            output = self.model(*inputs)
        except _Stop as stop:
            output = stop.output
        finally:
            for handle in handles:
                handle.remove()
        outputs = [x for x in pytree.tree_leaves(output) if x is not None]
        for x in outputs:
            if not isinstance(x, Lifted):
                raise UnknownOperation(f"an output that depends on no input: {type(x)}")
        return torch.stack([self.read(x).sum() for x in outputs]).sum()

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda *_: self.module_stack.append(path)

    def _leave(self, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.module_stack.pop()
            if stop:
                raise _Stop(output)

        return hook

    def call(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the rule of an operation; ``name`` without underscore for its in-place form."""
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        if name in _STRUCTURAL and not in_place:
            values = pytree.tree_map(self.operand, (args, kwargs))
            result = func(*values[0], **values[1])
            result = pytree.tree_map(self.wrap, result)
            if name not in _COPYING:
                for x in pytree.tree_leaves((args, kwargs, result)):
                    if isinstance(x, Lifted):
                        x.aliased = True
            return result
        if name not in self.rules:
            raise UnknownOperation(resolve_name(func) or str(func))
        rule = self.rules[name]
        bound = inspect.signature(rule).bind(self, *args, **kwargs)
        in_place = in_place or bound.arguments.get("inplace", False)
        result = rule(*bound.args, **bound.kwargs)
        if not in_place:
            return result if isinstance(result, Lifted) else self.wrap(result)
        target = args[0]
        value = result.value if isinstance(result, Lifted) else result
        if target.aliased and value is not target.value:
            raise UnknownOperation(f"{name} in place on a tensor that shares memory with another")
        target.value, target.affine = value, None
        return target

    def wrap(self, value: Any) -> Any:
        """Make an activation; contiguous, for `view` must not depend on how a rule computed it."""
        if not isinstance(value, Tensor):
            return value
        assert value.dtype == torch.float64
        value = value.contiguous()
        lifted = value.detach().as_subclass(Lifted)
        lifted.value, lifted.lifting, lifted.affine, lifted.aliased = value, self, None, False
        return lifted

    def read(self, x: Lifted) -> Tensor:
        """Return the value, counting the reader of a convolution or linear map."""
        if x.affine is not None:
            self.readers[x.affine.call] += 1
        return x.value

    def operand(self, x: Any, slot: str = "bias") -> Any:
        """Lift an argument: an activation, a parameter, or a constant tensor; others pass."""
        if isinstance(x, Lifted):
            return self.read(x)
        if not isinstance(x, Tensor):
            return x
        if id(x) in self.names:
            return self.coordinate(self.names[id(x)], x)
        if x.requires_grad:  # computed from parameters
            return self.coordinate(self.sibling(self.module_stack[-1] + ".", slot), x)
        return power(x, self.q) if x.is_floating_point() else x

    def factor(self, x: Any, slot: str = "weight") -> Any:
        """Lift an argument that must not be an activation; numbers are raised to q as well."""
        if isinstance(x, Lifted):
            raise UnknownOperation("a product or quotient of two activations")
        return self.operand(x, slot) if isinstance(x, Tensor) else power(x, self.q)

    def coordinate(self, name: str, effective: Tensor) -> Tensor:
        """Return |effective|^q as a leaf whose share is booked under ``name``."""
        leaf = power(effective.detach(), self.q).requires_grad_()
        self.coordinates[id(leaf)] = (name, leaf)
        return leaf

    @staticmethod
    def sibling(name: str, slot: str) -> str:
        """Return the name of another parameter of the same module."""
        return f"{name.rpartition('.')[0]}.{slot}".lstrip(".")


# Operations that only move entries around: they run on the values as they are.
_COPYING = {
    *("cat", "concat", "stack", "hstack", "vstack", "clone", "contiguous", "repeat"),
    *("repeat_interleave", "roll", "flip", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
}


_STRUCTURAL = _COPYING | {
    *("flatten", "unflatten", "view", "view_as", "reshape", "permute", "transpose", "swapaxes"),
    *("movedim", "t", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind"),
    *("select", "narrow", "expand", "expand_as", "__getitem__"),
}


_METADATA = {
    *("dim", "size", "numel", "nelement", "is_floating_point", "__len__", "__hash__"),
    *(f"{field}.__get__" for field in ("shape", "ndim", "dtype", "device", "layout")),
    *(f"{field}.__get__" for field in ("requires_grad", "is_cuda", "is_nested")),
}


# --------------------------------------------------------------------------------------------------
# Small helpers


def _operation_name(func: Callable[..., Any]) -> str:
    """Return the name that functions, methods and ATen builtins share, like ``conv2d``."""
    name = resolve_name(func) or str(func)
    for namespace in ("torch.nn.functional.", "torch.Tensor.", "torch._C._nn.", "torch."):
        if name.startswith(namespace):
            return name.removeprefix(namespace)
    return name


def power(x: Any, q: float) -> Any:
    """Return |x|^q with 0^0 = 0, of a number or a tensor (in float64)."""
    if isinstance(x, Tensor):
        size = x.detach().double().abs()
        return (size != 0).double() if q == 0 else size if q == 1 else size**q
    return float(x != 0) if q == 0 else float(abs(x)) ** q


def along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    """Shape a vector so that it broadcasts along one axis."""
    return vector.reshape([-1 if i == axis else 1 for i in range(dimensions)])
