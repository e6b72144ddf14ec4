"""Which descriptions of an exported program are taken at their word.

torch's deserializer trusts the JSON of a `.pt2` file: it evaluates shapes as Python expressions
(`sympify`), follows dotted names from the module `torch` to whatever callable they end at, imports
the modules that a pytree names, and pastes the names of nodes and arguments into source code that
`torch.fx` compiles.  Here each string is held against the few forms that `torch.export.save` writes
before the deserializer sees it.  What the analysis has no use for (guards, annotations, the history
of a node) is left out.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import json
import keyword
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from fxpath.capture.loading.zips import Refused
from fxpath.private import archive_schema, is_archived_union, operators

# Of an operation: only where it stands in the user's code is ever shown.
_METADATA = frozenset({"stack_trace", "nn_module_stack", "torch_fn"})
# Operations of ATen that touch files or the screen.
_EFFECTS = frozenset({"aten::from_file", "aten::_print"})
_HIGHER_ORDER = frozenset(
    {
        "associative_scan",
        "cond",
        "map_impl",
        "scan",
        "strict_mode",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)
# Arithmetic on sizes, as torch.export traces it.
_SYMBOLIC = frozenset(
    [
        *(f"_operator.{name}" for name in "add sub mul truediv floordiv mod neg pos pow".split()),
        *(f"_operator.{name}" for name in "eq ne lt le gt ge and_ or_ not_ getitem".split()),
        *(f"math.{name}" for name in "ceil floor trunc sqrt".split()),
        *(f"torch.sym_{name}" for name in "int float max min not ite sum".split()),
        "torch.sym_sqrt",
        "torch._sym_sqrt",
    ]
)
# What sympy's `srepr` writes of a shape; functions of torch's own are FloorDiv and its kind.
_FUNCTIONS = frozenset(
    """
    Symbol Integer Float Rational Add Mul Pow Max Min Abs Mod floor ceiling
    Equality Unequality StrictLessThan StrictGreaterThan LessThan GreaterThan Eq Ne Lt Le Gt Ge
    And Or Not Piecewise ExprCondPair Tuple
    FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift
    PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat
    TruncToInt RoundToInt RoundDecimal ToFloat Identity
    """.split()
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_CONSTANTS = frozenset({"oo", "zoo", "nan", "true", "false", "int_oo"})
_PLAIN_TREES = frozenset(
    {
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "collections.deque",
    }
)
_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
# Attribute paths end up between double quotes in generated source.
_PATH = re.compile(r"""[^"'\\\x00-\x1f\x7f]*""")
_SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DECIMAL = re.compile(r"-?[\d.]+(e[+-]?\d+)?", re.ASCII)


def vet(hint: Any, value: Any, where: str = "") -> Any:
    """JSON data of a type of torch's serialization schema, if each of its strings is harmless.

    Args:
        hint: a dataclass of `torch._export.serde.schema`, or another type hint from there.
        value: the parsed JSON.
        where: what the messages call it.

    Returns:
        The data without what the analysis has no use for.

    Raises:
        Refused: naming the first entry that is of another type or that is not taken at its word.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        return [vet(inner[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: vet(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _vet_record(hint, value, where)
    if not _is_scalar(hint, value):
        raise Refused(f"{where} is {_shown(value)}, which is not what torch.export.save writes")
    return value


@functools.cache
def _fields(record: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass of the schema."""
    return typing.get_type_hints(record, globalns=vars(archive_schema()))


def _vet_record(record: Any, value: dict[str, Any], where: str) -> dict[str, Any]:
    """One dataclass, or one of the unions, which hold a single field."""
    fields = _fields(record)
    if is_archived_union(record) and (len(value) != 1 or not fields.keys() >= value.keys()):
        raise Refused(f"{where} is {_shown(value)}, which is not a {record.__name__}")
    vetted = {}
    for name, item in value.items():
        # Later versions may add fields; torch leaves out those that it does not know.
        if name not in fields:
            continue
        place = f"{where}.{name}" if where else name
        if name == "metadata":
            item = {key: item[key] for key in _METADATA & item.keys()} if item else {}
        elif name == "guards_code":
            item = []
        vetted[name] = vet(fields[name], item, place)
        if (check := _CHECKS.get(name)) is not None and item is not None:
            for text in item if isinstance(item, list) else [item]:
                check(text, place)
    return vetted


def _is_scalar(hint: Any, value: Any) -> bool:
    if hint is float:
        # JSON has no literal for infinities: the schema writes names.
        return type(value) in (int, float) or value in ("Infinity", "-Infinity", "NaN")
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return type(value) is int and value in {member.value for member in hint}
    return type(value) is hint


def _check_name(text: str, where: str) -> None:
    """The name of a node or argument, which becomes one in generated source."""
    if text and (not text.isascii() or not text.isidentifier() or keyword.iskeyword(text)):
        raise Refused(f"{where} is {_shown(text)}, which is not a name")


def _check_path(text: str, where: str) -> None:
    if not _PATH.fullmatch(text):
        raise Refused(f"{where} is {_shown(text)}, which is not the name of a tensor")


