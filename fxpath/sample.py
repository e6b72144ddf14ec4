"""The sample that a model was traced with: what results and refusals name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """The inputs that a model was traced with.

    Attributes:
        shapes: input name -> shape, the batch axis included.
        batch_dim: the batch axis, of length 1 in ``shapes``; ``None`` if there is none.
        assumed: whether the shapes are a convention (224 x 224 images) that neither the caller nor
            the model named.
    """

    shapes: dict[str, tuple[int, ...]]
    batch_dim: int | None = 0
    assumed: bool = False

    def __str__(self) -> str:
        named = [
            f"{name}: {' x '.join(map(str, self.own(shape))) or 'scalar'}"
            for name, shape in self.shapes.items()
        ]
        notes = ["assumed"] * self.assumed + ["no batch axis"] * (self.batch_dim is None)
        return ", ".join(named) + (f" ({', '.join(notes)})" if notes else "")

    def own(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of ``shapes`` without the batch axis."""
        if self.batch_dim is None or not shape:
            return shape
        axis = self.batch_dim % len(shape)
        return shape[:axis] + shape[axis + 1 :]
