"""One graph that ``torch.compile`` captured, and what fxpath found out about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxpath.errors import SupportReport
from fxpath.program.analysis import Analysis


@dataclass(frozen=True)
class Part:
    """One captured graph: a whole model, or what lies between two graph breaks.

    One of ``analysis``, ``report`` and ``reason`` says what was found, the others are ``None``.

    Attributes:
        index: its number in the report, in order of compilation.
        compile_id: torch's own number of it, ``frame/compilation``: what is compiled again keeps
            the first and counts on in the second.
        source_line: ``file:line: code`` of its first operation, as far as it is known.
        inputs: input name -> shape of the example that it was captured with, batch axis included.
        dynamic: input name -> axes whose length may change without another compilation; they were
            analysed with the lengths in ``inputs``.
        numbers: numbers that may change likewise, with the values that they were analysed with.
        analysis: path-norm and scores, of the whole example: a batch of n counts n times.
        report: the operations that have no exact rule.
        reason: why there is nothing to analyse, or why it failed.
    """

    index: int
    compile_id: str
    source_line: str
    inputs: dict[str, tuple[int, ...]]
    dynamic: dict[str, tuple[int, ...]]
    numbers: dict[str, float]
    analysis: Analysis | None = None
    report: SupportReport | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The part as plain data, as it stands in a report."""
        found: dict[str, Any] = {
            "part": self.index,
            "compile_id": self.compile_id,
            "source_line": self.source_line,
            "status": self._status(),
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "dynamic": {name: list(axes) for name, axes in self.dynamic.items()},
            "numbers": dict(self.numbers),
        }
        if self.analysis is not None:
            found |= {k: v for k, v in self.analysis.to_dict().items() if k not in _SAMPLE}
        elif self.report is not None:
            found["problems"] = self.report.to_dict()["problems"]
        else:
            found["reason"] = self.reason
        return found

    def _status(self) -> str:
        if self.analysis is not None:
            return "analysed"
        return "unsupported" if self.report is not None else "not analysed"


#: What an analysis says of its inputs, which a part says itself.
_SAMPLE = ("inputs", "input_shape_assumed")
