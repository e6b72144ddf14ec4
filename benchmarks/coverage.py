"""How many published classifiers are exact, generalised (with gates) or refused.

`python -m benchmarks.coverage --library torchvision`, or `timm`, of which it takes the first
network of each family in each module.  Weights have no values where that suffices: nothing is
evaluated.  Each network is looked at in a process of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from benchmarks.timing import options, positive, write_json
from fxpath.errors import UnsupportedModelError
from fxpath.model import Captured
from fxpath.passes import Given, Setting, capture, fold, lift
from fxpath.program.gates import find_taken

__all__ = ["KINDS", "classify", "main", "table"]

#: What may become of a network.
KINDS = ("exact", "generalised", "refused")
#: Sides of images, the first that a network runs on is taken.
SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 384, 448)
#: A network with more parameters is only looked at without their values.
LARGEST = 200_000_000
#: Stands in the way where a network is no one graph, which may be for want of values.
EXPORT = "torch.export.export"

Make = Callable[[], nn.Module]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("coverage", __doc__.split("\n")[0], repeats=None)
    parser.add_argument("--library", choices=("torchvision", "timm"), default="torchvision")
    parser.add_argument("--limit", type=positive, help="look at so many networks")
    parser.add_argument("--seconds", type=positive, default=180, help="for one network")
    arguments = parser.parse_args(argv)
    networks = dict(_torchvision() if arguments.library == "torchvision" else _timm())
    rows = []
    for name in list(networks)[: arguments.limit]:
        rows.append({"model": name, **_apart(networks[name], arguments.seconds)})
        print(f"{name}: {rows[-1]['kind']} {rows[-1]['because']}", flush=True)
    print(f"\n{table(rows)}")
    write_json(arguments.json, rows)
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """How many of each kind, and which operations stand in the way of most networks."""
    count = Counter(row["kind"] for row in rows)
    lines = [(kind, count[kind], f"{count[kind] / max(1, len(rows)):.0%}") for kind in count]
    why = Counter(name for row in rows if row["kind"] == "refused" for name in row["because"])
    return "\n\n".join(
        (
            tabulate(lines, headers=["kind", "networks", "part"]),
            tabulate(why.most_common(12), headers=["refused for, with gates", "networks"]),
        )
    )


def classify(make: Make) -> dict[str, Any]:
    """What becomes of a network.

    Args:
        make: makes it, on torch's default device.

    Returns:
        ``kind``, one of :data:`KINDS` or why there is none; ``side`` of its images, the first of
        :data:`SIDES` that it takes; ``because``: operations that are gates, or that stand in the
        way although gates are taken in, with their number.

    Example:
        >>> found = classify(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.SiLU()))
        >>> found["kind"], found["because"]
        ('generalised', {'silu': 1})
    """
    parameters = 0
    with contextlib.suppress(Exception):  # what needs values says so in many ways
        with torch.device("meta"):
            model = make().eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found = _looked_at(model)
        if EXPORT not in found["because"]:
            return found
    if parameters > LARGEST:
        return _row("too large", None, {})
    return _looked_at(make().eval())


def _looked_at(model: nn.Module) -> dict[str, Any]:
    side = next((side for side in SIDES if _runs(model, side)), None)
    if side is None:
        raise ValueError(f"it runs on no image of {SIDES}")
    try:
        captured = capture(model, Given((3, side, side)))
    except UnsupportedModelError as error:  # it is no one graph
        return _row("refused", side, _operations(error))
    with contextlib.suppress(UnsupportedModelError):
        _lifted(captured, gates=False)
        return _row("exact", side, {})
    try:
        lifted = _lifted(captured, gates=True)
    except UnsupportedModelError as error:
        return _row("refused", side, _operations(error))
    return _row("generalised", side, Counter(g.called for g in find_taken(captured, lifted)))


def _lifted(captured: Captured, gates: bool) -> fx.GraphModule:
    captured.gates = gates
    setting = Setting(captured)
    return lift(fold(captured.graph_module, setting), setting)


def _operations(error: UnsupportedModelError) -> Counter[str]:
    return Counter(problem.operation for problem in error.report.problems)


def _row(kind: str, side: int | None, because: dict[str, int]) -> dict[str, Any]:
    return {"kind": kind, "side": side, "because": dict(because)}


def _runs(model: nn.Module, side: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    # Whatever a network raises, it does not run.
    except Exception:
        return False
    return True


def _apart(make: Make, seconds: float) -> dict[str, Any]:
    """The same in a process of its own, whose memory is given back."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_report, args=(make, theirs))
    worker.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(seconds) else _row("late", None, {})
    except EOFError:
        found = _row("failed", None, {"the process ended": 1})
    worker.kill()
    worker.join()
    return found


def _report(make: Make, connection: Any) -> None:
    warnings.simplefilter("ignore")
    try:
        found = classify(make)
    # Other people's code may raise anything, and the next network is to be looked at.
    except Exception as error:
        found = _row("failed", None, {f"{type(error).__name__}: {error}"[:200]: 1})
    connection.send(found)


def _torchvision() -> Iterator[tuple[str, Make]]:
    """Every classifier of torchvision."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield name, lambda name=name: torchvision.models.get_model(name, weights=None)


def _timm() -> Iterator[tuple[str, Make]]:
    """The first network of each family in each module of timm."""
    import timm

    for module in timm.list_modules():
        families: dict[str, str] = {}
        for name in timm.list_models(module=module):
            families.setdefault(re.split(r"[\d_]", name)[0], name)
        for name in families.values():
            yield name, lambda name=name: timm.create_model(name, pretrained=False)


if __name__ == "__main__":
    sys.exit(main())
