"""What a certificate says of one set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.certificate import Certificate, digits, fingerprint
from fxpath.model import Captured, Given
from fxpath.program.evaluation import Evaluation
from fxpath.program.layers import find_layers
from fxpath.program.rows import Crossed, crossed
from fxpath.version import __version__


def read_by(captured: Captured, lifted: fx.GraphModule) -> dict[str, str]:
    """The tensors that a network reads: placeholder -> name."""
    return {
        str(node.target): captured.tensors[str(node.target)]
        for node in lifted.graph.nodes
        if node.op == "placeholder" and node.users and str(node.target) in captured.tensors
    }


def record(
    captured: Captured,
    lifted: fx.GraphModule,
    given: Given,
    evaluation: Evaluation,
    tensors: Mapping[str, Tensor],
) -> Certificate:
    """The certificate of some weights.

    Args:
        captured: the model.
        lifted: its lifted graph.
        given: what the caller said of inputs and outputs.
        evaluation: with scores and details, in float64.
        tensors: the weights that were evaluated, by placeholder.
    """
    sample = captured.inputs
    read = read_by(captured, lifted)
    return Certificate(
        weights=fingerprint({name: tensors[key] for key, name in read.items()}),
        tensors=tuple(sorted(read.values())),
        inputs={name: sample.own(shape) for name, shape in sample.shapes.items()},
        batch_dim=sample.batch_dim,
        until=given.until,
        outputs=_outputs(given),
        q=evaluation.q,
        path_norm=digits(evaluation.path_norm),
        log10_path_norm=digits(evaluation.log10_path_norm),
        layers=tuple(_row(crossed(layer, evaluation)) for layer in find_layers(lifted)),
        versions={"fxpath": __version__, "torch": torch.__version__},
    )


def _row(row: Crossed) -> dict[str, Any]:
    """A row of an analysis in the digits of a certificate."""
    return {**row, "share": digits(row["share"]), "sparsity": digits(row["sparsity"])}


def _outputs(given: Given) -> tuple[int | str, ...] | None:
    if given.outputs is None or isinstance(given.outputs, (int, str)):
        return None if given.outputs is None else (given.outputs,)
    return tuple(given.outputs)
