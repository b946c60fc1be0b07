"""The images that the rows of a tensor belong to, as far as they are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Images that the rows R of a tensor belong to.

    Attributes:
        images: Number of images N.
        index: Number of each row's image, (R,), -1 for none; or None where the rows
            are the images, in order.
        pooled: The rows are RoIs, or were computed from RoIs.
    """

    images: int
    index: Tensor | None = None
    pooled: bool = False

    def __len__(self) -> int:
        return self.images if self.index is None else len(self.index)

    def moved(self, index: Tensor) -> Rows:
        """Return other rows of the same images."""
        return replace(self, index=index)


@dataclass(frozen=True)
class Lost:
    """Rows that cannot be told to images, and why."""

    reason: str


@dataclass(frozen=True)
class Aside(Lost):
    """Rows along another dimension than the first; few ops can follow them there.

    Attributes:
        rows: The rows.
        dim: The dimension along which they lie.
    """

    rows: Rows
    dim: int


#: None where a tensor holds no rows of images, such as a parameter.
RowState = Rows | Lost | None
