"""Does the smaller model compute what the masked one does, and if not, which line is to blame?"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.errors import UnsupportedModelError, module_path, source_line
from fxpath.graph.aten import CASTS
from fxpath.model import Captured, Given
from fxpath.passes import take_in
from fxpath.pruning.channels import Channels

#: Largest difference between the outputs, of their largest entry.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Fault:
    """Where the smaller model fails, or computes something else.

    Attributes:
        reason: what is wrong there.
        source_line: the line of the model's code.
        nodes: the operations of the original model to blame, as far as they are known.
    """

    reason: str
    source_line: str
    nodes: tuple[fx.Node, ...] = ()


def compare(
    captured: Captured,
    found: Channels,
    gone: Tensor,
    masked: Mapping[str, Tensor],
    smaller: nn.Module,
    given: Given,
    exact: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Captured, fx.GraphModule] | Fault:
    """Capture the smaller model, and run it beside the masked one on random inputs, in float64.

    Args:
        captured: the original model.
        found: its channels.
        gone: which of them the smaller model lacks, as a mask of their numbers.
        masked: tensors of the original model by name, where they are masked.
        smaller: the smaller model.
        given: its inputs.
        exact: tensors of the smaller model by name, as they were before they were rounded to the
            model's number format.

    Returns:
        The smaller model as :func:`fxpath.passes.take_in` gives it, or what is wrong with it.
    """
    try:
        other, lifted = take_in(smaller, given)
    except UnsupportedModelError as error:
        problem = error.report.problems[0]
        nodes = _blamed(captured, problem.module_path, [problem.source_line, *_calls(error)])
        line = source_line(nodes[0]) if nodes else problem.source_line
        said = problem.reason.removeprefix("torch.export cannot trace the model: ")
        return Fault(f"sizes are written into the code: with fewer channels {said}", line, nodes)
    live = {captured.tensors[key]: key for key in captured.tensors}
    tensors = captured.live() | {live[name]: each for name, each in masked.items() if name in live}
    ours = _Double(captured, tensors)
    rounded = {key: exact[name] for key, name in other.tensors.items() if name in exact}
    theirs = _Double(other, other.live() | rounded)
    pairs = zip(ours.outputs(), theirs.outputs(), strict=True)
    if all(_agree(a, b) for a, b in pairs):
        return other, lifted
    return _first_difference(ours, theirs, found, gone)


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    return bool((a - b).abs().max() <= TOLERANCE * torch.maximum(a.abs(), b.abs()).max())


def _calls(error: BaseException) -> list[str]:
    """``file:line`` of the calls that led to the error behind an error, the innermost first."""
    trace = None if error.__cause__ is None else error.__cause__.__traceback__
    frames = traceback.extract_tb(trace)
    return [f"{frame.filename}:{frame.lineno}" for frame in reversed(frames)]


def _blamed(captured: Captured, path: str, lines: Sequence[str]) -> tuple[fx.Node, ...]:
    """Operations of a module that a line of code calls; of either, if none is of both.

    The first line that any is on counts: a graph knows the lines of ``forward`` methods, and not
    those of functions that they call.
    """
    nodes = [n for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    inside = [n for n in nodes if module_path(n) == path]
    # A problem may name the line without its code.
    by_line = [
        [n for n in nodes if source_line(n) == line or source_line(n).startswith(f"{line}:")]
        for line in lines
    ]
    both = ([n for n in each if n in set(inside)] for each in by_line)
    found = next(filter(None, both), []) or (inside if path else [])
    return tuple(found or next(filter(None, by_line), []))


class _Double(fx.Interpreter):
    """Runs a captured graph in float64 on random inputs; casts between formats do nothing."""

    def __init__(self, captured: Captured, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(captured.graph_module, garbage_collect_values=False)
        self._tensors = tensors
        self.values: dict[fx.Node, Any] = {}

    def outputs(self) -> list[Tensor]:
        """Its floating-point outputs."""
        generator = torch.Generator().manual_seed(0)
        graph: Any = self.module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            results: Any = self.run(*(self._given(node, generator) for node in placeholders))
        return [x for x in results if isinstance(x, Tensor) and x.is_floating_point()]

    def _given(self, node: fx.Node, generator: torch.Generator) -> Any:
        value = self._tensors.get(node.name, node.meta.get("val"))
        if not isinstance(value, Tensor):
            return value
        if node.name not in self._tensors:
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            # Integers may be positions in a table.
            value = (drawn if value.is_floating_point() else drawn * 0).to(
                value.device, value.dtype
            )
        return _double(value.detach())

    def run_node(self, n: fx.Node) -> Any:
        if n.target in CASTS:
            result = self.fetch_args_kwargs_from_env(n)[0][0]
        else:
            result = fx.node.map_aggregate(super().run_node(n), _double)
        self.values[n] = result
        return result


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _first_difference(ours: _Double, theirs: _Double, found: Channels, gone: Tensor) -> Fault:
    """The first operation that gives something else than the original on the channels left."""
    sides = ([n for n in run.values if n.op == "call_function"] for run in (ours, theirs))
    for a, b in zip(*sides, strict=False):
        if a.target != b.target:
            return Fault("the model takes another way with fewer channels", source_line(a), (a,))
        channels = found.shown(a)
        whole, left = ours.values[a], theirs.values[b]
        if channels is None or not isinstance(whole, Tensor) or channels.dim() != whole.dim():
            continue
        for axis, size in enumerate(channels.shape):
            if size > 1:
                lines = gone[channels].movedim(axis, 0).flatten(1).all(1)
                whole = whole.index_select(axis, (~lines).nonzero().flatten().to(whole.device))
        if whole.shape != left.shape:
            shapes = f"{tuple(left.shape)} instead of {tuple(whole.shape)}"
            return Fault(
                f"sizes are written into the code: with fewer channels it gives {shapes}",
                source_line(a),
                (a,),
            )
        if not _agree(whole, left):
            return Fault(
                "with fewer channels it computes something else: what it does depends on their "
                "number",
                source_line(a),
                (a,),
            )
    return Fault("the outputs differ from those of the masked model", "unknown")
