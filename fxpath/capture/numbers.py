"""Python numbers that a model's code reads from tensors while it is traced.

Activations have no values in a trace.  Buffers, tensors that a module holds, and what is computed
from these alone do have values, but torch.export hides them too.  Here they are computed on the
side, when somebody asks; what was read is noted, for it is baked into the graph.

A hook may look at activations (to keep statistics, say) as long as that changes nothing: what it
reads is a made-up number, and a trace with another one must give the same graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxpath.model.form import held
from fxpath.private import (
    ASSERT,
    FakeTensor,
    storage_key,
    tree_leaves,
    tree_map_only,
    without_modes,
    without_torch_function,
)

_READ: frozenset[Any] = frozenset(
    {
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
        *(Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
        *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero),
        *(Tensor.is_nonzero, Tensor.__contains__, Tensor.__format__, ASSERT),
    }
)
#: Their result has a shape that depends on values.
_SIZED_BY_VALUES: frozenset[Any] = frozenset(
    {
        *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere),
        *(torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive),
        *(torch.masked_select, Tensor.masked_select, torch.bincount, Tensor.bincount),
        *(torch.repeat_interleave, Tensor.repeat_interleave, Tensor.__getitem__, torch.where),
    }
)
#: They take lengths and positions, also as tensors of integers.
_BY_NUMBERS: frozenset[Any] = frozenset(
    {
        *(torch.narrow, Tensor.narrow, torch.select, Tensor.select, torch.arange),
        *(torch.tensor_split, Tensor.tensor_split, Tensor.__getitem__),
    }
)
_MADE: frozenset[Any] = frozenset(
    {
        *(torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.logspace),
        *(torch.zeros, torch.ones, torch.full, torch.eye, torch.scalar_tensor),
        *(torch.tril_indices, torch.triu_indices, torch.hann_window, torch.hamming_window),
    }
)
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_AUGMENTED = {"__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class Overwritten(Exception):
    """A Python number was read from a tensor that was written to while it was traced."""


class ParameterRead(Exception):
    """A parameter was read as a Python number; its argument is the parameter's name."""


@dataclass
class _Known:
    """A traced tensor whose value is known: it itself, its value when asked for, its origins.

    Without a value where it was known until somebody wrote to it by a view.
    """

    tensor: Tensor
    value: Callable[[], Any] | None
    names: frozenset[str]


