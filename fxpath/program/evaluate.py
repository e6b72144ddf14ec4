"""One run of a lowered graph: the norm, its range, and the shares; eager or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx

from fxpath.graph import ops
from fxpath.graph.aten import ADD, ALIASES
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.modes import TRACING
from fxpath.program import adjoints
from fxpath.program.kernels.operator import KERNELS
from fxpath.program.path_norm import PathNorm, Total


@dataclass
class Run:
    """Results of one run.

    Attributes:
        total: ||Phi||_q^q.
        smallest: smallest entry of any tensor, before scaling; 0-d float64.
        mass: largest sum of a gradient of log ||Phi||_q^q; 0-d float64, ``None`` without scores.
    """

    total: Total
    smallest: Tensor
    mass: Tensor | None


def evaluate(
    norm: PathNorm,
    tensors: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None,
    raised: int = 0,
) -> Run:
    """Run a lowered graph; the shares of path mass (14) are written into ``scores``.

    With ``raised`` they are multiplied by 2 ** raised: those that would be below the number format
    are within it, and those of other entries beyond.
    """
    # Only the leaves are differentiated: nothing has to be recorded between them and the model.
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    with torch.set_grad_enabled(scores is not None):
        total: Total = norm.run(detached, scores)
        smallest = adjoints.run.least(norm.watch.scales)
        if scores is None:
            return Run(total, smallest, None)
        _share(norm, total, scores, raised)
    found = Total(total.mantissa.detach(), total.scale)
    return Run(found, smallest, adjoints.run.most(norm.watch.masses))


def _share(norm: PathNorm, total: Total, scores: Mapping[str, Tensor], raised: int) -> None:
    """Leaf * d log / d leaf (14), summed over the uses of a coordinate."""
    leaves = [leaf for _, leaf, _ in norm.leaves]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if total.mantissa.requires_grad:
        seed = adjoints.run.inverse(total.mantissa.detach())
        seed = seed * 2.0**raised if raised else seed
        # What is streamed writes its scores while this runs.
        _, *grads = torch.autograd.grad(
            total.mantissa, [norm.anchor, *leaves], seed, allow_unused=True
        )
    first: dict[str, Tensor | None] = {}
    again: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for (name, leaf, converted), grad in zip(norm.leaves, grads, strict=True):
            if converted and grad is not None:
                norm.watch.masses.append(adjoints.run.mass(grad))
            if name not in first:
                first[name] = grad
            elif grad is not None:
                again.append((scores[name], leaf.detach(), grad))
        # The first use has its leaf where its scores go.
        found = {name: grad for name, grad in first.items() if grad is not None}
        adjoints.run.times_([scores[name] for name in found], list(found.values()))
        for name in first:
            if name not in found:
                adjoints.run.clear_(scores[name])
        for out, leaf, grad in again:
            adjoints.run.plus_(out, leaf, grad)


def score_shapes(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Coordinate name -> shape."""
    return {
        str(arguments(node)[1]): tuple(node.meta["val"].shape)
        for node in module.graph.nodes
        if node.target is ops.coordinate
    }


def coordinates(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], names: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Entries of the effective parameter vector theta, one array after the other.

    Args:
        module: a lifted graph.
        tensors: the model's tensors by the names of the graph's placeholders.
        names: of the coordinates that are asked for; all of them by default.
    """
    read = [
        node
        for node in module.graph.nodes
        if node.target is ops.coordinate and (names is None or arguments(node)[1] in names)
    ]
    for node, value in evaluated(module, tensors, read):
        yield str(arguments(node)[1]), value


def _can_generate() -> bool:
    """Whether Inductor finds a C++ compiler; one line says so if not."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn(
            "no C++ compiler found, so nothing is generated and large linear layers run eagerly: "
            "install g++ or clang, or set CXX",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _as_captured(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    """The backend: run what was captured, as it is.

    For the whole graph Inductor has nothing to generate: every step is an operator of its own.  On
    ResNet-18 its wrapper ran slower, after 20 s of compiling instead of 3.  What profits from
    generated code, a sweep over a large weight, asks for it itself (``fxpath.program.kernels``).
    The kernels are called without the dispatcher in between, and Dynamo must not look into them:
    weighing each Python function that they call took it a tenth of the time.
    """
    for node in graph.graph.nodes:
        node.target = KERNELS.get(node.target, node.target)
    graph.recompile()
    disabled: Callable[..., Any] = torch.compiler.disable(graph.forward)
    return disabled


class Compiled:
    """The same run through ``torch.compile``: traced once into one flat graph, then compiled."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, q: float) -> None:
        """Nothing is compiled before the first call."""
        self._norm = PathNorm(module, dtype, q)
        self._norm.generated = _can_generate()
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, tensors: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None) -> Run:
        """Run; the shares of path mass (14) are written into ``scores``."""
        values = [tensor.detach() for tensor in tensors.values()]
        buffers = [] if scores is None else list(scores.values())
        # A trace holds for one form of tensors: layers change theirs, as by model.double().
        form = scores is None, *((t.dtype, t.stride(), t.device) for t in (*values, *buffers))
        with torch.no_grad():
            if form in self._compiled:
                found = self._compiled[form](*values, *buffers)
            else:
                found = self._first(form, list(tensors), values, scores, buffers)
        mantissa, scale, smallest, *mass = found
        return Run(Total(mantissa, scale), smallest, mass[0] if mass else None)

    def _first(
        self,
        form: Any,
        keys: list[str],
        values: list[Tensor],
        scores: Mapping[str, Tensor] | None,
        buffers: list[Tensor],
    ) -> Any:
        """The first run for one form, which compiles; other threads wait for it."""
        with TRACING:
            if form not in self._compiled:
                names = None if scores is None else list(scores)
                traced = self._trace(keys, values, names, buffers)
                compiled = torch.compile(
                    traced, fullgraph=True, dynamic=False, backend=_as_captured
                )
                found = compiled(*values, *buffers)
                # Known to others only now: a second thread must not compile it at the same time.
                self._compiled[form] = compiled
                return found
        return self._compiled[form](*values, *buffers)

    def _trace(
        self,
        keys: list[str],
        values: list[Tensor],
        names: list[str] | None,
        buffers: list[Tensor],
    ) -> fx.GraphModule:
        def flat(*arguments: Tensor) -> list[Tensor]:
            tensors = dict(zip(keys, arguments, strict=False))
            scores = dict(zip(names, arguments[len(keys) :], strict=True)) if names else None
            run = evaluate(self._norm, tensors, scores)
            found = [run.total.mantissa, run.total.scale, run.smallest]
            return found if run.mass is None else [*found, run.mass]

        return _tidy(
            make_fx(flat, _allow_non_fake_inputs=True, tracing_mode="fake")(*values, *buffers)
        )


def _tidy(traced: fx.GraphModule) -> fx.GraphModule:
    """Leave nothing to generate code for, and nothing that only autograd needed."""
    for node in traced.graph.nodes:
        if node.target in ALIASES:
            node.replace_all_uses_with(node.args[0])
        elif node.target is ADD and len(node.all_input_nodes) == 2:
            a, b = (n.meta["val"] for n in node.all_input_nodes)
            if a.shape == b.shape and a.dtype == b.dtype and not node.kwargs:
                node.target = adjoints.run.sum_of.default
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced
