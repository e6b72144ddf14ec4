"""A captured model as pruning sees it: scores under masks, and what masks cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpath.model import Given, named_tensors
from fxpath.pairs.erasure import Erasure, estimated_loss
from fxpath.pruning.criterion import Criterion, checked_scores, scores_of
from fxpath.pruning.eligible import Eligible
from fxpath.pruning.pruned import with_state
from fxpath.sharding import is_sharded, local, placed, whole

#: Entries that are added up at once.
_BLOCK = 1 << 17


class Source:
    """The model, and the parameters of which entries may go.

    Attributes:
        erasure: the captured model.
        chosen: those parameters.
    """

    def __init__(
        self, model: nn.Module, given: Given, erasure: Erasure, chosen: Sequence[Eligible]
    ) -> None:
        """Nothing is evaluated before it is asked for."""
        self.erasure = erasure
        self.chosen = chosen
        self._model, self._given = model, given
        self._memory: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}

    def scores(self, criterion: Criterion, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of the network that the masks leave."""
        if criterion == "path_magnitude":
            return checked_scores(self._path_magnitude(masks), self.chosen)
        model = with_state(self._model, self.state(self.erased(masks))) if masks else self._model
        found = scores_of(criterion, model, self._given, self.chosen)
        tensors = self.erasure.side.tensors
        # Scores that each rank has whole.
        keys = {each.name: each.key for each in self.chosen}
        return {n: s if is_sharded(s) else placed(s, tensors[keys[n]]) for n, s in found.items()}

    def _path_magnitude(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = self.erased(masks) if masks else None
        evaluation = self.erasure.program.evaluate(True, out=self._shares, tensors=tensors)
        self._shares = evaluation.shares
        return evaluation.shares

    def erased(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors by placeholder, with zeros where the masks cut.

        The same memory at each call: what it returned before is overwritten.
        """
        tensors = dict(self.erasure.side.tensors)
        for each in self.chosen:
            dense = tensors[each.key]
            if each.key not in self._memory:
                self._memory[each.key] = torch.empty_like(dense)
            # Not a product: a mask must leave no -0 behind.
            torch.where(
                local(masks[each.name]).to(dense.device),
                *(local(dense), local(dense).new_zeros(())),
                out=local(self._memory[each.key]),
            )
            tensors[each.key] = self._memory[each.key]
        return tensors

    def estimated(self, masks: Mapping[str, Tensor]) -> float:
        """About what :meth:`lost` says, in a tenth of the time."""
        erasure = self.erasure
        return estimated_loss(erasure.program, erasure.side.tensors, self.erased(masks))

    def lost(self, masks: Mapping[str, Tensor]) -> float:
        """The relative path-metric to the dense network, never less than it is."""
        return self.erasure.metric(self.erased(masks)).relative_upper

    def crossed(self) -> dict[str, Tensor]:
        """Which entries a path of the dense network crosses, or are zero: bool, by name."""
        shares = self._path_magnitude({})
        tensors = self.erasure.side.tensors
        return {e.name: (shares[e.name] > 0) | (tensors[e.key] == 0) for e in self.chosen}

    def path_magnitude_shares(self, masks: Mapping[str, Tensor], known: bool) -> dict[str, float]:
        """Sum of Path-Mag over what is cut of each tensor, (13), as a part of the path-norm.

        Args:
            masks: the masks.
            known: whether the last scores were Path-Mag of the dense network.
        """
        shares = self._shares if known else self._path_magnitude({})
        return {e.name: _sum_without(masks[e.name], shares[e.name]) for e in self.chosen}

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's state dict with those tensors; nothing in it is the model's own."""
        named = named_tensors(self._model)
        zeroed = {id(named[each.parameter]): tensors[each.key] for each in self.chosen}
        state: dict[str, Tensor] = {}
        taken: set[int] = set()
        for name, value in self._model.state_dict().items():
            # A tied parameter is one tensor under several names; each name gets one of its own.
            own = id(named.get(name))
            held = zeroed.get(own, value)
            fresh = own in zeroed and own not in taken
            # A module may store more than tensors (get_extra_state).
            state[name] = held if fresh else copy.deepcopy(_detached(held))
            taken.add(own)
        return state


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _sum_without(mask: Tensor, values: Tensor) -> float:
    """Sum of the values where a mask is false, in float64, block by block."""
    entries = whole(mask).flatten(), whole(values).flatten()
    blocks = zip(*(each.split(_BLOCK) for each in entries), strict=True)
    return sum(float((v * ~m.to(v.device)).sum(dtype=torch.float64)) for m, v in blocks)
