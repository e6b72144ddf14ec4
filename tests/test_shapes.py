"""infer_input_shape: right, or refused with the advice to pass input_shape; the model untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fxpath.capture.shapes import infer_input_shape

tv = pytest.importorskip("torchvision.models")


def lenet(side: int, features: int, padding: int = 0) -> nn.Module:
    del side  # For readable test ids only.
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, 120),
        nn.ReLU(),
        nn.Linear(120, 10),
    )


class Functional(nn.Module):
    """The MNIST network of many tutorials, with its linear layers registered first."""

    def __init__(self, flatten: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.flatten = flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        if self.flatten == "view":
            x = x.view(-1, 320)
        elif self.flatten == "view_batch":
            x = x.view(x.size(0), 320)
        elif self.flatten == "reshape":
            x = torch.reshape(x, (-1, 320))
        else:
            x = x.flatten(1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def vgg_without_pooling(side: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in [(3, 4), (4, 8), (8, 8), (8, 8), (8, 8)]:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * (side // 32) ** 2, 10))


@pytest.mark.parametrize("side, features, padding", [(28, 256, 0), (32, 400, 0), (28, 400, 2)])
def test_lenet(side: int, features: int, padding: int) -> None:
    assert infer_input_shape(lenet(side, features, padding)) == (1, side, side)


@pytest.mark.parametrize("flatten", ["view", "view_batch", "reshape", "flatten"])
def test_functional_net_with_layers_out_of_order(flatten: str) -> None:
    assert infer_input_shape(Functional(flatten)) == (1, 28, 28)


def test_linear_map_without_a_layer() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.weight = nn.Parameter(torch.ones(8 * 20 * 20, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).flatten(1) @ self.weight

    assert infer_input_shape(Product()) == (3, 20, 20)


@pytest.mark.parametrize("side", [32, 64, 96, 128, 224, 256])
def test_total_stride_chooses_the_customary_side(side: int) -> None:
    assert infer_input_shape(vgg_without_pooling(side)) == (3, side, side)


def test_unusual_side_is_found() -> None:
    assert infer_input_shape(nn.Sequential(nn.Conv2d(2, 1, 1), nn.Flatten(), nn.Linear(49, 2))) == (
        2,
        7,
        7,
    )


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)), (20,)),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), (784,)),
        (nn.Linear(5, 1), (5,)),
        (nn.Linear(5, 1).double(), (5,)),
        (nn.Linear(5, 1).bfloat16(), (5,)),
    ],
)
def test_mlp(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert infer_input_shape(model) == shape


@pytest.mark.parametrize("length", [50, 100, 187, 1000, 16000])
def test_signal_of_stride_one(length: int) -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3 * (length - 4), 5)
    )
    assert infer_input_shape(model) == (2, length)


@pytest.mark.parametrize("length", [64, 100, 1000, 48000])
def test_signal_with_strides(length: int) -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(length, 5),
    )
    assert infer_input_shape(model) == (1, length)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("alexnet", (3, 224, 224)),
        ("resnet18", (3, 224, 224)),
        ("squeezenet1_1", (3, 224, 224)),
        ("mobilenet_v3_small", (3, 224, 224)),
        ("shufflenet_v2_x0_5", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
        ("fcn_resnet50", (3, 224, 224)),
        ("r3d_18", (3, 16, 112, 112)),
        ("s3d", (3, 16, 224, 224)),
    ],
)
def test_torchvision(name: str, shape: tuple[int, ...]) -> None:
    options = {"init_weights": True} if name == "inception_v3" else {}
    if name == "fcn_resnet50":
        options = {"weights_backbone": None}
    assert infer_input_shape(tv.get_model(name, weights=None, **options)) == shape


def test_torchvision_transformer_says_its_image_size() -> None:
    model = tv.VisionTransformer(
        image_size=64, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    assert infer_input_shape(model) == (3, 64, 64)


def test_torchvision_with_another_first_layer() -> None:
    model = tv.resnet18(weights=None)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert infer_input_shape(model) == (1, 224, 224)


def test_wrapped_backbone_with_pooling_gets_224() -> None:
    model = nn.Sequential(nn.Identity(), tv.resnet18(weights=None))
    assert infer_input_shape(model) == (3, 224, 224)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers(wrap: type) -> None:
    assert infer_input_shape(wrap(lenet(28, 256))) == (1, 28, 28)
    assert infer_input_shape(wrap(tv.inception_v3(weights=None, init_weights=False))) == (
        3,
        299,
        299,
    )


def test_symbolically_traced() -> None:
    assert infer_input_shape(torch.fx.symbolic_trace(lenet(32, 400))) == (1, 32, 32)


def test_size_that_the_code_insists_on() -> None:
    class Insisting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 96
            return self.conv(x)

    assert infer_input_shape(Insisting()) == (1, 96, 96)


def test_pruned() -> None:
    model = lenet(28, 256)
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert infer_input_shape(model) == (1, 28, 28)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(x + y)


@pytest.mark.parametrize(
    "model, reason",
    [
        (nn.ReLU(), "no linear layer"),
        (nn.Embedding(5, 3), "no linear layer"),
        (nn.ConvTranspose2d(4, 2, 3), "no linear layer"),
        (nn.Conv3d(1, 2, 3), "no linear layer"),
        (nn.Conv2d(3, 4, 3), "output grows"),
        (nn.Conv1d(3, 4, 3), "any length"),
        (nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1)), "any length"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(51, 2)), "no square image"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), "4 features do not go through"),
        (TwoInputs(), "4 features do not go through"),
        (nn.LazyLinear(3), "has not seen an input"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_undetermined(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        infer_input_shape(model)
    assert "input_shape=(" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fits", [True, False])
def test_model_is_untouched(fits: bool) -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()
            )
            self.head = nn.Linear(2 * 6 * 6 if fits else 7, 2)
            self.noise = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers(x)
            return self.head(x + torch.rand_like(x) * 0)

    model = Counting().train()
    before = copy.deepcopy(model.state_dict())
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    seen: list[object] = []
    hook = model.head.register_forward_hook(lambda *args: seen.append(args[0]))
    state = torch.get_rng_state()
    if fits:
        assert infer_input_shape(model) == (1, 8, 8)
    else:
        with pytest.raises(ValueError, match="input_shape"):
            infer_input_shape(model)
    hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert all(module is not model.head for module in seen)
    assert all(p.grad is None for p in model.parameters())
