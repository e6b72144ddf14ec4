"""The caller's own objects that code of a model can reach: seen before a trace, restored after it.

A trace runs ``forward`` and hooks on fake tensors.  What they write on the traced copy goes with
the copy; what they write elsewhere (globals, class attributes, containers that a closure holds,
``lru_cache``) is put back.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxpath.private import global_forward_hooks

#: Code of these is neither read nor restored.
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "fxpath", "__future__"}
_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, Tensor)
#: Modules of the standard library whose objects hold others in plain attributes.
_HOLDERS = {"collections", "queue", "weakref"}
_MISSING = object()


def is_own(name: str | None) -> bool:
    """Whether a Python module is neither torch's nor the standard library's."""
    return name is not None and (name == "__main__" or name.split(".")[0] not in _FOREIGN)


def has_state(value: Any) -> bool:
    """Whether an object is a module, or of a class of the caller's, with attributes to look at."""
    kind = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, type | types.ModuleType | types.FunctionType)
        and (
            isinstance(value, nn.Module | types.SimpleNamespace)
            or kind.__module__ in _HOLDERS
            or is_own(kind.__module__)
        )
    )


def slots(value: Any) -> dict[str, Any]:
    """What an object of a class of the caller's holds in slots."""
    kind = type(value)
    if isinstance(value, type) or not is_own(kind.__module__):
        return {}
    named: list[str] = []
    for cls in kind.__mro__:
        own = vars(cls).get("__slots__", ())
        named += [own] if isinstance(own, str) else own
    return {name: getattr(value, name, _MISSING) for name in named if not name.startswith("__")}


def global_names(function: types.FunctionType) -> frozenset[str]:
    """Names of globals that a function or one nested in it reads or writes."""
    return _names(function.__code__)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Found once: a trace looks at hundreds of functions, and code does not change."""
    instructions = dis.get_instructions(code) if code.co_names else ()
    found = {
        instruction.argval
        for instruction in instructions
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME")
    }
    nested = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(found.union(*nested))


def entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """What a dictionary stores; reading one of a class of the caller's may make what it returns."""
    return dict(dict.items(value)) if is_own(type(value).__module__) else value


def parts(value: Any) -> Iterable[Any]:
    """What an object holds, as far as it is plain Python."""
    if isinstance(value, dict):
        yield from entries(value).values()
    elif isinstance(value, Mapping) and not is_own(type(value).__module__):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, type):
        yield from vars(value).values() if is_own(value.__module__) else ()
    if has_state(value):
        yield from vars(value).values()
    yield from slots(value).values()
    wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
    if isinstance(wrapped, types.FunctionType):
        yield wrapped


def _function_parts(function: types.FunctionType) -> Iterable[Any]:
    if not is_own(function.__module__):
        return
    for cell in function.__closure__ or ():
        yield _contents(cell)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in global_names(function):
        yield function.__globals__.get(name)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _MISSING


@dataclass(frozen=True)
class _Place:
    """One thing that can be written to: how it is read, and how it is put back."""

    owner: Any
    what: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    before: Any

    def changed(self) -> bool:
        """Whether it holds other objects than before, or in another order."""
        now, before = self.read(), self.before
        if now is before:
            return False
        if isinstance(before, dict):
            return list(now) != list(before) or any(now[k] is not before[k] for k in before)
        if isinstance(before, list):
            return len(now) != len(before) or any(
                a is not b for a, b in zip(now, before, strict=True)
            )
        return now is not before


