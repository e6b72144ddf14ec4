"""The callback in Lightning's own trainer."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxpath
from fxpath.plugins.monitor import UPPER
from tests.support.watched import SHAPE, Watched, assert_said, copied, examples

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from fxpath.plugins.lightning import PathNormCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or Watched()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Forward(Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Lines(Logger):
    """Keeps what is logged."""

    name, version = "lines", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines[step] = metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Witness(Callback):
    """Copies the weights at each step, and notes when they are saved."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.saved: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states[0] = copied(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.setdefault(trainer.global_step, copied(pl_module.net))

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        self.saved.append(trainer.global_step)


def fit(path: Path, module: Any, *callbacks: Any, **options: Any) -> Lines:
    lines = Lines()
    settings = {"max_epochs": 3, "logger": lines, "callbacks": list(callbacks), **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(TensorDataset(*examples()), batch_size=4, shuffle=True)
    torch.manual_seed(7)
    trainer.fit(module, loader)
    return lines


@pytest.fixture
def module() -> Module:
    torch.manual_seed(3)
    return Forward()


@pytest.fixture(autouse=True)
def _files_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_are_those_of_the_weights_at_that_step(
    tmp_path: Path, module: Module, compiled: bool, fresh_compiler: None
) -> None:
    witness, keep = Witness(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    callback = PathNormCallback(SHAPE, every=2)
    trained = torch.compile(module, backend="eager") if compiled else module
    lines = fit(tmp_path, trained, callback, witness, keep).lines
    assert sorted(lines) == [2, 4, 6] and witness.saved[:2] == [3, 6]
    for step, values in lines.items():
        assert_said(values, witness.states[step], witness.states[3 if step > 3 else 0])
    assert callback.monitor is None


def test_a_training_goes_on_as_without_it(tmp_path: Path, module: Module) -> None:
    start, ends = copied(module), []
    callback = PathNormCallback(SHAPE, every=1, module="net")
    for callbacks in ([], [callback]):
        module.load_state_dict(start)
        fit(tmp_path, module, *callbacks, enable_checkpointing=False)
        ends.append(copied(module))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert any(not torch.equal(ends[0][name], value) for name, value in start.items())


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = PathNormCallback(SHAPE, every=1, module="net", metric=False)
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": False}
    lines = fit(tmp_path, Module(), callback, **options).lines
    assert sorted(lines) == [1, 2, 3] and all(len(values) == 1 for values in lines.values())


class Smooth(Watched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_a_fit_that_cannot_be_measured_does_not_start(tmp_path: Path) -> None:
    module, off = Forward(Smooth()), {"enable_checkpointing": False}
    before = copied(module)
    with pytest.raises(fxpath.UnsupportedModelError, match="tanh"):
        fit(tmp_path, module, PathNormCallback(SHAPE), **off)
    with pytest.raises(ValueError, match="Module has no forward.*module='net'"):
        fit(tmp_path, Module(), PathNormCallback(SHAPE), **off)
    with pytest.raises(ValueError, match="no logger"):
        fit(tmp_path, module, PathNormCallback(SHAPE), logger=False, **off)
    assert all(torch.equal(before[name], value) for name, value in copied(module).items())


@pytest.mark.long
def test_one_of_two_processes_logs(tmp_path: Path) -> None:
    callback = PathNormCallback(SHAPE, every=1, module="net")
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"strategy": "ddp_spawn", "devices": 2, "enable_checkpointing": False}
    fit(tmp_path, Module(), callback, logger=logger, **options)
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["1", "2", "3"]
    assert all(float(line[UPPER]) > 0 for line in lines)


def test_other_ranks_measure_nothing(tmp_path: Path, module: Module) -> None:
    callback = PathNormCallback(SHAPE, every=1)

    class Other:
        is_global_zero, global_step = False, 1

    callback.on_train_start(Other(), module)
    callback.on_train_batch_end(Other(), module, None, None, 0)
    callback.on_save_checkpoint(Other(), module, {})
    assert callback.monitor is None
