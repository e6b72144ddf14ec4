"""What a newcomer types and prints: names, short reprs, errors that help."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fxpath


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2))


def results() -> dict[str, Any]:
    model, other = net(), net()
    with torch.no_grad():
        other[0].weight.mul_(0.5)
    lifting = fxpath.path_lifting(nn.Linear(2, 1), x=torch.ones(2))
    channels = fxpath.prune_channels(model, 0.3)
    return {
        "Analysis": fxpath.analyze(model),
        "PathProgram": fxpath.compile(model, backend="eager"),
        "SupportReport": fxpath.check(nn.Sequential(model, nn.Softmax(1))),
        "PathMetric": fxpath.path_metric(model, other),
        "Bound": fxpath.lipschitz_bound(model, other),
        "Certificate": fxpath.certify(other, reference=model),
        "Pruned": fxpath.prune(model, 0.3),
        "PrunedChannels": channels,
        "Plan": channels.plan,
        "Quantized": fxpath.quantize(model, bits=8),
        "ChannelGroups": fxpath.channel_groups(model),
        "PathLifting": lifting,
        "Table": fxpath.analyze(model).table(),
    }


def test_every_result_has_a_repr_of_one_line() -> None:
    for name, result in results().items():
        text = repr(result)
        assert text.strip("<").startswith(name) and len(text) < 160 and "\n" not in text, text
        assert " at 0x" not in text and "tensor(" not in text


def test_dir_is_the_api() -> None:
    assert set(dir(fxpath)) == {*fxpath.__all__, "__version__"}


@pytest.mark.parametrize(
    "name, said",
    [
        ("0.wieght", "close: 0.weight"),
        ("1.weight", "has no score: slope"),
        ("nothing alike", "scored are 0.weight, 0.bias, 2.weight, 2.bias"),
    ],
)
def test_scores_say_why_there_is_none(name: str, said: str) -> None:
    analysis = fxpath.analyze(net())
    for scores in (analysis.scores, copy.deepcopy(analysis.scores)):
        with pytest.raises(KeyError, match=said):
            scores[name]
    with pytest.raises(KeyError, match=said):
        pickle.loads(pickle.dumps(analysis)).path_magnitude(name)
    assert analysis.scores.get(name) is None and name not in analysis.scores


def test_a_name_is_one_quantity() -> None:
    model = net()
    absolute, shares = fxpath.path_magnitude(model), fxpath.criteria.path_shares(model)
    norm = fxpath.path_norm(model)
    for name, share in shares.items():
        torch.testing.assert_close(absolute[name], share * norm)
    with pytest.warns(DeprecationWarning, match="path_shares"):
        old = fxpath.criteria.path_magnitude(model)
    assert all(torch.equal(old[name], share) for name, share in shares.items())
