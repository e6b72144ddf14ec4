"""The callback in Hugging Face's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.plugins.monitor import LOWER, NORM, UPPER
from tests.support.watched import SHAPE, Watched, assert_said, copied, examples

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fxpath.plugins.transformers import PathNormCallback  # noqa: E402


class Model(nn.Module):
    """What the trainer takes: keywords in, a dictionary out."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or Watched()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Witness(transformers.TrainerCallback):
    """Copies the weights at each step, and notes when they are saved."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.saved: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[0] = copied(kwargs["model"].net)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states[state.global_step] = copied(kwargs["model"].net)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(state.global_step)


def trainer_of(path: Path, model: nn.Module, *callbacks: Any, **options: Any) -> Any:
    settings = {"max_steps": 6, "save_strategy": "no", "logging_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        optim="sgd",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    rows = [{"x": x, "labels": label} for x, label in zip(*examples(), strict=True)]
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)
    )


@pytest.fixture
def model() -> Model:
    torch.manual_seed(3)
    return Model()


def lines_of(trainer: Any) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trainer.state.log_history if NORM in row}


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}]
)
def test_numbers_are_those_of_the_weights_at_that_step(
    tmp_path: Path, model: Model, options: dict[str, Any], fresh_compiler: None
) -> None:
    witness, callback = Witness(), PathNormCallback(SHAPE, every=2)
    options = {"save_strategy": "steps", "save_steps": 3, **options}
    trainer = trainer_of(tmp_path, model, callback, witness, **options)
    trainer.train()
    lines = lines_of(trainer)
    assert sorted(lines) == [2, 4, 6] and witness.saved == [3, 6]
    for step, values in lines.items():
        assert_said(values, witness.states[step], witness.states[3 if step > 3 else 0])
    assert callback.monitor is None


def test_log_reaches_the_trainers_other_callbacks(tmp_path: Path, model: Model) -> None:
    heard: list[dict[str, float]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.append(logs)

    callback = PathNormCallback(SHAPE, every=3, log=lambda values, step: trainer.log(values))
    trainer = trainer_of(tmp_path, model, Listener(), callback)
    trainer.train()
    assert [{NORM, LOWER, UPPER} <= set(logs) for logs in heard] == [True, True, False]
    assert sorted(lines_of(trainer)) == [3, 6]


def test_a_training_goes_on_as_without_it(tmp_path: Path, model: Model) -> None:
    start, ends = copied(model), []
    callback = PathNormCallback(SHAPE, every=1, module="net", metric=False)
    for callbacks in ([], [callback]):
        model.load_state_dict(start)
        trainer_of(tmp_path, model, *callbacks).train()
        ends.append(copied(model))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert any(not torch.equal(ends[0][name], value) for name, value in start.items())


class Smooth(Watched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_a_training_that_cannot_be_measured_does_not_start(tmp_path: Path) -> None:
    model = Model(Smooth())
    before = copied(model)
    with pytest.raises(fxpath.UnsupportedModelError, match="tanh"):
        trainer_of(tmp_path, model, PathNormCallback(SHAPE)).train()
    assert all(torch.equal(before[name], value) for name, value in copied(model).items())


def test_other_processes_measure_nothing(tmp_path: Path, model: Model) -> None:
    callback = PathNormCallback(SHAPE, every=1)
    state = transformers.TrainerState(is_world_process_zero=False, global_step=1)
    control = transformers.TrainerControl()
    for event in ("on_train_begin", "on_step_end", "on_save"):
        getattr(callback, event)(None, state, control, model=model)
    assert callback.monitor is None and state.log_history == []


@pytest.mark.long  # a capture walks through all code that the library's models can reach
def test_a_model_of_the_library(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = transformers.ResNetForImageClassification(config)
    rows = [
        {"pixel_values": x, "labels": label}
        for x, label in zip(torch.randn(4, 3, 32, 32), [0, 1, 0, 1], strict=True)
    ]
    callback = PathNormCallback({"pixel_values": (3, 32, 32)}, every=1, outputs="logits")
    trainer = trainer_of(tmp_path, model, callback, max_steps=1)
    trainer.train_dataset = rows
    trainer.train()
    expected = fxpath.path_norm(model, {"pixel_values": (3, 32, 32)}, outputs="logits")
    assert 10 ** lines_of(trainer)[1][NORM] == pytest.approx(expected, rel=1e-5)
    assert 0 < lines_of(trainer)[1][UPPER] < 1
