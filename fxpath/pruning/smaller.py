"""What ``prune_channels`` returns, and how it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxpath.model import named_tensors
from fxpath.pairs.metric import PathMetric
from fxpath.pruning.plan import Plan
from fxpath.pruning.surgery import apply_plan
from fxpath.report.table import Column, Table, Tabular

#: Columns of every table of a smaller model.
COLUMNS = (
    Column("layer", "layer", "text", ""),
    Column("channels", "channels", "count", "output channels before"),
    Column("left", "left", "count", "output channels after"),
)


class ChannelRow(TypedDict):
    """The output channels of one layer."""

    name: str
    before: int
    after: int


class KeptRow(TypedDict):
    """Output channels of one layer that could not be removed, and why."""

    name: str
    channels: int
    reason: str
    source_line: str


@dataclass(frozen=True, eq=False)
class PrunedChannels(Tabular):
    """A smaller model, and what was removed to get there.

    Attributes:
        model: the smaller module, a copy.
        plan: what was removed, as plain data; :func:`fxpath.apply_plan` repeats it.
        certificate: the path-metric between the model and the masked one, whose outputs are those
            of the smaller model: exact (7), as only zeros are put in.
        layers: output channels of each layer before and after, in order of execution.
        kept: channels that stay whatever the amount, with the reason.
        channels: number of output channels of layers that are gone, and that could be.
        parameters: number of parameters before and after.
        macs: multiply-adds of one sample in the model's own layers, before and after.
    """

    model: nn.Module
    plan: Plan
    certificate: PathMetric
    layers: list[ChannelRow]
    kept: list[KeptRow]
    channels: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]

    def table(self) -> Table:
        """A row for each layer, with fixed columns.

        Example:
            >>> import fxpath
            >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
            >>> fxpath.prune_channels(model, 0.5).to_pandas()["left"].tolist()
            [2, 1]
        """
        rows = tuple(
            {"layer": row["name"], "channels": row["before"], "left": row["after"]}
            for row in self.layers
        )
        return Table("output channels", COLUMNS, rows)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def to_dict(self) -> dict[str, Any]:
        """Sizes before and after, what stays and why, and the certificate's numbers."""
        return {
            "layers": [dict(row) for row in self.layers],
            "kept": [dict(row) for row in self.kept],
            "channels": list(self.channels),
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "certificate": self.certificate.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        lines = [str(self.table()), ""]
        for what, (before, after) in (
            ("parameters", self.parameters),
            ("multiply-adds", self.macs),
        ):
            lines.append(f"{what}: {before:,} -> {after:,} ({after / max(1, before):.1%})")
        removed, removable = self.channels
        lines.append(
            f"output channels of layers: {removed:,} of {removable:,} removable ones are gone"
        )
        lines.append(f"path-norm lost: {self.certificate.relative_upper:.3%}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.kept:
            where = reasons.setdefault((row["reason"], row["source_line"]), [])
            where.append(f"{row['name']} ({row['channels']})")
        if reasons:
            lines.append("channels that stay:")
        for (reason, line), names in reasons.items():
            lines.append(f"- {reason}{f' [{line}]' if line else ''}: {', '.join(names)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        (before, after), (removed, _) = self.parameters, self.channels
        return f"<PrunedChannels: {removed} channels removed, {before:,} -> {after:,} params>"

    def save(self, path: str | Path) -> None:
        """Write plan and tensors into one safetensors file; :func:`fxpath.load_pruned` reads it.

        Args:
            path: of the file; one that is there is overwritten.

        Raises:
            ValueError: if the model's state dict holds something else than tensors.
        """
        state = self.model.state_dict()
        other = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise ValueError(f"{', '.join(other)}: no tensor, which safetensors does not hold")
        stored: dict[str, Tensor] = {}
        seen: set[int] = set()
        named = named_tensors(self.model)
        for name, value in state.items():
            # A tied tensor is written once.
            if id(named.get(name, value)) not in seen:
                seen.add(id(named.get(name, value)))
                stored[name] = value.detach().cpu().contiguous()
        save_file(stored, path, metadata={"format": "pt", "fxpath.plan": self.plan.to_json()})


def load_pruned(path: str | Path, model: nn.Module) -> nn.Module:
    """A smaller model from a file that :meth:`PrunedChannels.save` wrote.

    Args:
        path: the file; nothing in it is trusted or executed.
        model: the model before pruning, such as a new one from its constructor; it is not changed.

    Returns:
        A smaller copy with the file's tensors.

    Raises:
        ValueError: for a file of another kind, a plan that does not fit the model, tensors that are
            missing, unexpected, or of another shape or number format.

    Example:
        >>> import fxpath, tempfile
        >>> make = lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxpath.prune_channels(make(), 0.5).save(f"{folder}/small.safetensors")
        ...     model = load_pruned(f"{folder}/small.safetensors", make())
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error})") from None
    if "fxpath.plan" not in metadata:
        raise ValueError(f"{path} holds no plan: PrunedChannels.save() writes one")
    smaller = apply_plan(model, Plan.from_json(metadata["fxpath.plan"]))
    own, named = smaller.state_dict(), named_tensors(smaller)
    first: dict[int, Tensor] = {id(named[n]): t for n, t in state.items() if n in named}
    found = {n: state.get(n, first.get(id(named.get(n)))) for n in own}
    wrong = [f"{name} is missing" for name, value in found.items() if value is None]
    wrong += [f"{name} is unexpected" for name in state.keys() - own.keys()]
    for name, value in found.items():
        if value is not None and (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
            wrong.append(
                f"{name} is {tuple(value.shape)} {value.dtype}, in the model "
                f"{tuple(own[name].shape)} {own[name].dtype}"
            )
    if wrong:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong)}")
    smaller.load_state_dict(found)
    return smaller
