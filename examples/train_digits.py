r"""A short training that leaves twenty checkpoints, for `fxpath compare`.

    python examples/train_digits.py run
    fxpath compare examples/train_digits.py:make run/*.pt --reference run/19.pt \
        --input-shape 1,8,8 --csv run.csv --plot run.png

It takes scikit-learn, whose digits need no download, and less than a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions, and one of stride 2 on the shortcut."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Half the size."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def make() -> nn.Module:
    """A small ResNet for images of 8 x 8."""
    stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*stem, Block(16, 32), Block(32, 64), *head)


def train(folder: Path, checkpoints: int = 20, steps: int = 15) -> None:
    """Train, and save the weights before the first step and after each few."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(classes)
    model, folder = make(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    total = (checkpoints - 1) * steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for step in range(total + 1):
        if step % steps == 0:
            torch.save(model.state_dict(), folder / f"{step // steps:02}.pt")
        batch = torch.randint(len(x), (64,))
        loss = functional.cross_entropy(model.train()(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    print(f"{checkpoints} checkpoints in {folder}, {accuracy:.1%} of the training set right")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
