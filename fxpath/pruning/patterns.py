"""N:M patterns: how many of a few neighbouring input channels keep a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxpath.private import forward_pre_hooks, pruned_name, semi_structured_tiles
from fxpath.pruning.eligible import Eligible
from fxpath.sharding import placed, refuse_sharded, whole

#: Layers whose weights a pattern can be in, and the axis of their input channels.
_AXES: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 1),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 0),
}


@dataclass(frozen=True)
class NM:
    """A pattern of zeros: of each ``of`` weights in a row, at most ``keep`` are not zero.

    In a row are weights of one output channel, and one tap of a filter, for input channels that
    follow each other: in a linear layer neighbours in a row of its matrix.

    Attributes:
        keep: how many may stay, at least 1.
        of: in a row of how many, more than ``keep``.

    Example:
        >>> NM(keep=2, of=4)
        NM(keep=2, of=4)
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if any(type(n) is not int for n in (self.keep, self.of)):
            raise TypeError(f"NM(keep={self.keep!r}, of={self.of!r}): two numbers (int)")
        if not 0 < self.keep < self.of:
            raise ValueError(f"NM(keep={self.keep}, of={self.of}): 0 < keep < of")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


def refused(each: Eligible, pattern: NM) -> str:
    """Why a parameter cannot have a pattern, or nothing."""
    if each.inputs is None:
        return "its input channels lie on no axis of their own"
    if each.together % pattern.of:
        return f"{each.together} input channels are no multiple of {pattern.of}"
    return ""


def kept_by_pattern(scores: Tensor, axis: int, pattern: NM) -> Tensor:
    """The mask that keeps the highest scores of each row; of equal ones the later."""
    moved = whole(scores).movedim(axis, -1)
    rows = moved.reshape(-1, pattern.of)
    order = rows.argsort(dim=1, stable=True)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, order[:, : pattern.of - pattern.keep], False)
    return placed(mask.reshape(moved.shape).movedim(-1, axis).contiguous(), scores)


@dataclass(frozen=True)
class PatternRow:
    """One layer held against a pattern.

    Attributes:
        name: of the weight.
        shape: its shape.
        rows: into how many rows it falls; 0 where it does not.
        broken: how many of them have too many weights.
        reason: why it does not fall into rows, or nothing.
        semi_structured: ``"yes"`` if ``torch.sparse.to_sparse_semi_structured`` takes it as it is,
            else what is in the way.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    broken: int
    reason: str
    semi_structured: str


@dataclass(frozen=True)
class PatternReport:
    """What :func:`verify_pattern` found; true if every layer that can have the pattern has it.

    Attributes:
        pattern: the pattern.
        layers: one row for each convolution and linear layer.
    """

    pattern: NM
    layers: tuple[PatternRow, ...]

    def __bool__(self) -> bool:
        return not any(row.broken for row in self.layers)

    def __repr__(self) -> str:
        able = [row for row in self.layers if not row.reason]
        held = sum(not row.broken for row in able)
        return f"<PatternReport: {self.pattern} in {held} of {len(able)} weights that can have it>"

    def __str__(self) -> str:
        lines = [
            [
                row.name,
                "x".join(map(str, row.shape)),
                row.reason or (f"broken in {row.broken:,}" if row.broken else "holds"),
                row.semi_structured,
            ]
            for row in self.layers
        ]
        headers = ["weight", "shape", str(self.pattern), "to_sparse_semi_structured"]
        return tabulate(lines, headers=headers, disable_numparse=True)


@torch.no_grad()
def verify_pattern(model: nn.Module, pattern: NM) -> PatternReport:
    """Look for a pattern in the weights of convolutions and linear layers, as they are read.

    Args:
        model: a module; pruned and parametrized weights are looked at as the layers see them.
        pattern: the pattern.

    Returns:
        A :class:`~fxpath.PatternReport`, true if no layer breaks the pattern.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0, 0.0, -4.0]]))
        >>> report = verify_pattern(layer, NM(keep=2, of=4))
        >>> bool(report), report.layers[0].rows
        (True, 1)
    """
    refuse_sharded(model, "a report on its weights")
    return PatternReport(pattern, tuple(_rows(model, pattern)))


def _rows(model: nn.Module, pattern: NM) -> Iterator[PatternRow]:
    for path, module in model.named_modules():
        axis = next((a for kind, a in _AXES.items() if isinstance(module, kind)), None)
        if axis is None:
            continue
        name = f"{path}.weight" if path else "weight"
        weight = _as_read(module)
        together = weight.shape[axis] // (getattr(module, "groups", 1) if axis == 0 else 1)
        each = Eligible(name, "", name, tuple(weight.shape), True, axis, together)
        reason, rows, broken = refused(each, pattern), 0, 0
        if not reason:
            kept = (weight.movedim(axis, -1).reshape(-1, pattern.of) != 0).sum(1)
            rows, broken = len(kept), int((kept > pattern.keep).sum())
        taken = "not 2:4" if reason or broken else _semi_structured(weight, pattern)
        yield PatternRow(name, tuple(weight.shape), rows, broken, reason, taken)


def _as_read(module: nn.Module) -> Tensor:
    """A layer's weight at its next call; a pruned one in the module is that of the last call."""
    for hook in forward_pre_hooks(module).values():
        if isinstance(hook, torch_prune.BasePruningMethod) and pruned_name(hook) == "weight":
            pruned: Tensor = hook.apply_mask(module)
            return pruned
    weight: Tensor = getattr(module, "weight")  # noqa: B009  (for mypy any attribute is a module)
    return weight


def _semi_structured(weight: Tensor, pattern: NM) -> str:
    """What keeps ``torch.sparse.to_sparse_semi_structured`` from taking a weight."""
    if (pattern.keep, pattern.of) != (2, 4):
        return "not 2:4"
    if weight.dim() != 2:
        return "no matrix"
    # torch's own table: the kernels want tiles of a size that depends on the format.
    limits = semi_structured_tiles()
    if weight.dtype not in limits:
        return f"no kernel for {weight.dtype}"
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"needs multiples of {rows} x {columns}"
    return "yes" if weight.is_cuda else "yes, on a GPU"