class Numbers(TorchFunctionMode):
    """Answers for tensors whose values are known.

    Attributes:
        read: name -> value of each buffer (or tensor that a module holds) that was read.
        pretended: how many reads of activations by hooks were answered by ``pretence``.
        in_hook: whether a hook is running, or raised an error.
        writes: how many calls wrote to activations in place.
    """

    def __init__(self, model: nn.Module, pretence: float) -> None:
        super().__init__()
        self.read: dict[str, Tensor] = {}
        self.pretended = 0
        self.writes = 0
        self.in_hook = False
        self._pretence = pretence
        self._model = model
        self._real = _tensors(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._plain = {id(tensor): name for name, tensor in held(model).items()}
        self._known: dict[int, _Known] = {}

    def start(self) -> None:
        """Call it where the trace begins: the model's tensors are fake from now on."""
        self._known.clear()
        for name, tensor in _tensors(self._model).items():
            real = self._real[name]
            self._known[id(tensor)] = _Known(
                tensor, functools.partial(_same, real), frozenset({name})
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in _READ:
            known = [self._lookup(x) for x in tensors]
            if tensors and all(k is not None for k in known):
                self._note(known)
                if any(k is not None and k.value is None for k in known):
                    raise Overwritten
                return self._evaluate(func, args, kwargs)
            if self.in_hook:
                self.pretended += 1
                return self._pretend(func, args, kwargs)
        if func in _BY_NUMBERS:
            args = self._numbered(args)
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in _SIZED_BY_VALUES:
            answer = self._sized(func, args, kwargs, tensors)
            if answer is not None:
                return answer
        if func == _DATA:
            # The same values, and torch.export would take what it gives for a constant.
            return args[0].detach()
        written = self._before_write(func, args, kwargs, tensors)
        result = func(*args, **kwargs)
        if written is not None:
            self._known[id(tensors[0])] = written
        elif (tensors or func in _MADE) and isinstance(result, Tensor | tuple | list):
            self._follow(func, args, kwargs, tensors, result)
        return result

    # -- what is known ----------------------------------------------------------------------------

    def _lookup(self, tensor: Tensor) -> _Known | None:
        known = self._known.get(id(tensor))
        if known is None and not isinstance(tensor, FakeTensor) and type(tensor) in _PLAIN:
            name = self._plain.get(id(tensor))
            names = frozenset({name} if name else ())
            return _Known(tensor, functools.partial(_same, tensor), names)
        return known

    def _follow(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any
    ) -> None:
        known = [self._lookup(x) for x in tensors]
        if any(k is None for k in known):
            return
        names = frozenset().union(*(k.names for k in known if k is not None))
        lost = any(k is not None and k.value is None for k in known)
        # What the call was made of, as it is now: a later write must not reach it.
        values = {id(x): k for x, k in zip(tensors, known, strict=True) if k is not None}
        whole = functools.cache(lambda: tree_leaves(_run(func, args, kwargs, values)))
        for i, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, FakeTensor) and id(leaf) not in self._known:
                value = None if lost else functools.partial(_item, whole, i)
                self._known[id(leaf)] = _Known(leaf, value, names)

    def _before_write(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> _Known | None:
        """What a tensor will hold that a call writes to; its views are not known any more."""
        if not tensors or not _writes(func, kwargs):
            return None
        target = tensors[0]
        known = [self._lookup(x) for x in tensors]
        if known[0] is None:
            self.writes += 1
            return None
        names = frozenset().union(*(k.names for k in known if k is not None))
        value = None
        if all(k is not None and k.value is not None for k in known) and "out" not in kwargs:
            real = [k.value() for k in known if k is not None and k.value is not None]
            real[0] = _snapshot(real[0])
            values = {
                id(x): _Known(x, functools.partial(_same, r), names)
                for x, r in zip(reversed(tensors), reversed(real), strict=True)
            }
            _run(func, args, kwargs, values)
            value = functools.partial(_same, real[0])
        if isinstance(target, FakeTensor):
            storage = storage_key(target)
            for other in self._known.values():
                if storage_key(other.tensor) == storage:
                    other.value = None
        return _Known(target, value, names)

    def _note(self, known: list[_Known | None]) -> None:
        for name in sorted({name for k in known if k is not None for name in k.names}):
            real = self._real.get(name)
            if name in self._parameters and real is not None and real.is_floating_point():
                raise ParameterRead(name)
            found = real if real is not None else held(self._model)[name]
            self.read.setdefault(name, _snapshot(found))

    def _evaluate(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {id(x): k for x in tensors if (k := self._lookup(x)) is not None}
        return _run(func, args, kwargs, known)

    def _numbered(self, args: Any) -> Any:
        """The arguments, with lengths and positions that are known written as numbers."""

        def number(x: Any) -> Any:
            if isinstance(x, slice):
                return slice(number(x.start), number(x.stop), number(x.step))
            if isinstance(x, tuple):
                return tuple(map(number, x))
            if not isinstance(x, Tensor) or x.dim() or x.dtype == torch.bool:
                return x
            known = None if x.is_floating_point() or x.is_complex() else self._lookup(x)
            if known is None or known.value is None:
                return x
            self._note([known])
            return self._evaluate(Tensor.item, (x,), {})

        first, *rest = args
        # The first one is what is selected from, where there are others.
        return (first if rest else number(first), *map(number, rest))

    def _repeated(self, source: Tensor, repeats: Any, dim: int | None = None, **_: Any) -> Any:
        """Entries that are repeated as often as known numbers say, else ``None``."""
        known = self._lookup(repeats) if isinstance(repeats, Tensor) else None
        if known is None or known.value is None:
            return None
        self._note([known])
        counts = self._evaluate(Tensor.tolist, (repeats,), {})
        source = source.flatten() if dim is None else source
        axis = dim or 0
        counts = counts if isinstance(counts, list) else [counts]
        counts = counts * source.shape[axis] if len(counts) == 1 else counts
        positions = [i for i, n in enumerate(counts) for _ in range(n)]
        return source.index_select(axis, torch.tensor(positions, device=source.device))

    def _sized(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The result of a call whose shape depends on values that are known, else ``None``."""
        if func is Tensor.__getitem__:
            # Masks become positions; what they select from may be an activation.
            masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)]
            known = [self._lookup(x) for x in masks]
            if not masks or any(k is None or k.value is None for k in known):
                return None
            self._note(known)
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            positions: list[Any] = []
            for part in index:
                if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
                    positions.extend(self._evaluate(torch.where, (part,), {}))
                else:
                    positions.append(part)
            return func(args[0], tuple(positions))
        if func is torch.where and len(args) + len(kwargs) > 1:
            return None
        known = [self._lookup(x) for x in tensors]
        if not tensors or any(k is None or k.value is None for k in known):
            if func in (torch.repeat_interleave, Tensor.repeat_interleave) and len(args) > 1:
                return self._repeated(*args, **kwargs)
            return None
        self._note(known)
        return self._evaluate(func, args, kwargs)

    def _pretend(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a hook gets that looks at values of activations."""

        def made_up(x: Tensor) -> Tensor:
            dtype = x.dtype if x.dtype.is_floating_point or x.dtype == torch.bool else torch.int64
            value = self._pretence if dtype.is_floating_point else int(self._pretence > 0)
            return torch.full(x.shape, value, dtype=dtype)

        with _aside():
            args, kwargs = tree_map_only(Tensor, made_up, (args, kwargs))
            return func(*args, **kwargs)


_PLAIN = (Tensor, nn.Parameter)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    return named


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _item(leaves: Callable[[], list[Any]], position: int) -> Any:
    return leaves()[position]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Outside of the trace."""
    with without_torch_function(), without_modes(), torch.no_grad():
        yield


def _snapshot(tensor: Tensor) -> Tensor:
    with _aside():
        return tensor.detach().clone()


def _value(known: _Known) -> Any:
    assert known.value is not None
    return known.value()


def _run(func: Any, args: Any, kwargs: Any, known: Mapping[int, _Known]) -> Any:
    """A call on real values, outside of the trace."""
    with _aside():
        real = tree_map_only(Tensor, lambda x: _value(known[id(x)]), (args, kwargs))
        return func(*real[0], **real[1])


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _AUGMENTED or "out" in kwargs
