"""Runs of a derived graph: as its own Python, or through a backend of torch.compile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph.scaling import MASS, SMALLEST
from fxpath.passes import Setting
from fxpath.passes.derive import Ending, derive
from fxpath.passes.place import into, place, stream
from fxpath.program.backends import compiled
from fxpath.program.sharded import Streamed
from fxpath.sharding import any_sharded

#: A placed graph, or one that was compiled: from tensors and memory for scores to what it found.
Callee = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What one run found: ``||Phi||_q^q = mantissa * 2 ** exponent``.

    Attributes:
        mantissa: finite, unless numbers did not fit.
        exponent: of two.
        smallest: smallest entry of any tensor, before scaling; ``None`` with a reverse half.
        mass: largest sum of a gradient of log ||Phi||_q^q; ``None`` without one.
        lows: smallest entry of each score, in each of its :func:`~fxpath.graph.products.parts`.
        highs: largest entry of what each of them is a score of.
    """

    mantissa: float
    exponent: int
    smallest: float | None
    mass: float | None
    lows: Sequence[Sequence[float]] = ()
    highs: Sequence[float] = ()

    def fits(self, dtype: torch.dtype) -> bool | None:
        """Whether nothing underflowed that counts; ``None`` if only a reverse half can tell."""
        if self.mass is not None:
            return self.mass <= MASS[dtype]
        return True if self.smallest is not None and self.smallest >= SMALLEST[dtype] else None


@dataclass(frozen=True)
class Flat:
    """All derived graphs of one lowered graph; each is made when it is first asked for.

    Attributes:
        module: the lowered graph.
        setting: whose network it is.
        backend: what runs them: ``"eager"`` is the graph's own Python, any other name is one of
            ``torch.compile``'s.
    """

    module: fx.GraphModule
    setting: Setting
    backend: str = "eager"
    _made: dict[Any, Callee] = field(default_factory=dict)

    def norm(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        """The norm alone."""
        if any_sharded(tensors.values()):
            return _run(self._streamed(tensors, dtype, "norm"))
        return _run(self.steps(tensors, dtype, "norm")())

    def scores(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        out: Sequence[Tensor],
        raised: int = 0,
    ) -> Run:
        """The norm, and shares of path mass (14), times ``2 ** raised``, in given memory.

        Where tensors are sharded, that memory is, too.
        """
        if any_sharded(tensors.values()):
            return _run(self._streamed(tensors, dtype, "scores", out, raised))
        return _run(self.steps(tensors, dtype, "scores", out, raised)())

    def gradients(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Run, Tensor, Sequence[Tensor]]:
        """The norm, its logarithm, and the gradients of that by the graph's leaves."""
        found = self.steps(tensors, dtype, "gradients")()
        log = found["mantissa"].log() + found["exponent"] * torch.log(
            found["exponent"].new_tensor(2)
        )
        return _run(found), log, found["gradients"]

    def steps(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        ending: Ending,
        out: Sequence[Tensor] = (),
        raised: int = 0,
    ) -> Callable[[], dict[str, Any]]:
        """One run on these very tensors, into ``out``, as a function that reads no number.

        It returns the numbers of :func:`~fxpath.passes.derive.derive` as tensors, so that a device
        can do all of it by itself: a CUDA graph can record it.
        """
        values = [tensors[key].detach() for key in placeholders(self.module)]
        backend = self.backend if not raised else "eager"
        callee = self._callee(ending, dtype, raised, backend, [*values, *out])

        def run() -> dict[str, Any]:
            with torch.no_grad():
                return callee(*values, *out)

        return run

    def _streamed(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        ending: Ending,
        out: Sequence[Tensor] = (),
        raised: int = 0,
    ) -> dict[str, Any]:
        """One run on sharded tensors."""
        key = (ending, dtype, raised, "streamed")
        if key not in self._made:
            derived = derive(self.module, self.setting, dtype, ending, raised)
            self._made[key] = Streamed(stream(derived, self.setting))
        with torch.no_grad():
            return self._made[key](tensors, out)

    def _callee(
        self, ending: Ending, dtype: torch.dtype, raised: int, backend: str, given: list[Tensor]
    ) -> Callee:
        # Constants stand on the device where the model's tensors were when the graph was made.
        device = given[0].device if given else None
        key = (ending, dtype, raised, device)
        if key not in self._made:
            derived = derive(self.module, self.setting, dtype, ending, raised)
            if backend == "eager":
                self._made[key] = place(derived, self.setting)
            else:
                self._made[key] = compiled(into(derived, self.setting), backend)
        return self._made[key]


def placeholders(module: fx.GraphModule) -> list[str]:
    """Names of a graph's inputs."""
    return [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]


def _run(found: dict[str, Any]) -> Run:
    """The numbers of a run: read once, at its end."""
    names = [name for name in ("mantissa", "exponent", "smallest", "mass") if name in found]
    ends = [*found.get("lows", ()), *found.get("highs", ())]
    read = [found[name] for name in names] + ends
    values = torch.cat([value.double().reshape(-1) for value in read]).tolist()
    numbers, rest = dict(zip(names, values, strict=False)), iter(values[len(names) :])
    lows = [list(itertools.islice(rest, len(low))) for low in found.get("lows", ())]
    exponent = numbers["exponent"]
    whole = int(exponent) if math.isfinite(exponent) else 0
    witnesses = numbers.get("smallest"), numbers.get("mass")
    return Run(numbers["mantissa"], whole, *witnesses, lows, list(rest))
