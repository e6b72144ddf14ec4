"""Rules for operators of a user's own, which say what the operator is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from fxpath.graph.compositions import COMPOSITIONS
from fxpath.private import OpOverload, OpOverloadPacket, schema
from fxpath.rules.registry import RULES

__all__ = ["RegisteredRule", "register_rule"]

Composition = TypeVar("Composition", bound=Callable[..., Any])


@dataclass(frozen=True)
class RegisteredRule:
    """A rule in force until :meth:`~RegisteredRule.remove`, or to the end of a ``with`` block.

    Attributes:
        operator: the operator that it is for.
        composition: what the operator is made of.
    """

    operator: OpOverload
    composition: Callable[..., Any]

    def remove(self) -> None:
        """Take the rule back; what was compiled with it stays as it is."""
        if COMPOSITIONS.get(self.operator) is self.composition:
            del COMPOSITIONS[self.operator]

    def __enter__(self) -> RegisteredRule:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@overload
def register_rule(operator: OpOverload) -> Callable[[Composition], Composition]: ...


@overload
def register_rule(operator: OpOverload, composition: Callable[..., Any]) -> RegisteredRule: ...


def register_rule(operator: OpOverload, composition: Callable[..., Any] | None = None) -> Any:
    """Say which composition of torch operations an operator of your own computes.

    Wherever a model that is captured from now on calls the operator, the composition stands in its
    place, traced by ``torch.export`` for the shapes of the call and lifted by the rules of these
    operations.  Everything that reads the graph follows: scores, metrics and bounds, the list of
    paths, pruning, rescaling.  The model itself calls the operator as before.

    All results are exact for the composition.  That the operator computes the same is your word for
    it, of which shape and format alone are checked: compare the two on inputs of yours with
    ``torch.testing.assert_close``.  A rule holds for the whole process; an operation of torch that
    is refused can be given one too, and then is what you say it is.

    Args:
        operator: the exact overload, as ``torch.ops.mylib.linear_relu.default``.  It writes to none
            of its arguments, and tells torch the shape of its result
            (``torch.library.register_fake``).
        composition: takes the operator's arguments and returns its results.  It computes with
            operations of torch, or with other operators that are registered, and holds no tensors
            of its own.  Left out, the call is a decorator.

    Returns:
        A :class:`~fxpath.RegisteredRule`, which takes the rule back by ``remove()`` or at the end
        of a ``with`` block; as a decorator, the composition itself.

    Raises:
        TypeError: if ``operator`` is no overload (but all of them, or the function), or
            ``composition`` cannot be called.
        ValueError: if the operator has a rule already, or writes to its arguments.

    Example:
        >>> import torch, fxpath
        >>> @torch.library.custom_op("fxpath_example::linear_relu", mutates_args=())
        ... def linear_relu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ...     return (x @ weight.T).clamp(min=0)
        >>> @linear_relu.register_fake
        ... def _(x, weight):
        ...     return x.new_empty(len(x), len(weight))
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return linear_relu(x, self.weight)
        >>> model = Net(2, 1)
        >>> _ = model.weight.data.fill_(-3.0)
        >>> operator = torch.ops.fxpath_example.linear_relu.default
        >>> with fxpath.register_rule(operator, lambda x, weight: torch.relu(x @ weight.T)):
        ...     fxpath.path_norm(model, (2,))
        6.0
        >>> bool(fxpath.check(model, (2,)))
        False
    """
    if composition is None:

        def decorated(function: Composition) -> Composition:
            register_rule(operator, function)
            return function

        return decorated
    if not isinstance(operator, OpOverload):
        raise TypeError(
            f"{_named(operator)} is no overload of an operator: pass {_meant(operator)}"
        )
    if not callable(composition):
        raise TypeError(f"the rule of {operator} is a {type(composition).__name__}, no function")
    if operator in RULES or operator in COMPOSITIONS:
        owner = "of fxpath's own" if operator in RULES else "that was registered before"
        raise ValueError(f"{operator} has a rule already, one {owner}")
    if schema(operator).is_mutable:
        raise ValueError(
            f"{operator} writes to its arguments: register one that returns its result instead"
        )
    COMPOSITIONS[operator] = composition
    return RegisteredRule(operator, composition)


def _named(operator: object) -> str:
    return operator if isinstance(operator, str) else str(operator)


def _meant(operator: object) -> str:
    """What to pass instead."""
    if isinstance(operator, OpOverloadPacket):
        known = [f"torch.ops.{operator}.{each}" for each in operator.overloads()]
        return " or ".join(known)
    return "torch.ops.<library>.<name>.default"
