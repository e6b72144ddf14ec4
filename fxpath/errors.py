"""What fxpath says when a model is outside the theory."""

from __future__ import annotations

import operator
import os
import textwrap
from dataclasses import asdict, dataclass

import torch.fx
from tabulate import tabulate

from fxpath.gates import Gate, as_data, gates_line, norm_name
from fxpath.report.plain import ending
from fxpath.sample import Sample

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep

#: Stands in a remedy for the name of a module, until one is known that helps.
BLANK = 'until="..."'
#: What helps where something smooth stands at the end of a network.
CUT = f"cut the model before it with {BLANK}"
#: Headings of the table of what was taken as a gate.
_TAKEN = ("gate", "module", "at most", "signal", "by")

__all__ = ["Problem", "SupportReport", "UnsupportedModelError"]


@dataclass(frozen=True)
class Problem:
    """One operation that stands in the way of an exact result.

    Attributes:
        operation: the ATen operation, e.g. ``aten.softmax.int``.
        node: its name in the exported graph.
        module_path: qualified name of the module that called it (``""`` for the model itself).
        source_line: ``file:line: code`` of the user's call, as far as it is known.
        reason: why the theory does not cover it.
        remedy: what can be done.
    """

    operation: str
    node: str
    module_path: str
    source_line: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class SupportReport:
    """Which operations of a model are outside the model class; true if there are none.

    Example:
        >>> import torch, fxpath
        >>> report = fxpath.check(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Sigmoid()))
        >>> bool(report), [problem.operation for problem in report.problems]
        (False, ['aten.sigmoid.default'])

    Attributes:
        problems: one entry for each operation in the way.
        inputs: shapes of the sample that was traced, and whether they are an assumption; ``None``
            if tracing failed.
        gates: what was taken as a gate on the paths, if gates were asked for; where there are any,
            results are those of the generalised path-norm.
        advice: with what the model is covered all the same, and what is lost by it; ``""`` where
            nothing is known.
    """

    problems: tuple[Problem, ...]
    inputs: Sample | None = None
    gates: tuple[Gate, ...] = ()
    advice: str = ""

    @property
    def supported(self) -> bool:
        """Whether path-norm and scores of the model are exact, the generalised one with gates."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.supported

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(problem.operation for problem in self.problems))
        count = len(self.problems)
        gates = f", {len(self.gates)} gate{'s' * (len(self.gates) != 1)}" * bool(self.gates)
        found = f"{count} problem{'s' * (count != 1)}: {kinds}" if count else f"supported{gates}"
        return f"<SupportReport: {found}>"

    def __str__(self) -> str:
        traced = f"input {self.inputs}\n" if self.inputs is not None else ""
        if self.supported and self.gates:
            return f"{traced}{self._taken()}"
        if self.supported:
            return f"{traced}supported: every operation has an exact rule"
        kinds: dict[tuple[str, str, str], list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault((problem.operation, problem.reason, problem.remedy), []).append(
                problem
            )
        rows = [
            [
                p.node,
                ending(p.module_path or "(model)", 32),
                ending(p.source_line.rsplit("/", 1)[-1], 34, keep_start=True),
            ]
            for p in self.problems
        ]
        advice = [
            f"{operation}, {len(found)} time{'s' * (len(found) > 1)}: {reason}.\n  {remedy}."
            for (operation, reason, remedy), found in kinds.items()
        ]
        table = tabulate(rows, headers=["node", "module", "source"])
        advice += _wrapped(self.advice)
        return f"{traced}{table}\n\n" + "\n".join(advice)

    def _taken(self) -> str:
        """The gates, and what they make of the norm."""
        rows = [
            [
                gate.called,
                ending(gate.module_path or "(model)", 32),
                f"{gate.size:g}",
                ending(gate.signal, 24, keep_start=True),
                ending(gate.factor, 24, keep_start=True),
            ]
            for gate in self.gates
        ]
        table = tabulate(rows, headers=_TAKEN, disable_numparse=True)
        told = f"supported, with a {norm_name(self.gates)}: every operation has an exact rule or is"
        lines = _wrapped(f"{told} a gate; {gates_line(self.gates)}")
        return "\n".join([*lines, "", table])

    def to_dict(self) -> dict[str, object]:
        """The report as plain data."""
        found: dict[str, object] = {
            "supported": self.supported,
            "problems": [asdict(p) for p in self.problems],
        }
        if self.inputs is not None:
            found["inputs"] = {name: list(shape) for name, shape in self.inputs.shapes.items()}
            found["input_shape_assumed"] = self.inputs.assumed
        if self.gates:
            found |= {"norm": norm_name(self.gates), "gates": as_data(self.gates)}
        if self.advice:
            found["advice"] = self.advice
        return found


class UnsupportedModelError(ValueError):
    """Raised when no exact result exists; ``report`` lists every offending operation."""

    def __init__(self, report: SupportReport) -> None:
        """Keep the report and make it the message."""
        self.report = report
        super().__init__(f"{len(report.problems)} operation(s) have no exact rule\n\n{report}")

    def __reduce__(self) -> tuple[type, tuple[SupportReport]]:
        return type(self), (self.report,)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_on_hyphens=False)


def module_path(node: torch.fx.Node) -> str:
    """Qualified name of the innermost module that produced a node of an exported graph."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = list(stack.values())[-1][0]
    return path


def source_line(node: torch.fx.Node) -> str:
    """``file:line: code`` of the innermost frame outside of torch."""
    frames: list[tuple[str, str]] = []
    lines = (node.meta.get("stack_trace") or "").splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith('File "'):
            _, path, rest = line.split('"', 2)
            number = rest.split("line ", 1)[1].split(",", 1)[0]
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            frames.append((path, f"{path}:{number}: {code}"))
    ours = [
        text
        for path, text in frames
        if "/torch/nn/" not in path and "/torch/_" not in path and not path.startswith(_PACKAGE)
    ]
    return (ours or [text for _, text in frames] or ["unknown"])[-1]


def problem(node: torch.fx.Node, reason: str, remedy: str) -> Problem:
    """Describe a node of an exported graph that has no exact rule."""
    # An item of an operation's results is that operation's.
    called = node.args[0] if node.target is operator.getitem else node
    return Problem(
        str(getattr(called, "target", called)),
        node.name,
        module_path(node),
        source_line(node),
        reason,
        remedy,
    )
