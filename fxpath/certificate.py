"""What is claimed of a set of weights, as plain data that travels in files.

A certificate is one JSON text, called ``fxpath.json`` wherever it lies.  Any tool writes it beside
the weights that it speaks of:

- ``.pt2``: ``torch.export.save(program, path, extra_files={"fxpath.json": text})``;
- ``.onnx``: an entry ``fxpath.json`` of ``metadata_props``;
- ``.safetensors``: ``save_file(state, path, metadata={"fxpath.json": text})``;

where ``text`` is ``certificate.to_json()``.

:func:`fxpath.load_certificate` reads it from there, and :func:`fxpath.verify` computes everything
anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMAT", "MEMBER", "Certificate", "Claim", "fingerprint"]

#: What a certificate says that it is.
FORMAT = "fxpath.certificate/1"
#: Its name in files.
MEMBER = "fxpath.json"
#: Where a saved program holds what is not to be exchanged, under no name that a state dict has:
#: ``steps.fixed.NAME``, with ``_`` behind the first word where the model has it.
STEPS, FIXED = "steps", "fixed"
#: Significant decimal digits of a path-norm and of the bounds of a claim.
DIGITS = 9


@dataclass(frozen=True)
class Claim:
    """How far weights are from others in the l^1 path-metric ``||Phi(theta) - Phi(theta')||_1``.

    Attributes:
        inequality: ``"(7)"`` where the metric is known exactly; else the name of the upper bound,
            see :meth:`fxpath.PathMetric.bound`.
        exact: whether it is.
        value: the metric, where it is known; 9 significant digits.
        lower: what it is not below, rounded down to 9 significant digits.
        upper: what it is not above, rounded up to 9 significant digits.
        relative: ``upper`` over the path-norm of the reference, rounded up likewise; ``None`` where
            that is 0, or the quotient beyond float64.
        path_norm: ``||Phi(theta)||_1`` of the reference.
        weights: SHA-256 of the reference's weights, see :func:`fxpath.certificate.fingerprint`.
    """

    inequality: str
    exact: bool
    value: float | None
    lower: float
    upper: float
    relative: float | None
    path_norm: float
    weights: str


@dataclass(frozen=True)
class Certificate:
    """What is claimed of a set of weights.

    Attributes:
        weights: SHA-256 of the tensors that the network reads, see
            :func:`fxpath.certificate.fingerprint`.
        tensors: the names of those.
        inputs: input name -> shape of one sample, without the batch axis.
        batch_dim: the batch axis of the inputs; ``None`` if there is none.
        until: the submodule at whose output the network was cut.
        outputs: which outputs count, by position or key; ``None`` for all.
        q: exponent of the path-norm.
        path_norm: ``||Phi(theta)||_q``, 9 significant digits; ``None`` beyond float64.
        log10_path_norm: its decimal logarithm; ``None`` if the norm is 0.
        layers: rows as in :attr:`fxpath.Analysis.layers`, without quantiles.
        claim: how far the weights are from others, if that was asked for.
        versions: of fxpath and of torch that made it; no part of what is verified.

    Example:
        >>> import fxpath
        >>> certificate = fxpath.certify(torch.nn.Linear(2, 1))
        >>> Certificate.from_json(certificate.to_json()) == certificate
        True
        >>> certificate.tensors, certificate.inputs
        (('bias', 'weight'), {'input': (2,)})
    """

    weights: str
    tensors: tuple[str, ...]
    inputs: dict[str, tuple[int, ...]]
    batch_dim: int | None
    until: str | None
    outputs: tuple[int | str, ...] | None
    q: float
    path_norm: float | None
    log10_path_norm: float | None
    layers: tuple[dict[str, Any], ...]
    claim: Claim | None = None
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        log10 = self.log10_path_norm
        norm = "path-norm 0" if log10 is None else f"path-norm 10^{log10:.4f}"
        claim = "" if self.claim is None else f", {self.claim.relative:.3%} from another"
        return f"<Certificate: {norm}{claim}, SHA-256 of the weights {self.weights[:12]}...>"

    def to_json(self) -> str:
        """The text that goes into a file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """A certificate from its text.

        Raises:
            ValueError: if it is no text of this kind, or of a version that is not known.
        """
        try:
            data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        except RecursionError:
            raise ValueError("no certificate: nested deeper than any") from None
        except ValueError as error:
            raise ValueError(f"no certificate: {error}") from None
        kind = data.pop("format", None) if isinstance(data, dict) else None
        if kind != FORMAT:
            raise ValueError(f"its format is {kind!r} and not {FORMAT!r}")
        try:
            _check(data, _CERTIFICATE, "")
            claim = data.pop("claim")
            if claim is not None:
                _check(claim, _CLAIM, "claim.")
            for i, row in enumerate(data["layers"]):
                _check(row, _ROW, f"layers[{i}].")
        except ValueError as error:
            raise ValueError(f"no certificate, although it says so: {error}") from None
        names = [row["name"] for row in data["layers"]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"it has two rows for {', '.join(twice)}")
        return cls(
            **{
                **data,
                "tensors": tuple(data["tensors"]),
                "inputs": {name: tuple(shape) for name, shape in data["inputs"].items()},
                "outputs": None if data["outputs"] is None else tuple(data["outputs"]),
                "layers": tuple({**row, "shape": tuple(row["shape"])} for row in data["layers"]),
                "claim": None if claim is None else Claim(**claim),
            }
        )


# -- what a text may hold --------------------------------------------------------------------------


def _word(value: object) -> bool:
    return isinstance(value, str)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023  # what no float64 holds compares with none
    return isinstance(value, float) and math.isfinite(value)


def _optional(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or kind(value)


def _listed(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _mapped(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


_Fields = Mapping[str, tuple[str, Callable[[object], bool]]]
_shape = _listed(_whole)
_WORD, _NUMBER, _SHAPE = ("a text", _word), ("a number", _number), ("a list of lengths", _shape)
_MAYBE = ("a number or null", _optional(_number))
_CERTIFICATE: _Fields = {
    "weights": _WORD,
    "tensors": ("a list of names", _listed(_word)),
    "inputs": ("a list of lengths for each name", _mapped(_shape)),
    "batch_dim": ("an axis or null", _optional(_whole)),
    "until": ("a name or null", _optional(_word)),
    "outputs": (
        "a list of positions and keys, or null",
        _optional(_listed(lambda value: _whole(value) or _word(value))),
    ),
    "q": _NUMBER,
    "path_norm": _MAYBE,
    "log10_path_norm": _MAYBE,
    "layers": ("a list of rows", _listed(lambda value: isinstance(value, dict))),
    "claim": ("a claim or null", _optional(lambda value: isinstance(value, dict))),
    "versions": ("a text for each name", _mapped(_word)),
}
_CLAIM: _Fields = {
    "inequality": _WORD,
    "exact": ("true or false", lambda value: isinstance(value, bool)),
    "value": _MAYBE,
    "lower": _NUMBER,
    "upper": _NUMBER,
    "relative": _MAYBE,
    "path_norm": _NUMBER,
    "weights": _WORD,
}
_ROW: _Fields = {
    "name": _WORD,
    "operation": _WORD,
    "shape": _SHAPE,
    "parameters": ("a number of entries", _whole),
    "sparsity": _NUMBER,
    "share": _NUMBER,
}


def _check(data: Mapping[str, object], kinds: _Fields, where: str) -> None:
    """Refuse entries that are missing, unknown, or of another kind, by name."""
    for name in sorted(data.keys() ^ kinds.keys()):
        raise ValueError(f"{where}{name} is {'not known' if name in data else 'missing'}")
    for name, (what, holds) in kinds.items():
        if not holds(data[name]):
            said = repr(data[name])
            said = said if len(said) < 60 else f"{said[:57]}..."
            raise ValueError(f"{where}{name} is {said}, not {what}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose readers do not agree about a name that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, formats, shapes and entries of tensors, in the order of the names.

    Each tensor adds the line ``name dtype shape`` (as in ``0.weight torch.float32 (3, 2)``) in
    UTF-8 with a newline, and its entries row by row, little-endian.

    Example:
        >>> fingerprint({"weight": torch.zeros(2)})[:12]
        '0b15b00b4b5f'
    """
    found = hashlib.sha256()
    for name in sorted(name for name, value in tensors.items() if isinstance(value, Tensor)):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fixed_tensors(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the model's tensors that a saved program holds and that are not to be exchanged.

    Args:
        constants: of the program, by the names that they have there.

    Example:
        >>> fixed_tensors({"steps.fixed.mask": torch.ones(1), "steps.constant_0": torch.ones(1)})
        {'mask': tensor([1.])}
    """
    found = {re.match(rf"{STEPS}_*\.{FIXED}\.(.+)", name): name for name in constants}
    return {match[1]: constants[name] for match, name in found.items() if match is not None}


def digits(value: float, rounding: str | None = None) -> float | None:
    """A number in few decimal digits; rounded outwards, two machines need not differ about it.

    Args:
        value: the number.
        rounding: of :mod:`decimal`; to the nearest by default.

    Example:
        >>> digits(2 / 3), digits(float("inf"))
        (0.666666667, None)
    """
    if not math.isfinite(value):
        return None
    return float(Context(DIGITS, rounding).plus(Decimal(value)))


def above(value: float) -> float:
    """The next number of few digits that is not below."""
    found = digits(value, ROUND_CEILING)
    assert found is not None, "path-metrics are finite"
    # The float64 nearest to those digits may be below the number.
    return found if found >= value else math.nextafter(found, math.inf)


def below(value: float) -> float:
    """The next number of few digits that is not above."""
    found = digits(value, ROUND_FLOOR)
    assert found is not None, "path-metrics are finite"
    return found if found <= value else math.nextafter(found, -math.inf)
