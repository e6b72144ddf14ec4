"""What ``analyze`` returns."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxpath.gates import Gate, as_data, gates_line, norm_name
from fxpath.program.coverage import find_unscored
from fxpath.program.evaluation import Evaluation
from fxpath.program.findings import Finding, find
from fxpath.program.layers import Channels, Layer, find_layers, layers_at, neuron_shares
from fxpath.program.overlay import overlay
from fxpath.program.program import PathProgram
from fxpath.program.rows import LayerRow, layer_row
from fxpath.program.scores import Scores
from fxpath.program.spread import Spread
from fxpath.program.tables import make_report, make_table
from fxpath.report import plots
from fxpath.report.page import page
from fxpath.report.plain import ending, written
from fxpath.report.table import Table, Tabular
from fxpath.sample import Sample
from fxpath.sharding import any_sharded, own_class

if TYPE_CHECKING:
    from fxpath.report.plots import Axes


class Analysis(Tabular):
    """Path-norm and Path-Mag scores of one model.

    Of a model with gates, taken in with ``gates=True``, all norms here are *generalised* path-norms
    ``||Phi(theta)||_q``, each path times the size of the gates on it.  For q = 1 that bounds the
    l^1 norm of the outputs by ``max(||x||_inf, 1)`` times it, as the path-norm does; no path-metric
    follows from it.

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
            (no output depends on it), ``inside a gate, which has no path mass`` or ``not reached by
            a path``.
        gates: what was taken as a gate on the paths, a :class:`~fxpath.Gate` each, in order of
            execution; empty unless gates were asked for and there are some.
        neuron_shares: layer name -> share of path mass through each of its output channels,
            ``[channels]``.

    Of a sharded model, :meth:`path_magnitude` and ``table(depth=...)`` are collective calls, which
    every rank makes; what else is asked of an analysis, a single rank may ask.

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
        model: str,
        gates: tuple[Gate, ...] = (),
    ) -> None:
        """Analyses are made by :func:`fxpath.analyze`."""
        self.q = q
        self.inputs = inputs
        self.scores: dict[str, Tensor] = Scores(evaluation.shares, unscored)
        self.path_norm: float = evaluation.path_norm
        self.log10_path_norm: float = evaluation.log10_path_norm
        self.unscored = unscored
        self.gates = gates
        self._evaluation = evaluation
        self._layers = list(layers)
        self._nodes = dict(nodes)
        self._model = model
        self.neuron_shares: dict[str, Tensor] = {
            layer.name: neuron_shares(layer, channels, self.scores)
            for layer, channels in layers.items()
        }
        # Shares that float64 makes zeros of are zeros here only if they are.
        seen = {**evaluation.shares, **evaluation.raised}
        self._dead = {
            layer.name: int((neuron_shares(layer, channels, seen) == 0).sum())
            for layer, channels in layers.items()
            if layer.prunable
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
        model = own_class(program.captured.source).__name__
        taken = (program.q, program.captured.inputs)
        found = cls(*taken, evaluation, layers, unscored, nodes, model, program.gates)
        if any_sharded(shares.values()):
            # Now that all ranks are here: later one of them may print it alone.
            _ = found.findings, found.report()
        return found

    def path_magnitude(self, name: str) -> Tensor:
        """Absolute Path-Mag (10) of one parameter: ``||Phi(theta) - Phi(theta_-i)||_1`` per entry.

        Args:
            name: a key of ``scores``.

        Returns:
            Tensor of the parameter's shape, >= 0; for q other than 1 in units of ``||Phi||_q^q``.
            In the scores' dtype, or in float64 where that has no digits for small entries.

        Raises:
            KeyError: if ``name`` has no score, with the reason, or the names that are close.
            OverflowError: if an entry is too large for the scores' dtype, or too small for float64;
                ``log10_path_norm`` and the scores are not.
        """
        shares = self.scores[name]
        try:
            return self._evaluation.absolute(name)
        except OverflowError:
            raise OverflowError(
                f"Path-Mag of {name} does not fit {shares.dtype}: the {norm_name(self.gates)} is "
                f"10^{self.log10_path_norm:.2f}; use scores[{name!r}] (shares) and log10_path_norm"
            ) from None

    @cached_property
    def _spreads(self) -> dict[str, Spread]:
        """How the shares of each layer's weights (or biases, if it has nothing else) are spread."""
        main = {layer.name: layer.weight or layer.bias for layer in self._layers}
        return {name: Spread([self.scores[key]]) for name, key in main.items() if key is not None}

    @cached_property
    def layers(self) -> list[LayerRow]:
        """One row for each layer, in order of execution."""
        return [
            layer_row(
                layer,
                self._evaluation,
                self._spreads[name],
                channels=len(self.neuron_shares[name]),
                dead=self._dead.get(name, 0),
            )
            for layer in self._layers
            for name in [layer.name]
        ]

    @cached_property
    def findings(self) -> list[Finding]:
        """What the numbers say, as data, such as layers that nearly no path mass crosses.

        See :class:`fxpath.Finding` for the kinds; nothing is listed where there is nothing to say.
        """
        gated = bool(self.gates)
        return find(self.layers, self._spreads, self._prunable, self.unscored, self.q, gated)

    @property
    def _prunable(self) -> list[str]:
        return [layer.name for layer in self._layers if layer.prunable]

    def table(self, depth: int | None = None) -> Table:
        """The layers as a table with fixed columns, each with its meaning.

        Args:
            depth: sums by module, down to this depth of dotted names: 1 for the outermost modules.
                The share then is a sum: how many of the module's layers path mass crosses on
                average; effective weights and quantiles are those of all weights together.

        Raises:
            ValueError: if ``depth`` is below 1.

        Example:
            >>> import torch, fxpath
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
            >>> [row["layer"] for row in fxpath.analyze(model).table().rows]
            ['0', '1']
        """
        return make_table(self._headline(), self.layers, self._spreads, depth)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def report(self) -> dict[str, Any]:
        """What :meth:`plot` and :meth:`to_html` draw, as plain data: rows, histograms, a curve."""
        return make_report(
            f"{self._model}, l^{self.q:g} {norm_name(self.gates)} {self._summary()[0][1]}",
            self.table(),
            self._summary(),
            self.findings,
            self._spreads,
            self._prunable if self.q == 1 else [],
            self.unscored,
            self.gates,
            self.gates_line(),
        )

    def plot(self, *, dark: bool = False) -> list[Axes]:
        """Draw the share and the distribution of scores by layer.

        Args:
            dark: light lines on a dark ground.

        Returns:
            Two matplotlib axes, shares and quantiles of scores, of one figure (``axes[0].figure``).

        Raises:
            ImportError: if matplotlib is not installed; the extra ``report`` brings it.
        """
        return plots.analysis(self.report(), dark)

    def to_html(self, path: str | Path) -> None:
        """Write a page for a browser that needs no network.

        Args:
            path: of the file.
        """
        written(page(self.report()), path)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as plain data for JSON (an infinite number becomes ``None``)."""
        norm, log10 = self.path_norm, self.log10_path_norm
        return {
            "norm": norm_name(self.gates),
            "q": self.q,
            "inputs": {name: list(shape) for name, shape in self.inputs.shapes.items()},
            "input_shape_assumed": self.inputs.assumed,
            "path_norm": norm if math.isfinite(norm) else None,
            "log10_path_norm": log10 if math.isfinite(log10) else None,
            "parameters": sum(score.numel() for score in self.scores.values()),
            "layers": [{**row, "shape": list(row["shape"])} for row in self.layers],
            "findings": [vars(finding) for finding in self.findings],
            "unscored": dict(self.unscored),
            "gates": as_data(self.gates),
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
        table = self.table()
        said = [finding.text for finding in self.findings]
        legend = textwrap.wrap(table.legend(), 100)
        paragraphs = [line for text in said for line in textwrap.wrap(text, 100)]
        taken = textwrap.wrap(self.gates_line(), 100, break_on_hyphens=False)
        head = [self._headline(), self.input_line(), *taken, "", str(shortened(table)), ""]
        return "\n".join([*head, *legend, *([""] if said else []), *paragraphs])

    def _repr_html_(self) -> str:
        table = self.table()
        said = "".join(f"<p>{html.escape(finding.text)}</p>" for finding in self.findings)
        taken = f"; {self.gates_line()}" * bool(self.gates)
        text = html.escape(f"{self._headline()}; {self.input_line()}{taken}. {table.legend()}")
        return f"<p>{text}</p>{table.to_html()}{said}"

    def __repr__(self) -> str:
        return f"<Analysis: {self._headline()}, input {self.inputs}>"

    def input_line(self) -> str:
        """For which input the numbers are, and what to do where that was assumed."""
        told = "; pass input_shape= for inputs of another size" * self.inputs.assumed
        return f"input {self.inputs}{told}"

    def gates_line(self) -> str:
        """What was taken as a gate, and what follows; empty where nothing was."""
        return gates_line(self.gates, self.q)

    def _headline(self) -> str:
        scored = sum(score.numel() for score in self.scores.values())
        norm = self.path_norm
        shown = f"{norm:.6g}" if math.isfinite(norm) else "beyond float64"
        return (
            f"l^{self.q:g} {norm_name(self.gates)} {shown} (log10 {self.log10_path_norm:.4f}), "
            f"{scored:,} scored parameters"
        )

    def _summary(self) -> list[tuple[str, str]]:
        norm = self.path_norm
        zeros = sum(row["sparsity"] * self._spreads[row["name"]].entries for row in self.layers)
        entries = sum(spread.entries for spread in self._spreads.values())
        return [
            (norm_name(self.gates), f"{norm:.6g}" if math.isfinite(norm) else "beyond float64"),
            ("its decimal logarithm", f"{self.log10_path_norm:.4f}"),
            ("exponent q", f"{self.q:g}"),
            ("input", str(self.inputs)),
            ("scored parameters", f"{sum(row['parameters'] for row in self.layers):,}"),
            ("parameters without a score", f"{len(self.unscored):,} tensors"),
            *([("gates on its paths", f"{len(self.gates):,}")] * bool(self.gates)),
            ("layers", f"{len(self.layers):,}"),
            ("weights that are zero", f"{zeros / max(1, entries):.1%}"),
        ]


def shortened(table: Table, width: int = 22) -> Table:
    """The same table with layer names of at most so many letters, their ends kept."""
    rows = [{**row, "layer": ending(row["layer"], width)} for row in table.rows]
    return dataclasses.replace(table, rows=tuple(rows))
