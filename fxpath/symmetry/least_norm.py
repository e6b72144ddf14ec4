"""The representative of least l^2 norm among all rescalings of a network.

Every entry w of the effective parameters, from a channel of group j to one of group i, becomes
``w exp(a_i - a_j)``, and a bias ``b exp(a_i)``; :mod:`fxpath.symmetry.balancing` finds the a of the
least sum of squares.  The weights are summed once, into one number for each pair of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.model import Captured
from fxpath.passes.followed import require_followed
from fxpath.program.evaluation import fitted
from fxpath.symmetry.balancing import Balance, balance, bounded
from fxpath.symmetry.effective import EffectiveLabelling
from fxpath.symmetry.groups import ChannelGroups
from fxpath.symmetry.labels import FIXED
from fxpath.symmetry.masses import (
    Ends,
    chunks,
    coordinates,
    ends_by_group,
    ends_of,
    squares,
)


class Canonical:
    """Sizes of all entries of theta at the representative of least norm.

    What depends on the lifted graph alone is found once; the weights may change between calls.
    """

    def __init__(self, captured: Captured, lifted: fx.GraphModule) -> None:
        """Label the network."""
        self.captured, self.lifted = captured, lifted
        require_followed(captured, lifted, "a factor of a channel must not move what gates read")
        labelling = EffectiveLabelling(captured, lifted)
        roots = labelling.forest.roots()
        stays = roots == FIXED
        for labels in labelling.rigid:
            stays[roots[labels[labels >= 0]]] = True
        stays = stays[roots]
        free, numbers = torch.unique(roots[~stays], return_inverse=True)
        # -1, the last place of the table, is for what nothing reads.
        of = torch.zeros(len(roots) + 1, dtype=torch.int64)
        of[:-1][~stays] = 1 + numbers
        of[-1] = -1
        self._groups = 1 + len(free)
        self._ends: dict[fx.Node, Ends] = {}
        for node in coordinates(lifted):
            carried = labelling.entries.get(node)
            sides = (None, None) if carried is None else (carried.out, carried.into)
            self._ends[node] = ends_of(node, *(None if x is None else of[x] for x in sides))

    def scores(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Coordinate name -> sizes, in ``dtype``, or in float64 where it does not hold them.

        Raises:
            ValueError: for an effective value that is no number, by name.
            FloatingPointError: if float64 does not suffice.
        """
        live = self.captured.live()
        found = balance(list(squares(self.lifted, live, self._ends)), self._groups)
        scores: dict[str, Tensor] = {}
        for node, value in evaluated(self.lifted, live, list(self._ends)):
            name = str(arguments(node)[1])
            score = _sizes(value, self._ends[node], found, dtype)
            if name in scores:  # one parameter that two batch norms make two arrays of
                score = fitted(torch.hypot(scores[name].double(), score.double()), dtype)
            scores[name] = score
        return scores


def least_norm_factors(
    captured: Captured, lifted: fx.GraphModule, found: ChannelGroups, free: Tensor
) -> Tensor:
    """Factors of channel groups for which the effective parameters have the least l^2 norm.

    Where no factors attain the minimum (channels that no input reaches, or that reach no output),
    they stay 1 but for what keeps the norm from growing.  ``free`` says which groups can have a
    factor.

    Returns:
        Tensor ``[groups]`` float64; 0 or inf where float64 does not hold a factor.

    Raises:
        ValueError: for an effective value that is no number, by name.
        FloatingPointError: if float64 does not suffice.
    """
    ends = ends_by_group(lifted, found, free)
    masses = list(squares(lifted, captured.live(), ends))
    return bounded(masses, balance(masses, 1 + len(found)))[1:].exp()


# -- from factors to scores ------------------------------------------------------------------------


def _sizes(value: Tensor, ends: Ends, found: Balance, dtype: torch.dtype) -> Tensor:
    """``|w| exp(a_out - a_in)``, and 0 between two components."""
    rows = value.reshape(1) if value.dim() == 0 else value
    sizes = torch.empty(rows.shape, dtype=dtype, device=value.device)
    limits = torch.finfo(dtype)
    for start, stop in chunks(rows):
        out, into = ends.rows(start, stop)
        # Half of the factor, twice: it may be beyond float64 where the product is not.
        half = ((found.logs[out] - found.logs[into]) / 2).exp()
        inner = (found.component[out] == found.component[into]) & (out >= 0)
        half = torch.where(inner, half, 0.0).to(value.device)
        size = rows[start:stop].abs().double() * half * half
        if dtype != torch.float64 and bool(
            (((size > 0) & (size < limits.tiny)) | (size > limits.max)).any()
        ):
            return _sizes(value, ends, found, torch.float64)
        if not bool(size.isfinite().all()):
            raise FloatingPointError("a size at the least norm does not fit into float64")
        sizes[start:stop] = size
    return sizes.reshape(value.shape)
