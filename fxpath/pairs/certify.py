"""Certificates: made, and computed anew to see whether they hold."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from fxpath.certificate import Certificate, Claim, above, below, digits, fingerprint
from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.matching import Other, make_pair
from fxpath.pairs.metric import UPPER_BOUNDS, PathMetric
from fxpath.pairs.pair import Side
from fxpath.program.program import build
from fxpath.program.record import read_by


def certify(
    model: Model,
    input_shape: Shapes = None,
    *,
    reference: Other | None = None,
    q: float = 1,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> Certificate:
    """What can be claimed of a model's weights, to travel with them in a file.

    Args:
        model: as for :func:`analyze`; the one that travels, such as a pruned one.
        input_shape: as for :func:`analyze`.
        reference: what it was made from, as a model or as a state dict: then the certificate says
            how far the two are apart, ``||Phi(theta) - Phi(theta')||_1``, and relative to the
            reference's path-norm.
        q: exponent of the path-norm, as for :func:`analyze`.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.

    Returns:
        A :class:`~fxpath.Certificate`; numbers are computed in float64.

    Raises:
        UnsupportedModelError: as :func:`analyze`.
        ValueError: as :func:`path_metric`.
        FloatingPointError: as :func:`path_metric`.

    Example:
        >>> import fxpath
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> pruned = fxpath.prune(model, 0.5).model()
        >>> claim = fxpath.certify(pruned, reference=model).claim
        >>> claim.inequality, claim.exact, claim.lower <= claim.value <= claim.upper
        ('(7)', True, True)
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    found, _ = _certified(model, reference, given, q)
    return found


@plain_mode()
@torch.no_grad()
def _certified(
    model: Model, reference: Other | None, given: Given, q: float
) -> tuple[Certificate, PathMetric | None]:
    """A certificate, and what its claim was read from."""
    found = build(model, given, q).certificate()
    if reference is None:
        return found, None
    # A reference may be a state dict, which needs the model's architecture: so the model goes first
    # here, and the two change places in what is said.
    pair = make_pair(model, reference, given)
    if pair.architecture:
        raise ValueError(
            f"{', '.join(pair.architecture)} differ: slopes, clamp bounds and fixed coefficients "
            "are architecture, and a certificate compares weights of one architecture"
        )
    metric = PathMetric(pair)
    return replace(found, claim=_claim(metric, metric.other_path_norm, pair.theirs)), metric


def _claim(metric: PathMetric, path_norm: float, reference: Side) -> Claim:
    upper = metric.upper
    relative = upper / path_norm if path_norm else math.inf
    named = {name: metric.bound(name) for name, invariant in UPPER_BOUNDS.items() if invariant}
    return Claim(
        inequality="(7)" if metric.exact else min(named, key=named.__getitem__),
        exact=metric.exact,
        value=None if metric.value is None else digits(metric.value),
        lower=below(metric.lower),
        upper=above(upper),
        relative=above(relative) if math.isfinite(relative) else None,
        path_norm=_number(path_norm),
        weights=_sha(reference),
    )


def _sha(side: Side) -> str:
    read = read_by(side.captured, side.module)
    return fingerprint({name: side.tensors[key] for key, name in read.items()})


def _number(value: float) -> float:
    found = digits(value)
    assert found is not None, "path-metrics are finite"
    return found


@plain_mode()
@torch.no_grad()
def verify(
    certificate: Certificate,
    model: Model,
    *,
    reference: Other | None = None,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compute a certificate anew, and say what differs.

    Weights are compared by their SHA-256, the claim's upper bounds by ``<=`` without any tolerance:
    what is computed now must not exceed what is claimed.  Norms and shares are compared in the
    digits that a certificate has.

    Args:
        certificate: as :func:`load_certificate` reads it.
        model: with the weights that it is about.
        reference: as for :func:`certify`; needed where the certificate has a claim.
        example_inputs: as for :func:`analyze`, where shapes alone do not say what the inputs are.
        example_kwargs: as for :func:`analyze`.

    Returns:
        One line for everything that differs; the certificate holds if there is none.

    Raises:
        ValueError: if a reference is missing, or given to a certificate without a claim.
        UnsupportedModelError: as :func:`certify`.

    Example:
        >>> import fxpath
        >>> model = torch.nn.Linear(2, 1)
        >>> certificate = fxpath.certify(model)
        >>> fxpath.verify(certificate, model)
        []
        >>> _ = model.weight.data.mul_(2)
        >>> fxpath.verify(certificate, model)[0][:35]
        'the weights are others: SHA-256 is '
    """
    if (reference is None) != (certificate.claim is None):
        raise ValueError(
            "the certificate compares weights with others: pass reference="
            if reference is None
            else "the certificate says nothing about a reference: leave it out"
        )
    told = example_inputs is not None or example_kwargs is not None
    given = Given(
        None if told else _shapes(certificate, model),
        example_inputs,
        example_kwargs,
        certificate.batch_dim,
        certificate.until,
        certificate.outputs,
    )
    now, metric = _certified(model, reference, given, certificate.q)
    found = list(_differences(certificate, now))
    if certificate.claim is not None and now.claim is not None and metric is not None:
        found += _unclaimed(certificate.claim, now.claim)
        found += _unproved(certificate.claim, metric)
    return found


def _shapes(certificate: Certificate, model: Model) -> Shapes:
    """Shapes as the model takes its inputs: by position, or by name where there is no other way."""
    shapes = certificate.inputs
    if not isinstance(model, nn.Module):
        return shapes if len(shapes) > 1 else next(iter(shapes.values()), None)
    known = inspect.signature(model.forward).parameters
    placed = [name for name, each in known.items() if each.kind <= each.POSITIONAL_OR_KEYWORD]
    open_ended = any(each.kind == each.VAR_KEYWORD for each in known.values())
    named = open_ended or all(name in known for name in shapes)
    if named and list(shapes) != placed[: len(shapes)]:
        return shapes
    return list(shapes.values()) or None


def _differences(said: Certificate, now: Certificate) -> Iterator[str]:
    """What differs about the weights themselves."""
    if said.tensors != now.tensors:
        yield (
            f"the network reads {', '.join(now.tensors)}; certified are {', '.join(said.tensors)}"
        )
    if said.weights != now.weights:
        yield f"the weights are others: SHA-256 is {now.weights}, certified {said.weights}"
    if said.inputs != now.inputs:
        yield f"the inputs are {now.inputs}, certified {said.inputs}"
    for name in ("path_norm", "log10_path_norm"):
        if not _same(getattr(said, name), getattr(now, name)):
            yield f"{name} is {getattr(now, name)}, certified {getattr(said, name)}"
    rows, certified_rows = ({row["name"]: row for row in each.layers} for each in (now, said))
    for layer in rows.keys() | certified_rows.keys():
        row, other = rows.get(layer, {}), certified_rows.get(layer, {})
        for key in row.keys() | other.keys():
            if not _same(row.get(key), other.get(key)):
                yield f"{key} of layer {layer} is {row.get(key)}, certified {other.get(key)}"


def _unclaimed(said: Claim, now: Claim) -> Iterator[str]:
    """What of a claim does not hold."""
    if said.weights != now.weights:
        yield f"the reference is another: SHA-256 is {now.weights}, certified {said.weights}"
    if not now.upper <= said.upper:
        yield f"the path-metric may be {now.upper}, certified is at most {said.upper}"
    if not said.lower <= now.lower:
        yield f"the path-metric may be {now.lower}, certified is at least {said.lower}"
    if not _at_most(now.relative, said.relative):
        yield f"relative to the reference it is {now.relative}, certified {said.relative}"
    if said.exact and not now.exact:
        yield "the path-metric is not exact, certified it is"
    for each in fields(Claim):
        if each.name in ("value", "path_norm"):
            mine, theirs = getattr(now, each.name), getattr(said, each.name)
            if not _same(mine, theirs):
                yield f"{each.name} of the claim is {mine}, certified {theirs}"


def _unproved(said: Claim, metric: PathMetric) -> Iterator[str]:
    """Whether what a claim names does say what it claims; which bound is least may be a tie."""
    if said.exact:
        holds = said.inequality == "(7)"
    elif UPPER_BOUNDS.get(said.inequality):
        holds = metric.bound(said.inequality) <= said.upper
    else:
        holds = False
    if not holds:
        yield f"{said.inequality} does not say that it is at most {said.upper}"


def _at_most(now: float | None, said: float | None) -> bool:
    return now == said if now is None or said is None else now <= said


def _same(now: Any, said: Any) -> bool:
    """Whether two entries are one, numbers but for the last of their digits."""
    if isinstance(now, float) and isinstance(said, (int, float)):
        return math.isclose(now, said, rel_tol=1e-8, abs_tol=0.0)
    return bool(now == said)
