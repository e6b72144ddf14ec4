"""With what a refused model would pass: a cut before the offending operations, or other outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import fx, nn

from fxpath.errors import BLANK, Problem, SupportReport, UnsupportedModelError
from fxpath.graph.edit import inputs_first
from fxpath.graph.gating import MATRIX_PRODUCTS, PRODUCTS
from fxpath.model import Captured, Given, Model
from fxpath.rules import GATED

#: Whether a model is taken in for what is asked of it.
Passes = Callable[[Model, Given], bool]
#: What stands in the way of a captured model; ``None`` where it has no path at all.
Problems = Callable[[Captured], tuple[Problem, ...] | None]

LOST = (
    "the generalised path-norm, times max(1, |x|_inf), bounds the outputs as a path-norm does. "
    "Lost are the path-metric, with every exact certificate, and scores of parameters that only "
    "gates read"
)
#: What is said where a verb takes gates in, if it is asked to.
OFFERED = f"gates=True covers this network: {LOST}."
CUT_OFF = f'gates=True with until="{{}}" covers this network up to there: {LOST}.'
#: What is said where it does not.
ELSEWHERE = (
    "Gates are not taken in here; fxpath.analyze(..., gates=True) covers this network, by a "
    "generalised path-norm, which bounds its outputs and has no path-metric, as gates change with "
    "the weights."
)

#: Cuts that are tried before the advice stays a general one; each costs a trace.
_TRIES = 2
#: Part of a model's operations that a cut leaves at least.
_HEAD = 1 / 4


def with_advice(
    error: UnsupportedModelError,
    model: Model,
    given: Given,
    captured: Captured,
    passes: Passes,
    problems: Problems,
) -> UnsupportedModelError:
    """A refusal that names the cut or the outputs with which the model passes, if there are any.

    Args:
        error: the refusal.
        model: the model.
        given: what was asked for.
        captured: the model as captured.
        passes: whether the model is taken in if something else is asked for.
        problems: what stands in the way of a captured model.
    """
    advice = _advice(model, given, captured, error.report, passes)
    by_gates = _by_gates(model, given, captured, error.report, passes, problems)
    # A refusal says for which input it was made.
    found = replace(_named(error.report, advice), inputs=captured.inputs, advice=by_gates)
    return UnsupportedModelError(found)


def _by_gates(
    model: Model,
    given: Given,
    captured: Captured,
    report: SupportReport,
    passes: Passes,
    problems: Problems,
) -> str:
    """That the network is covered with gates, or up to where it is; empty if nothing is."""
    gated = {str(each) for each in (*GATED, *PRODUCTS, *MATRIX_PRODUCTS)}
    if captured.gates or gated.isdisjoint(problem.operation for problem in report.problems):
        return ""
    left = problems(replace(captured, gates=True))
    if left == ():
        return ELSEWHERE if given.gates is None else OFFERED
    if not left or given.gates is None or given.until is not None:
        return ""
    graph = captured.graph_module.graph
    name = _first_cut(graph, left)
    # Where gates take the cut no further, nothing is won by them.
    if not isinstance(model, nn.Module) or name in (None, _first_cut(graph, report.problems)):
        return ""
    asked = replace(given, until=name, outputs=None, gates=True)
    return CUT_OFF.format(name) if passes(model, asked) else ""


def _first_cut(graph: fx.Graph, problems: Sequence[Problem]) -> str | None:
    names = {problem.node for problem in problems}
    return next(_cuts(graph, {node for node in graph.nodes if node.name in names}), None)


def _named(report: SupportReport, advice: str) -> SupportReport:
    """Name what passes, if anything does, in place of the blank or behind the remedy."""
    if not advice:
        return report

    def named(problem: Problem) -> Problem:
        if BLANK in problem.remedy and advice.startswith("until"):
            return replace(problem, remedy=problem.remedy.replace(BLANK, advice))
        return replace(problem, remedy=f"{problem.remedy}; {advice} passes")

    return SupportReport(tuple(named(problem) for problem in report.problems))


def _advice(
    model: Model, given: Given, captured: Captured, report: SupportReport, passes: Passes
) -> str:
    """The argument with which the model passes; empty if none was found."""
    graph = captured.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    bad = {nodes[problem.node] for problem in report.problems if problem.node in nodes}
    clean = _clean_outputs(graph, captured.outputs, bad)
    if clean and given.outputs is None:
        outputs = clean[0] if len(clean) == 1 else clean
        if passes(model, replace(given, outputs=outputs)):
            return f"outputs={outputs!r}"
    if given.until is None and isinstance(model, nn.Module):
        for name in list(_cuts(graph, bad))[:_TRIES]:
            if passes(model, replace(given, until=name, outputs=None)):
                return f'until="{name}"'
    return ""


def _clean_outputs(
    graph: fx.Graph, keys: tuple[int | str, ...], bad: set[fx.Node]
) -> list[int | str]:
    """Keys of the outputs that depend on no offending node."""
    results = next(iter(reversed(graph.nodes))).args[0]
    tainted = {key for key, result in zip(keys, results, strict=True) if bad & _behind(result)}
    return [key for key in dict.fromkeys(keys) if key not in tainted]


def _cuts(graph: fx.Graph, bad: set[fx.Node]) -> Iterator[str]:
    """Modules whose output depends on no offending node, those with most in front of them first.

    What is behind such a cut is a head: where most of a model would be cut off, none is named.
    """
    last: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path and node.op == "call_function":
                last[path] = node
    before = {path: _behind(node) for path, node in last.items()}
    least = sum(node.op == "call_function" for node in graph.nodes) * _HEAD
    good = [path for path, nodes in before.items() if len(nodes) >= least and not nodes & bad]
    # Of modules with the same end, the outermost.
    yield from sorted(good, key=lambda path: (-len(before[path]), path.count(".")))


def _behind(node: fx.Node) -> set[fx.Node]:
    return set(inputs_first(node, ()))