class Reachable:
    """Everything that the code of a model can write to, as it is now.

    Attributes:
        objects: by id, whatever was found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.objects: dict[int, Any] = {}
        self._places: list[_Place] = []
        for path, module in model.named_modules(remove_duplicate=False):
            self._visit(module, path or type(module).__name__)
        for hook in global_forward_hooks():
            self._visit(hook, "a global hook")

    def watch(self, ids: Iterable[int]) -> Callable[[], str | None]:
        """A function that says what was written to among the objects of these ids, if anything."""
        among = set(ids)
        places = [place for place in self._places if id(place.owner) in among]
        return lambda: next((place.what for place in places if place.changed()), None)

    def restore(self) -> None:
        """Put everything back that was written to."""
        for place in self._places:
            if place.changed():
                place.write(place.before)

    def _visit(self, start: Any, name: str) -> None:
        pending = [(start, name)]
        while pending:
            value, what = pending.pop()
            if isinstance(value, _ATOMS) or id(value) in self.objects or value is _MISSING:
                continue
            self.objects[id(value)] = value
            self._note(value, what)
            pending.extend((part, what) for part in parts(value))
            if not isinstance(value, type) and is_own(type(value).__module__):
                pending.extend((cls, cls.__name__) for cls in type(value).__mro__)

    def _note(self, value: Any, what: str) -> None:
        before = slots(value)
        if before:
            read = functools.partial(slots, value)
            self._add(value, what, read, functools.partial(_set_slots, value), before)
        if has_state(value):
            held = vars(value)
            self._add(value, what, lambda: held, functools.partial(_refill, held), dict(held))
        if isinstance(value, dict):
            read = functools.partial(entries, value)
            self._add(value, what, read, functools.partial(_refill, value), dict(read()))
        elif isinstance(value, list | deque):
            self._add(value, what, lambda: value, functools.partial(_extend, value), list(value))
        elif isinstance(value, set):
            self._add(
                value,
                what,
                lambda: sorted(value, key=id),
                functools.partial(_refill, value),
                sorted(value, key=id),
            )
        elif isinstance(value, functools._lru_cache_wrapper):
            misses = value.cache_info().misses
            self._add(
                value,
                what,
                lambda: value.cache_info().misses == misses or None,
                lambda _: value.cache_clear(),
                True,
            )
        elif isinstance(value, types.FunctionType):
            if is_own(value.__module__):
                self._note_function(value)
        elif isinstance(value, type):
            if is_own(value.__module__):
                read = functools.partial(_attributes, value)
                self._add(value, what, read, functools.partial(_set_attributes, value), read())

    def _note_function(self, function: types.FunctionType) -> None:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            if id(cell) not in self.objects:
                self.objects[id(cell)] = cell
                read = functools.partial(_contents, cell)
                self._add(cell, name, read, functools.partial(_fill, cell), read())
        for name in global_names(function):
            space = function.__globals__
            read = functools.partial(space.get, name, _MISSING)
            self._add(space, name, read, functools.partial(_put, space, name), read())

    def _add(
        self, owner: Any, what: str, read: Callable[[], Any], write: Callable[[Any], None], now: Any
    ) -> None:
        self._places.append(_Place(owner, what, read, write, now))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Reachable]:
    """Restore on the way out whatever the code of a model could write to."""
    state = Reachable(model)
    try:
        yield state
    finally:
        state.restore()


def _refill(container: Any, before: Any) -> None:
    container.clear()
    container.update(before)


def _set_slots(value: Any, before: dict[str, Any]) -> None:
    for name, held in before.items():
        if held is not _MISSING:
            object.__setattr__(value, name, held)
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _attributes(cls: type) -> dict[str, Any]:
    return {name: held for name, held in vars(cls).items() if not name.startswith("__")}


def _set_attributes(cls: type, before: dict[str, Any]) -> None:
    for name in _attributes(cls).keys() - before.keys():
        delattr(cls, name)
    for name, held in before.items():
        if vars(cls).get(name) is not held:
            setattr(cls, name, held)


def _extend(container: Any, before: Any) -> None:
    container.clear()
    container.extend(before)


def _fill(cell: types.CellType, before: Any) -> None:
    if before is _MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = before


def _put(space: dict[str, Any], name: str, before: Any) -> None:
    if before is _MISSING:
        space.pop(name, None)
    else:
        space[name] = before
