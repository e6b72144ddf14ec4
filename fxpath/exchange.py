"""Commands about files that other tools share: `export`, `verify` and `bound`."""

from __future__ import annotations

import argparse
import copy
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxpath
from fxpath.capture.loading import Model, UsageError, one_line
from fxpath.capture.loading.certificates import stored_tensors
from fxpath.capture.loading.checkpoints import SUFFIXES
from fxpath.certificate import Certificate
from fxpath.explaining import (
    explained,
    heading,
    load,
    number,
    own_model,
    say,
    without_print_outs,
)
from fxpath.model import Given
from fxpath.options import model_options
from fxpath.program.program import build

__all__ = ["bound", "export", "verify"]

_WHY = (
    "Why so large? It holds for every input within --radius and every sign pattern of the ReLUs, "
    "so absolute values add up along all paths, and each layer multiplies them. Pass the radius of "
    "your inputs, and compare with the same bound for other weights: fxpath.lipschitz_bound has "
    "other norms, given inputs, and a search for how large differences get in fact."
)

_UNCERTIFIED = "no path-metric: with --gates none is asked for, as none bounds what gates do"


def export(arguments: argparse.Namespace) -> int:
    """Writes a program for other toolchains."""
    kind = "aoti" if arguments.aoti else None
    with explained(arguments.model, arguments):
        model = own_model(arguments)
        with without_print_outs(arguments):
            # There is no certificate of a network with gates, which a file has.
            program = build(model, Given(**model_options(arguments)))
            start = time.perf_counter()
            program.save(arguments.output, kind, scores=not arguments.norm_only)
    seconds = time.perf_counter() - start
    certificate = fxpath.load_certificate(arguments.output)
    rows = [
        ("path-norm", _norm(certificate)),
        ("computes", "the path-norm" if arguments.norm_only else "path-norm and scores"),
        ("weights to exchange", len(certificate.tensors)),
        ("SHA-256 of the weights", certificate.weights),
        ("written to", arguments.output),
        ("size", f"{arguments.output.stat().st_size:,} bytes"),
        ("seconds", f"{seconds:.1f}"),
    ]
    say(arguments, tabulate(rows, disable_numparse=True))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prints what a certificate says, and what of it does not hold."""
    path = arguments.file
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        certificate = fxpath.load_certificate(path)
        tensors = stored_tensors(path)
    except (ValueError, ImportError) as error:
        raise UsageError(one_line(error)) from error
    with explained(arguments.model, arguments):
        model = own_model(arguments)
        with without_print_outs(arguments):
            found, checked = _verified(certificate, model, tensors, path)
    rows: list[tuple[str, Any]] = [("path-norm", _norm(certificate))]
    if certificate.claim is not None:
        claim = certificate.claim
        rows += [
            ("path-metric to the reference", f"{claim.upper:g} at most, by {claim.inequality}"),
            ("relative to its path-norm", claim.relative),
            ("exact", "yes" if claim.exact else f"no, at least {claim.lower:g}"),
        ]
    rows.append(("compared", checked))
    rows.append(("holds", "no" if found else "yes"))
    say(arguments, tabulate(rows, disable_numparse=True))
    for line in found:
        say(arguments, f"- {line}")
    return 1 if found else 0


def _verified(
    certificate: Certificate, model: Model, tensors: Mapping[str, Tensor] | None, path: Path
) -> tuple[list[str], str]:
    """What differs, and what was looked at."""
    if certificate.claim is None:
        found = fxpath.verify(certificate, model)
        if tensors is None:
            return found, "MODEL; the file holds no weights that can be read"
        held = {name: tensors[name] for name in certificate.tensors if name in tensors}
        return found + _unlike(certificate, held, path), "MODEL, and the weights in the file"
    if tensors is None or not isinstance(model, nn.Module):
        raise UsageError(
            f"{path}: its certificate compares two sets of weights, of which the file must hold "
            "the second in a form that can be read, for a MODEL that is a module"
        )
    masks = all(tensor.dtype == torch.bool for tensor in tensors.values())
    missing = [] if masks else [name for name in certificate.tensors if name not in tensors]
    if missing:
        # MODEL's own would stand in for them, and speak for a file that does not have them.
        raise UsageError(f"{path}: lacks {', '.join(missing)}, which its certificate is about")
    travels = _with_tensors(model, tensors, path)
    found = fxpath.verify(certificate, travels, reference=model)
    return found, "MODEL as the reference, and the weights in the file"


def _unlike(certificate: Certificate, held: Mapping[str, Tensor], path: Path) -> list[str]:
    """Whether a file's own tensors are those that its certificate is about."""
    missing = [name for name in certificate.tensors if name not in held]
    if missing:
        return [f"{path} lacks {', '.join(missing)}, which the certificate is about"]
    now = fxpath.certificate.fingerprint(held)
    if now == certificate.weights:
        return []
    return [f"the weights in {path} are others: SHA-256 is {now}, certified {certificate.weights}"]


