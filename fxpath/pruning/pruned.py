"""What ``prune`` returns."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxpath.certificate import MEMBER, Certificate, fingerprint
from fxpath.model import Given, named_tensors
from fxpath.pairs.bounds import Bound
from fxpath.pairs.certify import certify
from fxpath.pairs.metric import PathMetric
from fxpath.pruning.masks import deep_copy, refresh, write_masks
from fxpath.report import plots
from fxpath.report.plain import by_module
from fxpath.report.table import Column, Table, Tabular
from fxpath.sharding import refuse_sharded

if TYPE_CHECKING:
    from fxpath.report.plots import Axes

#: Said under every table: a zero is no speed by itself.
RUNTIMES = (
    "Zeros are faster or smaller in these runtimes: TensorRT (2:4 patterns), OpenVINO (sparse "
    "MatMul), XNNPACK (1 x 1 convolutions), Core ML (size on disk). Others compute with them as "
    "with any number; fxpath.prune_channels makes a smaller network for all of them."
)

#: Columns of every table of a pruned model.
COLUMNS = (
    Column("parameter", "parameter", "text", ""),
    Column("shape", "shape", "text", ""),
    Column("entries", "entries", "count", "how many entries it has", shown=False),
    Column("requested", "asked for", "part", "part of its entries that was asked for"),
    Column("pruned", "pruned", "count", "entries that the mask cuts"),
    Column("zeros", "zeros", "part", "part of its entries that is zero"),
    Column("lost", "lost at most", "part", "Path-Mag of what is cut, as a part of the norm"),
    Column("note", "note", "text", "why it was left alone, or that nothing is left of it"),
)


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning does to one parameter.

    Attributes:
        name: of the parameter.
        shape: its shape.
        requested: the share of its entries that was asked for, in [0, 1]; ``None`` where entries of
            all layers were ranked together.
        pruned: how many entries the mask cuts.
        sparsity: part of its entries that is zero then, in [0, 1], those that were before included.
        lost: sum of Path-Mag over what is cut of it, as a part of the path-norm: the bound (13).
        note: why it was left alone, or nothing.
    """

    name: str
    shape: tuple[int, ...]
    requested: float | None
    pruned: int
    sparsity: float
    lost: float
    note: str

    @property
    def empty(self) -> bool:
        """Whether nothing is left of it."""
        return math.prod(self.shape) > 0 and self.sparsity == 1