def _check_file(text: str, where: str) -> None:
    if not re.fullmatch(r"[\w.-]+", text) or text.startswith("."):
        raise Refused(f"{where} is {_shown(text)}, which is not a file of the archive")


@functools.cache
def _operations() -> frozenset[str]:
    return frozenset(operators())


def _check_operator(text: str, where: str) -> None:
    """An operation of torch's dispatcher, arithmetic on sizes, or a known control structure."""
    if text in _SYMBOLIC:
        return
    if found := _OPERATOR.fullmatch(text):
        namespace, name, overload = found.groups()
        full = f"{namespace}::{name}"
        plain = namespace in ("aten", "prims", "torchvision") and full not in _EFFECTS
        if plain and (full if overload == "default" else f"{full}.{overload}") in _operations():
            return
    if text.removeprefix("torch.ops.higher_order.") in _HIGHER_ORDER and text.count(".") == 3:
        return
    raise Refused(f"{where} is {_shown(text)}, which is not an operation that fxpath reads")


def _check_expression(text: str, where: str) -> None:
    """A size as an expression, which sympy evaluates as Python."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or len(text) > 10_000 or not _is_arithmetic(tree.body):
        raise Refused(f"{where} is {_shown(text)}, which is not a size")


def _is_arithmetic(node: ast.expr) -> bool:
    """Whether an expression only combines numbers and symbols by functions of sizes."""
    match node:
        case ast.Constant(value):
            return type(value) in (int, float, bool)
        case ast.Name(name):
            return name in _CONSTANTS or re.fullmatch(r"[a-z]+\d+", name, re.ASCII) is not None
        case ast.UnaryOp(ast.USub() | ast.UAdd(), operand):
            return _is_arithmetic(operand)
        case ast.BinOp(left, ast.Pow(), right):
            return _is_arithmetic(left) and _is_small(right)
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Mod(), right):
            return _is_arithmetic(left) and _is_arithmetic(right)
        case ast.Compare(left, _, others):
            return all(_is_arithmetic(part) for part in (left, *others))
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], keywords):
            # Assumptions: positive=True, integer=True.
            assumed = all(isinstance(word.value, ast.Constant) for word in keywords)
            return assumed and _SYMBOL.fullmatch(name) is not None
        case ast.Call(ast.Name("Float"), [ast.Constant(str(digits))], keywords):
            precise = all(isinstance(word.value, ast.Constant) for word in keywords)
            return precise and _DECIMAL.fullmatch(digits) is not None
        case ast.Call(ast.Name(name), [base, exponent], []) if name in _POWERS:
            return _is_arithmetic(base) and _is_small(exponent)
        case ast.Call(ast.Name(name), arguments, []):
            return name in _FUNCTIONS and all(_is_arithmetic(part) for part in arguments)
    return False


def _is_small(node: ast.expr) -> bool:
    """A literal exponent: towers of powers take forever to evaluate."""
    match node:
        case ast.Call(ast.Name("Integer"), [inner], []) | ast.UnaryOp(ast.USub(), inner):
            return _is_small(inner)
        case ast.Call(ast.Name("Rational"), [above, below], []):
            return _is_small(above) and _is_small(below)
        case ast.Call(ast.Name("Float"), [ast.Constant(str(digits))], _):
            return re.fullmatch(r"-?\d{1,2}\.\d{,20}", digits, re.ASCII) is not None
        case ast.Constant(value):
            return type(value) is int and abs(value) <= 64
    return False


def _check_input_tree(text: str, where: str) -> None:
    """The structure of a call's (args, kwargs)."""
    tree = _check_tree(text, where)
    children = tree.get("children_spec", [])
    if len(children) == 2 and children[1].get("type") == "builtins.dict":
        # Keywords become names in generated source.
        for key in json.loads(children[1]["context"]):
            _check_name(str(key), where)


def _check_tree(text: str, where: str) -> dict[str, Any]:
    """Containers as a pytree, whose other types import modules that the file names."""
    try:
        protocol, tree = json.loads(text)
        if protocol == 1 and _is_plain_tree(tree):
            return dict(tree)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise Refused(f"{where} is {_shown(text)}, which is not made of tuples, lists and dicts")


def _is_plain_tree(tree: dict[str, Any]) -> bool:
    children, context = tree["children_spec"], tree["context"]
    if tree["type"] is None:
        return context is None and children == []
    keys = json.loads(context)
    plain = keys is None or type(keys) is int
    if tree["type"] in ("builtins.dict", "collections.OrderedDict"):
        plain = type(keys) is list and all(type(key) in (str, int) for key in keys)
    return tree["type"] in _PLAIN_TREES and plain and all(map(_is_plain_tree, children))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# By the names that the fields have in the schema, in whichever record they stand.
_CHECKS: dict[str, Callable[[str, str], object]] = {
    "name": _check_name,
    "as_name": _check_name,
    "forward_arg_names": _check_name,
    "parameter_name": _check_path,
    "buffer_name": _check_path,
    "tensor_constant_name": _check_path,
    "custom_obj_name": _check_path,
    "user_input_name": _check_path,
    "fqn": _check_path,
    "path_name": _check_file,
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_input_tree,
    "out_spec": _check_tree,
}
