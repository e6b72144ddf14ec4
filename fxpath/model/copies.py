"""The stand-in that is traced instead of the user's model.

A deep copy of the module tree that shares every tensor.  Hooks, and functions that are stored on
modules, are rebound: where they close over the model, or over an object that was copied with it,
they see the copy.

Of a sharded model it is a copy of what the model was before ``fully_shard`` or
``parallelize_module``: modules of their own classes, without the hooks that gather and scatter, and
in the place of each DTensor a tensor of its full shape that has no memory.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.model.form import tensors_in
from fxpath.model.state import global_names, has_state, is_own, parts, slots
from fxpath.private import OptimizedModule, uncompiled
from fxpath.sharding import is_sharded, own_class, stand_in, without_shards

_ATOMS = (type(None), bool, int, float, complex, str, bytes, Tensor, type, types.ModuleType)


class _Passthrough(nn.Module):
    """Stands for a data-parallel wrapper: names and hooks stay, the scattering goes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule("module")(*args, **kwargs)


class _Uncompiled(OptimizedModule):
    """Stands for what ``torch.compile`` gave: it is run, not compiled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = uncompiled(self)
        assert inner is not None
        return inner(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)


class _DataParallel(nn.DataParallel[nn.Module]):
    """The same behind a subclass, whose own methods may call ``super().forward()``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _DistributedDataParallel(nn.parallel.DistributedDataParallel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _SharedTensors(TorchFunctionMode):
    """While active, deep copies share their tensors, non-leaf ones included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def skeleton(model: nn.Module) -> nn.Module:
    """An eval-mode copy of the module tree that shares all tensors with ``model``.

    Raises:
        UnsupportedModelError: if something that a module or a hook holds cannot be copied, or if
            the class of a module reads the model itself from a global or a closure.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = skeleton(model)
        >>> copied.training, copied[0].weight is model[0].weight, model.training
        (False, True, True)
    """
    return duplicate(model)[0]


def duplicate(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A skeleton, and what became of each object: id -> copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _shared(tensor)
        for value in vars(module).values():
            for _, tensor in tensors_in(value):
                memo.setdefault(id(tensor), _shared(tensor))
    kept = _read_by_classes(model)
    memo.update(kept)
    with _SharedTensors():
        _copy_sharded(model, memo)
        copied: nn.Module = _copied(model, memo, "", model)
        _Rebinding(model, memo).walk(copied)
    for module in copied.modules():
        _unscatter(module)
    return copied.eval(), {key: value for key, value in memo.items() if key not in kept}


def _shared(tensor: Tensor) -> Tensor:
    """What a skeleton has in the place of a tensor: the tensor itself, if it can be traced."""
    if is_sharded(tensor):
        return stand_in(tensor)
    return _normal(tensor) if tensor.is_inference() else tensor


def _copy_sharded(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the modules that ``fully_shard`` or ``parallelize_module`` changed, which it undoes."""
    plain: dict[nn.Module, nn.Module] = {}
    kept = {module: without_shards(vars(module)) for module in model.modules()}
    for module, attributes in kept.items():
        changed = own_class(module) is not type(module)
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        if changed or any(len(attributes[h]) < len(vars(module)[h]) for h in hooks):
            plain[module] = object.__new__(own_class(module))
    # All of them first: what one holds may lead to another.
    memo.update({id(module): made for module, made in plain.items()})
    paths = {module: path for path, module in model.named_modules()}
    for module, made in plain.items():
        vars(made).update(_copied(kept[module], memo, paths[module], module))


def _normal(tensor: Tensor) -> Tensor:
    """A tensor that torch.export accepts, for one that was made in inference mode."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied


def _unscatter(module: nn.Module) -> None:
    """Turn a wrapper of a skeleton, data-parallel or compiling, into one that calls its module."""
    plain: type[nn.Module]
    if type(module) is OptimizedModule:
        module.__class__ = _Uncompiled
        del module.__dict__["forward"]  # which compiles
        return
    for wrapper, plain in (
        (nn.DataParallel, _DataParallel),
        (nn.parallel.DistributedDataParallel, _DistributedDataParallel),
    ):
        if isinstance(module, wrapper):
            cls = type(module)
            module.__class__ = (
                _Passthrough if cls is wrapper else type(cls.__name__, (cls, plain), {})
            )
            return


def _read_by_classes(model: nn.Module) -> dict[int, Any]:
    """What methods of the model's classes read from globals and closures, at any depth: it stays.

    A hook that fills such an object and a forward that reads it have to meet in one.
    """
    own = {id(module): name for name, module in model.named_modules()}
    found: dict[int, Any] = {}
    seen: set[type] = set()
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls in seen or not is_own(cls.__module__):
                continue
            seen.add(cls)
            for method in parts(cls):
                function = getattr(method, "__func__", method)
                if not isinstance(function, types.FunctionType):
                    continue
                for value in parts(function):
                    if id(value) in own:
                        raise _refused(
                            path,
                            function,
                            f"{function.__qualname__} reads the module {own[id(value)]!r} of this "
                            "very model from a global or a closure, not from self",
                            "reach it through self",
                        )
                    _keep(value, found)
    return found


def _keep(value: Any, found: dict[int, Any]) -> None:
    """Add the objects that can be written to and are reached from a value, modules left out."""
    pending, seen = [value], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, (*_ATOMS, nn.Module)) or id(value) in seen or id(value) in found:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | deque) or has_state(value) or slots(value):
            found[id(value)] = value
        pending.extend(parts(value))


def _copied(value: Any, memo: dict[int, Any], path: str, source: Any) -> Any:
    try:
        return copy.deepcopy(value, memo)
    # Whatever a class raises that cannot be copied.
    except Exception as error:
        raise _refused(
            path,
            source,
            f"it holds an object that cannot be copied ({type(error).__name__}: {error}), and the "
            "model itself is not run",
            "remove the hook or the attribute that holds it",
        ) from error


class _Rebinding:
    """Functions that a skeleton holds see the skeleton, not the model.

    ``copy.deepcopy`` takes functions as they are; their cells, and globals that lead to the model,
    are copied here.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.modules = {id(module) for module in model.modules()}
        self.functions: dict[int, types.FunctionType] = {}
        self.cells: dict[int, types.CellType] = {}
        self.done: set[int] = set()
        self.path = ""

    def walk(self, copied: nn.Module) -> None:
        """Rebind whatever the modules of a skeleton hold."""
        for self.path, module in copied.named_modules():
            self._inside(vars(module))

    def value(self, value: Any) -> Any:
        """The value, or what stands for it; containers of the skeleton change in place."""
        if isinstance(value, _ATOMS) or isinstance(value, nn.Module):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            function = self.value(value.__func__)
            self.value(value.__self__)
            return types.MethodType(function, value.__self__)
        if isinstance(value, functools.partial):
            keywords = {key: self.value(held) for key, held in value.keywords.items()}
            made = functools.partial(
                self.value(value.func), *[self.value(held) for held in value.args], **keywords
            )
            return made if made.func is not value.func else value
        if type(value) is tuple:
            return tuple(self.value(held) for held in value)
        if self._is_copy(value):
            self._inside(value if isinstance(value, dict | list) else vars(value))
        return value

    def _is_copy(self, value: Any) -> bool:
        """Whether deepcopy made an object, so that it may be changed."""
        return (isinstance(value, dict | list) or has_state(value)) and self.memo.get(
            id(value)
        ) is not value

    def _inside(self, container: Any) -> None:
        if id(container) in self.done:
            return
        self.done.add(id(container))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, held in list(items):
            new = self.value(held)
            if new is not held:
                container[key] = new

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if not is_own(function.__module__):
            return function
        if id(function) not in self.functions:
            space = function.__globals__
            leading = [n for n in global_names(function) if self._leads_back(space.get(n))]
            defaults = (function.__defaults__, function.__kwdefaults__)
            if not (leading or function.__closure__ or self._leads_back(defaults)):
                return function
            # Before the cells are filled: a function may close over itself.
            made = types.FunctionType(
                function.__code__,
                {**space} if leading else space,
                function.__name__,
                None,
                tuple(self._cell(cell) for cell in function.__closure__ or ()) or None,
            )
            made.__dict__.update(function.__dict__)
            made.__qualname__, made.__module__ = function.__qualname__, function.__module__
            self.functions[id(function)] = self.functions[id(made)] = made
            made.__defaults__, made.__kwdefaults__ = self.value(
                _copied(defaults, self.memo, self.path, function)
            )
            for name in leading:
                copied = _copied(space[name], self.memo, self.path, function)
                made.__globals__[name] = self.value(copied)
            for old, new in zip(function.__closure__ or (), made.__closure__ or (), strict=True):
                self._fill(old, new, function)
        return self.functions[id(function)]

    def _cell(self, cell: types.CellType) -> types.CellType:
        return self.cells.setdefault(id(cell), types.CellType())

    def _fill(self, old: types.CellType, new: types.CellType, function: Any) -> None:
        if id(new) in self.done:
            return
        self.done.add(id(new))
        try:
            held = old.cell_contents
        except ValueError:
            return  # not filled yet
        copied = _copied(held, self.memo, self.path, function)
        new.cell_contents = self.value(copied)

    def _leads_back(self, value: Any) -> bool:
        """Whether a module of the model can be reached from a value."""
        pending, seen = [value], set()
        while pending:
            value = pending.pop()
            if isinstance(value, _ATOMS) or id(value) in seen:
                continue
            if id(value) in self.modules:
                return True
            seen.add(id(value))
            pending.extend(parts(value))
        return False


def locate(function: Any) -> str:
    """``file:line`` of a hook or another callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__code__") and not hasattr(function, "__func__"):
        function = getattr(type(function), "__call__", None)  # noqa: B004
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "unknown"


def _refused(path: str, source: Callable[..., Any], reason: str, remedy: str) -> Exception:
    name = getattr(source, "__qualname__", type(source).__name__)
    problem = Problem(name, "(capture)", path, locate(source), reason, remedy)
    return UnsupportedModelError(SupportReport((problem,)))
