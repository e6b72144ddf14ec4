"""What ``analyze`` returns."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from fxpath.program.coverage import find_unscored, summary
from fxpath.program.evaluation import Evaluation
from fxpath.program.layers import Channels, Layer, find_layers, layers_at, neuron_shares
from fxpath.program.overlay import overlay
from fxpath.program.program import PathProgram
from fxpath.program.rows import LayerRow, layer_row
from fxpath.sample import Sample


class Analysis:
    """Path-norm and Path-Mag scores of one model.

    Attributes:
        q: exponent of the path-norm.
        inputs: shapes of the sample that was analysed, and whether they are an assumption.
        path_norm: ``||Phi(theta)||_q``; ``inf`` only where float64 cannot hold it.
        log10_path_norm: decimal logarithm of ``||Phi(theta)||_q``; -inf if the norm is 0.
        scores: parameter name -> tensor of its shape: the *shares* Path-Mag / path-norm, the part
            of all path mass that runs through each entry.  For q other than 1 shares of
            ``||Phi(theta)||_q^q``.
        unscored: name of each parameter that is not in ``scores`` -> why: ``slope`` and ``bound``
            (they belong to the architecture), ``normalization factor, part of 0.weight`` (what a
            frozen batch norm multiplies the weight before it by), ``part of 0.weight`` (the layer's
            weight is computed from it, and scored as such), ``same tensor as 0.weight``, ``unused``
            (no output depends on it) or ``not reached by a path``.
        neuron_shares: layer name -> share of path mass through each of its output channels,
            ``[channels]``.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 1.0], [0.0, -4.0]]))
        >>> analysis = fxpath.analyze(model, (2,))
        >>> round(analysis.path_norm, 5), analysis.scores["0.weight"].tolist()
        (8.0, [[0.375, 0.125], [0.0, 0.5]])
        >>> fxpath.analyze(torch.nn.Sequential(model, torch.nn.PReLU()), (2,)).unscored
        {'1.weight': 'slope'}
    """

    def __init__(
        self,
        q: float,
        inputs: Sample,
        evaluation: Evaluation,
        layers: Mapping[Layer, Channels],
        unscored: dict[str, str],
        nodes: Mapping[str, str],
    ) -> None:
        """Analyses are made by :func:`fxpath.analyze`."""
        self.q = q
        self.inputs = inputs
        self.scores: dict[str, Tensor] = evaluation.shares
        self.path_norm: float = evaluation.path_norm
        self.log10_path_norm: float = evaluation.log10_path_norm
        self.unscored = unscored
        self._evaluation = evaluation
        self._layers = list(layers)
        self._nodes = dict(nodes)
        self.neuron_shares: dict[str, Tensor] = {
            layer.name: neuron_shares(layer, channels, self.scores)
            for layer, channels in layers.items()
        }

    @classmethod
    def of(cls, program: PathProgram) -> Analysis:
        """Evaluate a program once."""
        evaluation = program.evaluate(scores=True, details=True)
        given, shares = program.given, evaluation.shares
        cut = given is not None and (given.until, given.outputs) != (None, None)
        unscored = find_unscored(program.captured, program.lifted, shares, cut)
        layers, at = find_layers(program.lifted), layers_at(program.lifted)
        nodes = {origin.name: layer.name for origin, (layer, _) in at.items()}
        return cls(program.q, program.captured.inputs, evaluation, layers, unscored, nodes)

    def path_magnitude(self, name: str) -> Tensor:
        """Absolute Path-Mag (10) of one parameter: ``||Phi(theta) - Phi(theta_-i)||_1`` per entry.

        Args:
            name: a key of ``scores``.

        Returns:
            Tensor of the parameter's shape, >= 0; for q other than 1 in units of ``||Phi||_q^q``.
            In the scores' dtype, or in float64 where that has no digits for small entries.

        Raises:
            KeyError: if ``name`` has no score.
            OverflowError: if an entry is too large for the scores' dtype, or too small for float64;
                ``log10_path_norm`` and the scores are not.
        """
        if name not in self.scores:
            raise KeyError(f"{name!r} has no score; scored are {', '.join(self.scores)}")
        shares = self.scores[name]
        try:
            return self._evaluation.absolute(name)
        except OverflowError:
            raise OverflowError(
                f"Path-Mag of {name} does not fit {shares.dtype}: the path-norm is "
                f"10^{self.log10_path_norm:.2f}; use scores[{name!r}] (shares) and log10_path_norm"
            ) from None

    @cached_property
    def layers(self) -> list[LayerRow]:
        """One row for each layer, in order of execution."""
        return [layer_row(layer, self._evaluation) for layer in self._layers]

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as plain data for JSON (an infinite number becomes ``None``)."""
        norm, log10 = self.path_norm, self.log10_path_norm
        return {
            "q": self.q,
            "inputs": {name: list(shape) for name, shape in self.inputs.shapes.items()},
            "input_shape_assumed": self.inputs.assumed,
            "path_norm": norm if math.isfinite(norm) else None,
            "log10_path_norm": log10 if math.isfinite(log10) else None,
            "parameters": sum(score.numel() for score in self.scores.values()),
            "layers": [{**row, "shape": list(row["shape"])} for row in self.layers],
            "unscored": dict(self.unscored),
        }

    def to_model_explorer(self, path: str | Path) -> None:
        """Write an overlay for Model Explorer, which colours a graph's layers by their share.

        In Model Explorer, open the program that ``torch.export.export`` makes of the model in eval
        mode (or the program that was analysed), and load the file as node data, there or by
        ``ModelExplorerConfig.add_node_data_from_path``.

        Args:
            path: of the file, a JSON file by convention.

        Example:
            >>> import tempfile, torch, fxpath
            >>> path = Path(tempfile.mkdtemp()) / "shares.json"
            >>> fxpath.analyze(torch.nn.Linear(2, 1)).to_model_explorer(path)
            >>> sorted(json.loads(path.read_text())["graph"]["results"])
            ['linear']
        """
        shares = {row["name"]: row["share"] for row in self.layers}
        data = overlay({node: shares[layer] for node, layer in self._nodes.items()})
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        table = tabulate(self._cells(), headers="keys")
        text = f"{self._headline()}\ninput {self.inputs}\n{self._legend()}\n\n{table}"
        return "\n".join([text, *textwrap.wrap(self._coverage(), 100)])

    def _repr_html_(self) -> str:
        table = tabulate(self._cells(), headers="keys", tablefmt="html")
        text = html.escape(f"{self._headline()}; input {self.inputs}. {self._legend()}")
        coverage = f"<p>{html.escape(self._coverage())}</p>" if self.unscored else ""
        return f"<p>{text}</p>{table}{coverage}"

    def __repr__(self) -> str:
        return f"<Analysis: {self._headline()}, input {self.inputs}>"

    def _headline(self) -> str:
        scored = sum(score.numel() for score in self.scores.values())
        norm = self.path_norm
        shown = f"{norm:.6g}" if math.isfinite(norm) else "beyond float64"
        return (
            f"l^{self.q:g} path-norm {shown} (log10 {self.log10_path_norm:.4f}), "
            f"{scored:,} scored parameters"
        )

    def _legend(self) -> str:
        return (
            "share: path mass that crosses the layer; p10, p50, p90: quantiles of "
            "Path-Mag / path-norm"
        )

    def _coverage(self) -> str:
        return summary(self.unscored) if self.unscored else ""

    def _cells(self) -> list[dict[str, str]]:
        """Table cells, at most 100 columns in all."""
        return [
            {
                "layer": _shorten(row["name"]),
                "op": row["operation"],
                "shape": _by(row["shape"]),
                "params": f"{row['parameters']:,}",
                "zeros": f"{row['sparsity']:.1%}",
                "share": f"{row['share']:.4f}",
                **{f"p{k[:-1]}": f"{v:.1e}" for k, v in row["quantiles"].items()},
            }
            for row in self.layers
        ]


def _shorten(name: str, width: int = 20) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