def _with_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A copy of a model with the weights, or masks, of a file."""
    copied = copy.deepcopy(model)
    own = copied.state_dict()
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise UsageError(f"{path}: the model has no {', '.join(unknown)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UsageError(f"{path}: {name} is {tuple(tensor.shape)} there")
            mask = tensor.dtype == torch.bool and own[name].dtype != torch.bool
            own[name].copy_(own[name].masked_fill(~tensor, 0.0) if mask else tensor)
            # In a narrower format they would be rounded to others, perhaps to those certified.
            if not mask and not torch.equal(own[name].double(), tensor.double()):
                raise UsageError(
                    f"{path}: {name} is {tensor.dtype} there, and the model's {own[name].dtype} "
                    "does not hold all of its entries"
                )
    return copied


def _other(arguments: argparse.Namespace) -> Model:
    """OTHER: a MODEL, or MODEL with the weights of a file; a file that is there is one."""
    path = Path(arguments.other)
    model = arguments.other.lower().endswith((".pt2", ".py"))
    if model or not (path.is_file() or arguments.other.lower().endswith(SUFFIXES)):
        return load(arguments.other, arguments)
    if not path.is_file():
        raise UsageError(f"OTHER {path}: no such file")
    try:
        return load(arguments.model, arguments, checkpoint=path)
    except UsageError as error:
        # It is read as `--checkpoint` is, which is another file here.
        raise UsageError(str(error).replace("--checkpoint ", "OTHER ", 1)) from error


def bound(arguments: argparse.Namespace) -> int:
    """Prints path-metric and Lipschitz bound between two sets of weights."""
    if arguments.max_relative is not None and not arguments.max_relative >= 0:
        raise UsageError(f"--max-relative {arguments.max_relative}: not below 0")
    options = model_options(arguments)
    with explained(arguments.model, arguments):
        model = own_model(arguments)
    with explained(arguments.other, arguments):
        other = _other(arguments)
        with without_print_outs(arguments):
            apart = fxpath.lipschitz_bound(model, other, radius=arguments.radius, **options)
            del options["gates"]
            metric = None if arguments.gates else fxpath.path_metric(model, other, **options)
    about = _UNCERTIFIED if metric is None else metric
    say(arguments, f"{heading(arguments.model, arguments)} and {arguments.other}\n{about}")
    say(
        arguments,
        f"\noutputs differ by at most {apart.value:g} in the l^1 norm, for inputs with entries in "
        f"[-{arguments.radius:g}, {arguments.radius:g}] ({apart.inequality})",
    )
    if apart.value > 0:
        say(arguments, f"\n{textwrap.fill(_WHY, 100)}\n")
    if metric is None or arguments.max_relative is None:
        return 0
    within = metric.relative_upper <= arguments.max_relative
    say(
        arguments,
        f"path-metric {metric.relative_upper:.3%} of the path-norm, accepted "
        f"{arguments.max_relative:.3%}: {'within' if within else 'beyond'}",
    )
    return 0 if within else 1


def _norm(certificate: Certificate) -> str:
    log10, norm = certificate.log10_path_norm, certificate.path_norm
    return "0" if log10 is None else number(float("inf") if norm is None else norm, log10)