@dataclass(frozen=True, eq=False)
class Pruned(Tabular):
    """Masks for a model, the weights that they leave, and what is lost.

    Attributes:
        state_dict: all of the model's entries, with zeros where a mask cuts; all of them copies.
        masks: parameter name -> bool tensor of its shape, True = kept; a mask for every parameter
            that could be pruned.
        bound: for a network with gates the inductive :class:`fxpath.Bound` of how far outputs can
            be from the dense model's, for inputs in [-1, 1]; ``None`` for one without, or where the
            inside of a gate is not followed.
        path_magnitude_share: sum of Path-Mag over the entries that are cut, as a part of the
            path-norm: the bound (13) on ``certificate.relative``, right to four digits or better.
        layers: one row for each parameter that could be pruned, in order of execution.
        criterion: the criterion's name, or ``"custom"``.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
    bound: Bound | None
    path_magnitude_share: float
    layers: tuple[PrunedLayer, ...]
    criterion: str
    _dense: nn.Module
    _given: Given
    _certificate: PathMetric | None

    @property
    def certificate(self) -> PathMetric:
        """The exact :class:`fxpath.PathMetric` to the model that was pruned, by (7).

        The functions differ by at most ``max(||x||_inf, 1)`` times it (5).

        Raises:
            ValueError: for a network with gates, which change with the weights; see ``bound``.
        """
        if self._certificate is None:
            raise ValueError(
                "a network with gates has no exact certificate: gates change with the weights, and "
                "no path-metric bounds that; `bound` holds the inductive bound"
            )
        return self._certificate

    @property
    def sparsity(self) -> float:
        """Part of the entries that could be pruned that is zero, in [0, 1]."""
        entries = [math.prod(row.shape) for row in self.layers]
        zeros = sum(row.sparsity * n for row, n in zip(self.layers, entries, strict=True))
        return zeros / max(1, sum(entries))

    @torch.no_grad()
    def model(self) -> nn.Module:
        """A deep copy of the model with the zeros; its tensors are its own.

        Example:
            >>> import fxpath
            >>> layer = nn.Linear(4, 2, bias=False)
            >>> pruned = fxpath.prune(layer, 0.5).model()
            >>> int((pruned.weight == 0).sum()), int((layer.weight == 0).sum())
            (4, 0)
        """
        return with_state(self._dense, self.state_dict)

    def save(self, path: str | Path) -> None:
        """Write the masks into a safetensors file, for :func:`fxpath.load_masks`.

        Its metadata name the format, the criterion, the SHA-256 of both state dicts, before and
        after (:func:`fxpath.certificate.fingerprint`), and hold the :meth:`record`.  The weights
        before are those that the model has when this is called.

        Args:
            path: of the file, by convention with the ending ``.safetensors``.
        """
        refuse_sharded(self._dense, "a file of masks")
        write_masks(
            path,
            self.masks,
            {
                "criterion": self.criterion,
                "dense": fingerprint(self._dense.state_dict()),
                "pruned": fingerprint(self.state_dict),
                **self.claimed(),
            },
        )

    def claimed(self) -> dict[str, str]:
        """The :meth:`record` as an entry of a file's metadata; none for a network with gates."""
        return {} if self._certificate is None else {MEMBER: self.record().to_json()}

    def record(self) -> Certificate:
        """What is claimed of the weights that are left, to travel with them.

        It is computed again from both sets of weights, as :func:`fxpath.verify` does.

        Raises:
            ValueError: for a network with gates, as :attr:`certificate`.
        """
        assert self.certificate is not None
        return certify(self.model(), reference=self._dense, **self._given.told())

    def table(self, depth: int | None = None) -> Table:
        """A row for each parameter that could be pruned, with fixed columns.

        Args:
            depth: sums by module, down to this depth of dotted names: 1 for the outermost modules.

        Raises:
            ValueError: if ``depth`` is below 1.

        Example:
            >>> import fxpath
            >>> fxpath.prune(nn.Linear(4, 2), 0.5).to_pandas()["pruned"].tolist()
            [4]
        """
        groups = by_module(self.layers, lambda row: row.name, depth)
        rows = tuple(_summed(name, group) for name, group in groups.items())
        # A column with nothing in it is no news.
        said = {name: any(row[name] for row in rows) for name in ("requested", "note")}
        columns = (dataclasses.replace(c, shown=said.get(c.name, c.shown)) for c in COLUMNS)
        return Table(f"{self.sparsity:.1%} zeros", tuple(columns), rows)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def to_dict(self) -> dict[str, Any]:
        """All but tensors as plain data: rows, and the certificate's numbers."""
        return {
            "norm": "path-norm" if self._exact else "generalised path-norm",
            "criterion": self.criterion,
            "sparsity": self.sparsity,
            "path_magnitude_share": self.path_magnitude_share,
            "certificate": self._certificate and self._certificate.to_dict(),
            "bound": self.bound and self.bound.to_dict(),
            "layers": [dict(row) for row in self.table().rows],
        }

    def plot(self, *, dark: bool = False) -> list[Axes]:
        """Draw sparsity against what is lost for certain, by parameter and in all.

        Args:
            dark: light lines on a dark ground.

        Returns:
            Two matplotlib axes, zeros and losses, of one figure; the last row is all together.

        Raises:
            ImportError: if matplotlib is not installed; the extra ``report`` brings it.
        """
        norm = "path-norm" if self._exact else "generalised path-norm"
        rows = self.table().rows
        return plots.pruned(rows, self.sparsity, self._lost, dark, norm, self._exact)

    def __str__(self) -> str:
        table = self.table()
        total = {"parameter": "all", "shape": "", "note": "", "zeros": self.sparsity}
        total["pruned"] = sum(row.pruned for row in self.layers)
        total["lost"] = self._lost
        lost = f"{self._said()}: {self.path_magnitude_share:.3%}"
        shown = dataclasses.replace(table, rows=(*table.rows, total))
        return f"{shown}\n\n{lost}\n\n{textwrap.fill(RUNTIMES, 100)}"

    def __repr__(self) -> str:
        lost = f"{self._lost:.3%} lost"
        if not self._exact:
            lost = f"at most {self._lost:.3%} of the generalised path-norm lost"
        return f"<Pruned: {self.sparsity:.1%} zeros, {lost}>"

    @property
    def _exact(self) -> bool:
        """Whether it is known what is lost: not with gates."""
        return self._certificate is not None

    @property
    def _lost(self) -> float:
        """Part of the path-norm that is lost, or at most so much of a generalised one."""
        metric = self._certificate
        return self.path_magnitude_share if metric is None else metric.relative

    def _said(self) -> str:
        metric = self._certificate
        if metric is not None:
            return (
                f"path-metric to the dense model, exact (7): {metric.upper:.6g}, "
                f"{metric.relative:.3%} of the path-norm\n"
                "bounded by the sum of Path-Mag of what is cut (13)"
            )
        far = "not bounded: something inside a gate is not followed, or jumps"
        if self.bound is not None:
            far = f"at most {self.bound.value:.6g} in the l^1 norm, for inputs in [-1, 1]"
        return (
            "a network with gates has no exact certificate, as they change with the weights; "
            f"outputs can be apart: {far}\n"
            "part of the generalised path-norm that is cut at most"
        )


@torch.no_grad()
def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of a model with the entries of a state dict."""
    copied = deep_copy(model)
    for name, tensor in named_tensors(copied).items():
        if name in state:
            tensor.data.copy_(state[name])
    refresh(copied)
    return copied


def _summed(name: str, group: Sequence[PrunedLayer]) -> dict[str, Any]:
    """One row of the table, for one parameter or all of a module."""
    entries = [math.prod(row.shape) for row in group]
    zeros = sum(row.sparsity * n for row, n in zip(group, entries, strict=True))
    (first, *more) = group
    return {
        "parameter": name,
        "shape": "" if more else "x".join(map(str, first.shape)),
        "entries": sum(entries),
        "requested": None if more else first.requested,
        "pruned": sum(row.pruned for row in group),
        "zeros": zeros / max(1, sum(entries)),
        "lost": sum(row.lost for row in group),
        "note": "; ".join(dict.fromkeys(filter(None, map(_note, group)))),
    }


def _note(row: PrunedLayer) -> str:
    return "cut altogether: no path crosses it" if row.empty else row.note
