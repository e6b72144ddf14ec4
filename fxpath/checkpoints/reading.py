"""A file of weights for a captured model, or the reason why it is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxpath.capture.loading.checkpoints import read_checkpoint
from fxpath.capture.loading.words import UsageError
from fxpath.certificate import fingerprint
from fxpath.model import check_finite
from fxpath.pairs.common import CommonPart, Effective
from fxpath.pairs.matching import changed_numbers, names_read, state_tensors
from fxpath.version import __version__

#: What to do about a file that is refused.
_REMEDY = "leave it out, or name the model that it is of"


class Refused(Exception):
    """A file that is no checkpoint of the model; the message names it, and says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A file that was read.

    Attributes:
        file: its name, as it was given.
        stamp: see :func:`stamp`.
        effective: its weights.
    """

    file: str
    stamp: str
    effective: Effective


def stamp(file: str) -> str:
    """What changes with a file: its size and time of change, and those of its shards.

    Raises:
        Refused: if there is no such file, or it is no list of shards.
    """
    path = Path(file)
    try:
        paths = [path, *(_shards(path) if path.name.endswith(".json") else ())]
        found = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in paths]
    except OSError as error:
        raise Refused(f"{file}: no such file, or {Path(error.filename).name} beside it") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise Refused(f"{file}: not the index of a sharded checkpoint") from error
    return _short(found)


def _shards(path: Path) -> list[Path]:
    files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [path.parent / name for name in sorted(set(files))]


def setting(common: CommonPart, reference: str, radius: float) -> str:
    """What the numbers of a row depend on besides its files: the model, the reference, options.

    Args:
        common: the captured model.
        reference: name and stamp of the reference.
        radius: of the inputs.
    """
    captured, module = common.captured, common.lifted
    graph = [
        (node.op, getattr(node.target, "__qualname__", str(node.target)), str(node.args))
        for node in module.graph.nodes
    ]
    # Of the model's own tensors those count that no file has.
    stored = captured.source.state_dict
    names = set(stored if isinstance(stored, dict) else stored())
    live, read = captured.live(), names_read(captured)
    own = {name: live[key] for key, name in read.items() if name not in names}
    numbers = {**own, **captured.baked, **dict(module.named_buffers())}
    return _short([__version__, graph, fingerprint(numbers), reference, radius])


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def read(common: CommonPart, file: str, memory: Effective | None = None) -> Checkpoint:
    """A file's weights for a captured model.

    Args:
        common: the captured model.
        file: `.safetensors`, the `.index.json` of a sharded one, or a file of `torch.save`.
        memory: what is no longer needed, to be written over.

    Raises:
        Refused: if the file cannot be read, or does not hold exactly the tensors of the model, in
            their shapes and finite.
    """
    marked = stamp(file)
    try:
        tensors, given = state_tensors(common.captured, read_checkpoint(Path(file), file))
        read_by = names_read(common.captured)
        check_finite({name: tensors[key] for key, name in read_by.items()})
    except UsageError as error:
        raise Refused(str(error)) from error
    except ValueError as error:
        raise Refused(f"{file}: {error}; {_REMEDY}") from error
    changed = changed_numbers(common.captured, given)
    if changed:
        raise Refused(
            f"{file}: {', '.join(changed)} select entries or are read as numbers, and differ from "
            f"the model's, so that this is another architecture; {_REMEDY}"
        )
    try:
        return Checkpoint(file, marked, common.evaluate(tensors, memory))
    except (ValueError, FloatingPointError) as error:
        raise Refused(f"{file}: {error}; {_REMEDY}") from error
