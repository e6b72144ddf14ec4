"""What a captured graph takes for granted about its model, so that a later change is noticed.

A program reads tensors anew at every run.  What it cannot read anew is which modules there are,
which of their tensors are one, and what each was configured for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxpath.private import forward_hooks, forward_pre_hooks
from fxpath.sharding import is_sharded

#: Where a tensor that no module has registered is found: module, attribute, keys inside of it.
Attribute = tuple[str, str, tuple[Any, ...]]


@dataclass(frozen=True)
class Form:
    """The form of a model when it was captured.

    Attributes:
        modules: qualified name -> type and, for torch's own modules, configuration.
        tied: name -> the other names of the same tensor.
        attached: tensors that are plain attributes, by the name that they have in the graph.
        shapes: placeholder name -> shape.
        called: what a module runs beside its class: hooks, and a ``forward`` of its own.
    """

    modules: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    attached: Mapping[str, Attribute]
    shapes: Mapping[str, torch.Size]
    called: Mapping[str, tuple[Any, ...]]


def form_of(
    model: object,
    named: Mapping[str, Tensor],
    attached: Mapping[str, Attribute],
    shapes: Mapping[str, torch.Size],
) -> Form:
    """The form of a model as it is now.

    Args:
        model: the user's module; anything else has no structure that could change.
        named: its tensors, tied ones under each of their names.
        attached: its plain attributes that the graph reads, see :func:`attached`.
        shapes: of the placeholders.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    tied = {first: tuple(rest) for first, *rest in names.values() if rest}
    return Form(_modules(model), tied, attached, shapes, _called(model))


def changes(model: object, form: Form, named: Mapping[str, Tensor]) -> Iterator[str]:
    """What is no longer as it was, in words."""
    now = _modules(model)
    for name in dict.fromkeys([*form.modules, *now]):
        before, after = form.modules.get(name), now.get(name)
        if before != after:
            yield f"module {name or '(the model itself)'} was {before}, and is {after}"
    called = _called(model)
    for name in dict.fromkeys([*form.called, *called]):
        old, new = form.called.get(name, ()), called.get(name, ())
        if len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
            where = f"module {name}" if name else "the model itself"
            yield f"{where} has other hooks, or another forward"
    for first, others in form.tied.items():
        for name in others:
            if first in named and name in named and named[name] is not named[first]:
                yield f"{name} and {first} are no longer one tensor"


def _modules(model: object) -> dict[str, str]:
    if not isinstance(model, nn.Module):
        return {}
    return {name: _described(module) for name, module in model.named_modules()}


def _called(model: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(model, nn.Module):
        return {}
    found = {
        name: tuple(
            part
            for part in (
                *forward_pre_hooks(module).values(),
                *forward_hooks(module).values(),
                vars(module).get("forward"),
            )
            if part is not None
        )
        for name, module in model.named_modules()
    }
    return {name: parts for name, parts in found.items() if parts}


def _described(module: nn.Module) -> str:
    kind = type(module)
    # What others print about their modules may change at every step; torch prints what it is.
    own = kind.__module__.startswith("torch.nn.modules.")
    return f"{kind.__qualname__}({module.extra_repr() if own else ''})"


def attached(model: object, constants: Mapping[str, Tensor]) -> dict[str, Attribute]:
    """Which of a graph's constants are plain attributes of the model, alone or in containers."""
    if not isinstance(model, nn.Module) or not constants:
        return {}
    wanted = {place(tensor): name for name, tensor in constants.items() if tensor.numel()}
    found: dict[str, Attribute] = {}
    for where, tensor in _unregistered(model):
        name = wanted.get(place(tensor))
        if name is not None:
            found.setdefault(name, where)
    return found


def held(model: object) -> dict[str, Tensor]:
    """Tensors that modules hold without having registered them, by the path to each."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        ".".join([path, attribute, *map(str, keys)]).removeprefix("."): tensor
        for (path, attribute, keys), tensor in _unregistered(model)
    }


def _unregistered(model: nn.Module) -> Iterator[tuple[Attribute, Tensor]]:
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                for keys, tensor in tensors_in(value):
                    yield (path, attribute, keys), tensor


def attached_now(model: object, attached: Mapping[str, Attribute]) -> dict[str, Tensor]:
    """The tensors that stand at those places now; one that is gone is left out."""
    found: dict[str, Tensor] = {}
    for name, (path, attribute, keys) in attached.items():
        assert isinstance(model, nn.Module)
        value: Any = None
        try:
            value = getattr(model.get_submodule(path), attribute)
            for key in keys:
                value = value[key]
        except (AttributeError, LookupError, TypeError):
            value = None  # the place itself is gone
        if isinstance(value, Tensor):
            found[name] = value
    return found


def tensors_in(value: object, depth: int = 3) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Tensors in a value, through lists, tuples and dicts, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield (), value
    elif depth and isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):
            for keys, tensor in tensors_in(item, depth - 1):
                yield (key, *keys), tensor


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What identifies a tensor's memory: the graph may hold an alias of the attribute."""
    if tensor.layout != torch.strided or is_sharded(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
