"""What was taken as a gate, as plain data and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NO_CERTIFICATE", "Gate", "as_data", "gates_line", "norm_name"]

#: Why a program with gates is not certified, and what is left to do.
NO_CERTIFICATE = (
    "the network has gates, and there is no certificate of a generalised path-norm: who reads one "
    "takes its path-norm for one whose differences bound those of outputs, which is not so where "
    "gates change with the weights; write what was found with "
    "fxpath.analyze(..., gates=True).to_json(path), or the program alone with "
    "torch.export.save(program.exported(), path)"
)


@dataclass(frozen=True)
class Gate:
    """A place on the paths of a network where the activation of a path is in [-size, size].

    Attributes:
        operation: the ATen operation, e.g. ``aten.silu.default``.
        node: its name in the exported graph.
        module_path: qualified name of the module that called it (``""`` for the model itself).
        source_line: ``file:line: code`` of the user's call, as far as it is known.
        size: how large the gate can be, whatever the parameters and the input.
        signal: of a product, the factor that paths run through: where it comes from; else ``""``.
        factor: of a product, the factor that is the gate; ``""`` for an activation that is a gate
            of its own input, as SiLU is.
        followed: whether fxpath can compute the gate's values; norm and scores do not depend on
            them.

    Example:
        >>> import torch, fxpath
        >>> (gate,) = fxpath.analyze(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ELU(2.0)),
        ...                          gates=True).gates
        >>> gate.operation, gate.module_path, gate.size
        ('aten.elu.default', '1', 2.0)
    """

    operation: str
    node: str
    module_path: str
    source_line: str
    size: float
    signal: str
    factor: str
    followed: bool

    @property
    def called(self) -> str:
        """The operation without namespace and overload, as ``silu``."""
        return self.operation.split(".")[1] if "." in self.operation else self.operation


def norm_name(gates: Sequence[Gate]) -> str:
    """What the norm of a network is called.

    Example:
        >>> norm_name(())
        'path-norm'
    """
    return "generalised path-norm" if gates else "path-norm"


def gates_line(gates: Sequence[Gate], q: float = 1) -> str:
    """What was taken as a gate and what follows for the norm, in one line; empty without gates.

    Args:
        gates: what was taken.
        q: exponent of the norm; that of 1 bounds the outputs.

    Example:
        >>> gate = Gate("aten.silu.default", "silu", "1", "net.py:3: ...", 1.0, "", "", True)
        >>> gates_line([gate, gate], q=2)
        'gates: silu (2 times); no path-metric bounds a difference of two sets of weights'
    """
    if not gates:
        return ""
    found = Counter(_kind(gate) for gate in gates)
    kinds = [f"{kind} ({times} times)" if times > 1 else kind for kind, times in found.items()]
    unknown = sum(not gate.followed for gate in gates)
    said = [
        f"gates: {', '.join(kinds)}",
        *([f"the values of {unknown} are not followed"] * bool(unknown)),
        *(["|outputs|_1 <= this norm * max(1, |x|_inf)"] * (q == 1)),
        "no path-metric bounds a difference of two sets of weights",
    ]
    return "; ".join(said)


def _kind(gate: Gate) -> str:
    size = f" of size {gate.size:g}" * (gate.size != 1)
    of = f" by {_word(gate.factor)}" if gate.factor else ""
    return f"{gate.called}{of}{size}"


def _word(factor: str) -> str:
    """The operation of a factor without its number and its place."""
    return factor.split(" ")[0].rstrip("0123456789").rstrip("_")


def as_data(gates: Sequence[Gate]) -> list[Mapping[str, Any]]:
    """For JSON."""
    return [dict(vars(gate)) for gate in gates]
