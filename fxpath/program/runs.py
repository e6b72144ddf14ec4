"""Runs of a rewritten network in the number format that suffices for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.model import Captured
from fxpath.passes import Setting
from fxpath.program.buffers import writable
from fxpath.program.evaluation import RAISED, Evaluation, fitted
from fxpath.program.fits import doubtful, short_of
from fxpath.program.flat import Flat, Run
from fxpath.program.formats import failure as _failure
from fxpath.program.record import read_by
from fxpath.program.sharded import spreads
from fxpath.program.theta import score_shapes, sparsity
from fxpath.sharding import empty_placed, whole


@dataclass(frozen=True)
class Runs:
    """Evaluates a network, again in float64 where float32 does not hold what comes out.

    Attributes:
        captured: the model.
        lifted: its lifted graph.
        flat: the graphs that are run.
        dtype: the number format to begin with.
    """

    captured: Captured
    lifted: fx.GraphModule
    flat: Flat
    dtype: torch.dtype

    def evaluate(
        self, live: Mapping[str, Tensor], scores: bool, details: bool, out: Mapping[str, Tensor]
    ) -> Evaluation:
        """See :meth:`fxpath.PathProgram.evaluate`; ``live`` are the tensors by placeholder."""
        for dtype in self.formats():
            shares = self.buffers(dtype, live, out) if scores else {}
            run = self.run(dtype, live, shares if scores else None)
            if self.healthy(dtype, run, live):
                zeros = sparsity(self.lifted, live) if details else {}
                found = self._fitted(dtype, shares, run, live)
                raised = self._raised(found, live) if details else {}
                return Evaluation(
                    run.mantissa, run.exponent, found, zeros, raised, self.flat.setting.q
                )
        raise self.failure(live)

    def read(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the network reads, by name."""
        return {name: live[key] for key, name in read_by(self.captured, self.lifted).items()}

    def run(
        self,
        dtype: torch.dtype,
        live: Mapping[str, Tensor],
        shares: Mapping[str, Tensor] | None,
        raised: int = 0,
    ) -> Run:
        """One run in one format, with the scores in given memory, or without them."""
        if shares is None:
            return self.flat.norm(live, dtype)
        return self.flat.scores(live, dtype, list(shares.values()), raised)

    def _fitted(
        self, dtype: torch.dtype, shares: dict[str, Tensor], run: Run, live: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Shares in the program's format; in float64 where that cannot hold them."""
        if dtype == torch.float64:
            return {name: fitted(share, self.dtype) for name, share in shares.items()}
        short = doubtful(self.lifted, shares, run, live)
        if not short:
            return shares
        wide = self.buffers(torch.float64, live, {})
        run = self.run(torch.float64, live, wide)
        if not self.healthy(torch.float64, run, live):
            raise self.failure(live)
        found = dict(shares)
        # In one order, as they may have to be gathered: that of a set differs from rank to rank.
        for name in sorted(short):
            again = fitted(wide[name], self.dtype)
            # What fits stands where the caller wants it; its gradient need not have fitted.
            found[name] = shares[name].copy_(again) if again.dtype == self.dtype else again
        return found

    def _raised(
        self, shares: Mapping[str, Tensor], live: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """2^RAISED times the shares of those scores that have some below float64."""
        tiny = torch.finfo(torch.float64).tiny
        low = {n: [...] for n, s in shares.items() if s.numel() and float(whole(s).amin()) < tiny}
        below = short_of(self.lifted, shares, low, live, tiny)
        if not below:
            return {}
        raised = self.buffers(torch.float64, live, {})
        self.run(torch.float64, live, raised, RAISED)
        return {
            name: raised[name]
            for name in sorted(below)
            if bool(((whole(raised[name]) > 0) & (whole(shares[name]) == 0)).any())
        }

    def buffers(
        self, dtype: torch.dtype, live: Mapping[str, Tensor], out: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Memory for the scores: the caller's own where it can be written as it is."""
        device = next((t.device for t in live.values()), torch.device("cpu"))
        sharded = spreads(self.lifted, live, self.captured.tensors)
        return {
            name: out[name]
            if name in out and writable(out[name], dtype, device)
            else empty_placed(shape, dtype, sharded[name])
            if name in sharded
            else torch.empty(shape, dtype=dtype, device=device)
            for name, shape in score_shapes(self.flat.module).items()
        }

    # -- number formats ---------------------------------------------------------------------------

    def formats(self) -> tuple[torch.dtype, ...]:
        """Those that are tried, one after the other."""
        return (self.dtype,) if self.dtype == torch.float64 else (self.dtype, torch.float64)

    def healthy(self, dtype: torch.dtype, run: Run, live: Mapping[str, Tensor]) -> bool:
        """Whether nothing over- or underflowed that exact arithmetic would have kept."""
        if not math.isfinite(run.mantissa):
            return False
        if run.mantissa == 0:
            # Whether there is no path, by counting them, which cannot underflow.
            counting = Flat(self.flat.module, Setting(self.captured, 0.0))
            return counting.norm(live, torch.float64).mantissa == 0
        fits = run.fits(dtype)
        if fits is None:
            # Some entry is small or zero: the gradient tells whether it matters.
            fits = self.run(dtype, live, self.buffers(dtype, live, {})).fits(dtype)
        return bool(fits)

    def failure(self, live: Mapping[str, Tensor]) -> Exception:
        """Why none of them sufficed."""
        return _failure(self.captured, self.lifted, live, self.flat.setting.q)
