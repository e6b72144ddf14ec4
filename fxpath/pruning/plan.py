"""A plan for a smaller model: which positions of which tensors go, as plain data."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMAT = "fxpath.channels"
VERSION = 1


@dataclass(frozen=True)
class Cut:
    """Positions that one tensor of the model loses.

    Attributes:
        shape: of the tensor before.
        remove: axis -> positions that go, ascending.
        within: for the weight of a grouped convolution: for each of the equal parts of axis 0 the
            positions of axis 1 that go, as many in each; empty otherwise.
    """

    shape: tuple[int, ...]
    remove: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    within: tuple[tuple[int, ...], ...] = ()

    @property
    def after(self) -> tuple[int, ...]:
        """Shape of the tensor that is left."""
        gone = {axis: len(positions) for axis, positions in self.remove.items()}
        if self.within:
            gone[1] = len(self.within[0])
        return tuple(size - gone.get(axis, 0) for axis, size in enumerate(self.shape))


@dataclass(frozen=True)
class Bias:
    """What is added to a bias after the cuts: the constants of channels that are gone.

    Attributes:
        add: a number for each entry that is left.
        create: whether the module had no bias, and gets one.
    """

    add: tuple[float, ...]
    create: bool = False


#: A number that a module keeps beside its tensors: before, after.
Attribute = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How a model is made smaller; nothing in it is a tensor, so that it is JSON.

    Attributes:
        tensors: qualified name of a parameter or buffer -> what it loses.
        attributes: qualified name of a module -> name of an attribute -> its value before and
            after, such as ``out_channels``.
        biases: qualified name of a bias -> what is added to it.

    Example:
        >>> import fxpath, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
        ... )
        >>> plan = fxpath.prune_channels(model, 0.5).plan
        >>> Plan.from_dict(plan.to_dict()) == plan
        True
        >>> fxpath.apply_plan(model, plan)
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=1, bias=True)
        )
    """

    tensors: Mapping[str, Cut] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Attribute]] = field(default_factory=dict)
    biases: Mapping[str, Bias] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Plan: {len(self.tensors)} tensors and {len(self.attributes)} modules change>"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tensors": {
                name: {
                    "shape": list(cut.shape),
                    "remove": {str(axis): list(gone) for axis, gone in cut.remove.items()},
                    **({"within": [list(gone) for gone in cut.within]} if cut.within else {}),
                }
                for name, cut in self.tensors.items()
            },
            "attributes": {
                path: {name: list(change) for name, change in changes.items()}
                for path, changes in self.attributes.items()
            },
            "biases": {
                name: {"add": list(bias.add), "create": bias.create}
                for name, bias in self.biases.items()
            },
        }

    def to_json(self) -> str:
        """The plan as a JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read what :meth:`to_dict` wrote; nothing in ``data`` is trusted.

        Raises:
            ValueError: for anything that is not such a plan, saying where.
        """
        _keys(data, "a plan", {"format", "version", "tensors", "attributes", "biases"})
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(
                f"a plan of format {data['format']!r}, version {data['version']!r}; this is "
                f"{FORMAT!r}, version {VERSION}"
            )
        return cls(
            {name: _cut(cut, name) for name, cut in _items(data["tensors"], "tensors")},
            {
                path: {
                    name: _change(change, f"{path}.{name}") for name, change in _items(each, path)
                }
                for path, each in _items(data["attributes"], "attributes")
            },
            {name: _bias(bias, name) for name, bias in _items(data["biases"], "biases")},
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a JSON text.

        Raises:
            ValueError: for anything that is no plan.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a plan that is no JSON: {error}") from None
        return cls.from_dict(data)


def _keys(data: Any, what: str, needed: set[str], optional: frozenset[str] = frozenset()) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is a {type(data).__name__}, not a dict")
    if not needed <= data.keys() <= needed | optional:
        wrong = sorted(map(str, (data.keys() ^ needed) - optional))
        raise ValueError(f"{what} differs in {', '.join(wrong)} from what a plan has")


def _items(data: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{what} of a plan: not a dict with names")
    return list(data.items())


def _integers(data: Any, what: str) -> tuple[int, ...]:
    # True and False are ints in Python.
    if not isinstance(data, Sequence) or any(type(n) is not int for n in data):
        raise ValueError(f"{what} of a plan: not a list of integers")
    return tuple(data)


def _positions(data: Any, size: int, what: str) -> tuple[int, ...]:
    """Positions on an axis, ascending, each once, not all of them."""
    found = _integers(data, what)
    if any(not 0 <= n < size for n in found):
        raise ValueError(f"{what} of a plan: positions outside of 0 ... {size - 1}")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"{what} of a plan: positions that are not ascending, or not distinct")
    if len(found) >= size:
        raise ValueError(f"{what} of a plan: no position would be left")
    return found


def _cut(data: Any, name: str) -> Cut:
    _keys(data, name, {"shape", "remove"}, frozenset({"within"}))
    shape = _integers(data["shape"], f"shape of {name}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape of {name} of a plan: a negative length")
    remove = {}
    for key, gone in _items(data["remove"], name):
        if key not in map(str, range(len(shape))):
            raise ValueError(f"{name} of a plan has no axis {key!r}")
        remove[int(key)] = _positions(gone, shape[int(key)], f"axis {key} of {name}")
    parts = data.get("within", ())
    if not parts:
        return Cut(shape, remove)
    if not isinstance(parts, Sequence) or isinstance(parts, str) or len(shape) < 2 or 1 in remove:
        raise ValueError(f"within of {name} of a plan: not positions on axis 1 for parts of axis 0")
    within = tuple(_positions(part, shape[1], f"axis 1 of {name}") for part in parts)
    each, rest = divmod(shape[0], len(within))
    rows = () if rest else remove.get(0, ())
    counts = {sum(row // each == part for row in rows) for part in range(len(within))}
    if rest or not each or len(set(map(len, within))) > 1 or len(counts) > 1:
        raise ValueError(f"within of {name} of a plan: parts that differ in size")
    return Cut(shape, remove, within)


def _change(data: Any, what: str) -> Attribute:
    found = _integers(data, what)
    if len(found) != 2 or not 0 < found[1] <= found[0]:
        raise ValueError(f"{what} of a plan: not a number before and a smaller one after")
    return found[0], found[1]


def _bias(data: Any, name: str) -> Bias:
    _keys(data, name, {"add", "create"})
    numbers = data["add"]
    if (
        not isinstance(numbers, Sequence)
        or any(type(n) not in (int, float) or not abs(n) <= sys.float_info.max for n in numbers)
        or type(data["create"]) is not bool
    ):
        raise ValueError(f"{name} of a plan: not a list of finite numbers")
    return Bias(tuple(map(float, numbers)), data["create"])
