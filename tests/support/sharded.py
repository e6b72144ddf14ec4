"""What each rank does in the tests of sharded models, and the nets that are shared out.

Ranks are processes of their own: they import this module, and hand back plain data in files.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import TorchDispatchMode

import fxpath

IMAGE = (2, 6, 6)
WIDTH, DEPTH = 64, 8


class Net(nn.Module):
    """Folded and separate batch norms, a residual sum, tied weights, slopes.

    No first axis is a multiple of 2, and of the last one all is on one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.second, self.other = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.hidden, self.again = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.again.weight = self.hidden.weight
        self.slope, self.last = nn.PReLU(5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (self.slope(self.other(self.second(x))) + x).mean((2, 3))
        y: Tensor = self.last(self.again(self.hidden(x).relu()).relu())
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    for norm in (made.norm, made.other):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2))


def computed() -> nn.Module:
    """Weights that are masked, and weights that are computed from two parameters."""
    made = mlp()
    torch_prune.l1_unstructured(made[0], "weight", 0.3)
    parametrizations.weight_norm(made[2])
    return made


def extreme() -> nn.Module:
    """Shares that float32 makes zeros of, and some that float64 does."""
    made = mlp().double()
    with torch.no_grad():
        made[0].weight[1] *= 1e-170
        made[2].weight[:, 1] *= 1e-170
        made[0].weight[2] *= 1e-30
        made[2].weight[:, 2] *= 1e-30
    return made


def single() -> nn.Module:
    made = extreme().float()
    with torch.no_grad():
        made[4].weight *= 1e-20
    return made


def deep() -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


# -- shared out ------------------------------------------------------------------------------------


def _mesh(*shape: int, names: tuple[str, ...] = ("ranks",)) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    """By ``fully_shard``, layer by layer, and what is left with the whole."""
    from torch.distributed.fsdp import fully_shard

    layers = [m for m in model.children() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers if len(layers) < 6 else layers[:-1]:
        if layer is not getattr(model, "hidden", None) and layer is not getattr(
            model, "again", None
        ):
            fully_shard(layer, mesh=_mesh(), **options)
    return fully_shard(model, mesh=_mesh(), **options)


def rounding(model: nn.Module) -> nn.Module:
    """With a forward pass in bfloat16, which no parameter is rounded to."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh or _mesh(), plan)


def both(model: nn.Module) -> nn.Module:
    """In two dimensions, of which one has a single rank where there are two in all."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(dist.get_world_size() // 2, 2, names=("data", "tensor"))
    return fully_shard(tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])


def distributed(model: nn.Module) -> nn.Module:
    """Tensors along other axes, and whole on each rank, buffers included."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = _mesh()
    for i, (name, parameter) in enumerate(list(model.named_parameters())):
        path, _, own = name.rpartition(".")
        placement = Replicate() if i % 3 == 2 else Shard(parameter.dim() - 1)
        spread = nn.Parameter(distribute_tensor(parameter.data, mesh, [placement]))
        setattr(model.get_submodule(path), own, spread)
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, distribute_tensor(buffer, mesh, [Replicate()]))
    return model


def untied(model: nn.Module) -> nn.Module:
    """The same net in which nothing is tied."""
    model.again.weight = nn.Parameter(model.again.weight.detach().clone())
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


#: Name -> net, shape of an input, how it is shared out, what is cut of it.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, dict[str, Any]]] = {
    "fsdp": (net, IMAGE, rounding, {"amount": 0.4, "steps": 2}),
    "tensor parallel": (mlp, (3,), tensor_parallel, {"budget": 0.05}),
    "both": (mlp, (3,), both, {"amount": 0.5, "max_layer_sparsity": 0.6, "biases": True}),
    "distributed": (
        lambda: untied(net()),
        IMAGE,
        distributed,
        {"amount": 0.3, "layer_adaptive": True, "criterion": "magnitude"},
    ),
    "data parallel": (mlp, (3,), data_parallel, {"amount": 0.4}),
    "computed": (computed, (3,), fsdp, {"pattern": fxpath.NM(1, 2), "include": "4"}),
    "extreme": (extreme, (3,), fsdp, {}),
    "single": (single, (3,), fsdp, {}),
}


# -- what a rank does ------------------------------------------------------------------------------


def main(rank: int, world: int, folder: str, names: tuple[str, ...], more: bool) -> None:
    """All cases, and further checks; what was found goes into a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / f'store{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {name: analysed(*CASES[name], rank) for name in names}
    if more:
        found |= {"training": trained(), "memory": memory(), "refused": refused()}
    torch.save(found, Path(folder) / f"rank{world}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def analysed(
    make: Callable[[], nn.Module], shape: Any, share: Any, cut: dict[str, Any], rank: int
) -> dict[str, Any]:
    """Everything that is said of a shared-out model, as plain data."""
    model = share(make())
    parameters = dict(model.named_parameters())
    analysis = fxpath.analyze(model, shape)
    found: dict[str, Any] = {
        "norm": analysis.path_norm,
        "scores": {name: full(score) for name, score in analysis.scores.items()},
        "spread": {
            name: _placed(score) == _placed(parameters[name])
            for name, score in analysis.scores.items()
            if name in parameters
        },
        # Those without a parameter of their own are whole nowhere, either.
        "sharded": {
            name: hasattr(score, "to_local")
            for name, score in analysis.scores.items()
            if name not in parameters
        },
        "neurons": dict(analysis.neuron_shares),
        "table": analysis.table(depth=1).to_csv(),
    }
    if rank == 0:
        # The others are not asked.
        found["said"] = str(analysis), analysis.to_dict(), analysis.report()
    largest = max(analysis.scores, key=lambda name: analysis.scores[name].numel())
    if make is not extreme:
        found["absolute"] = largest, full(analysis.path_magnitude(largest))
    if cut:
        pruned = fxpath.prune(model, input_shape=shape, **cut)
        found |= {
            "masks": {name: full(mask) for name, mask in pruned.masks.items()},
            "fits": all(
                _placed(mask) == _placed(parameters.get(name, mask))
                for name, mask in pruned.masks.items()
            ),
            "state": {name: full(value) for name, value in pruned.state_dict.items()},
            "lost": (pruned.certificate.value, pruned.path_magnitude_share),
        }
        if rank == 0:
            found["pruned"] = str(pruned)
        with torch.no_grad():
            for name, mask in pruned.masks.items():
                if name in parameters:
                    parameters[name].mul_(mask)
        found["zeroed"] = {name: full(parameters[name].detach()) for name in pruned.masks}
    return found


def full(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _placed(tensor: Tensor) -> Any:
    if not hasattr(tensor, "to_local"):
        return None
    return tensor.device_mesh, tensor.placements, tensor.to_local().shape


def trained() -> dict[str, Any]:
    """Two steps of training, with an analysis between them and without."""
    states = []
    said = ""
    for asked in (False, True):
        model = fsdp(net())
        before = {name: id(tensor) for name, tensor in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        hooks = [list(m._forward_pre_hooks.values()) for m in model.modules()]
        for _ in range(2):
            if asked:
                fxpath.analyze(model, IMAGE)
            x = torch.arange(2 * 2 * 36.0).reshape(2, *IMAGE) / 50
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        same = before == {name: id(tensor) for name, tensor in model.named_parameters()}
        same &= hooks == [list(m._forward_pre_hooks.values()) for m in model.modules()]
        states.append({name: full(value.detach()) for name, value in model.named_parameters()})
    program = fxpath.compile(model, IMAGE, backend="eager")
    with torch.no_grad():
        model(torch.ones(1, *IMAGE))
    try:
        program.path_norm()
    except ValueError as error:
        said = str(error)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    norm = program.path_norm()
    return {"states": states, "same": same, "gathered": said, "norms": (norm, _norm(model))}


def _norm(model: nn.Module) -> float:
    return fxpath.path_norm(model, IMAGE)


class Alive(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._known = 0, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if type(made) in (Tensor, nn.Parameter):
                self._known.append(weakref.ref(made))
        self._known = [each for each in self._known if each() is not None]
        held = [tensor for each in self._known if (tensor := each()) is not None]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        self.peak = max(self.peak, sum(sizes.values()))
        return result


def memory() -> dict[str, float]:
    """Peaks of an evaluation, in layers, of a sharded model and of the same model whole."""
    found = {}
    for name, model in (("sharded", fsdp(deep())), ("whole", deep())):
        program = fxpath.compile(model, backend="eager")
        with Alive() as alive:
            evaluation = program.evaluate(scores=True, details=True)
        del evaluation
        found[name] = alive.peak / (4 * WIDTH * WIDTH)
    return found


def refused() -> dict[str, str]:
    """What is said by everything that takes no sharded model."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    model, plain = fsdp(mlp()), mlp()
    pruned = fxpath.prune(model, 0.3)
    program = fxpath.compile(model, backend="eager")
    partial, buffered = mlp(), net()
    weight = DTensor.from_local(partial[0].weight.data, _mesh(), [Partial()])
    partial[0].weight = nn.Parameter(weight)
    buffered.norm.running_var = distribute_tensor(buffered.norm.running_var, _mesh(), [Shard(0)])
    # Its own constructor wants a GPU.
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = mlp()
    batch = torch.ones(1, 3), torch.ones(1, 2)
    sample = torch.ones(2, 3)
    masked, drifted = fsdp(computed()), fsdp(net())
    drifted.norm.running_mean[0] += dist.get_rank()
    # The graph does not read it.
    drifted.other.num_batches_tracked += dist.get_rank()
    calls: dict[str, Callable[[], object]] = {
        "FSDP1": lambda: fxpath.analyze(flat),
        "Partial": lambda: fxpath.analyze(partial),
        "buffer": lambda: fxpath.analyze(buffered, IMAGE),
        "drifted": lambda: fxpath.analyze(drifted, IMAGE),
        "drifted, pruned": lambda: fxpath.prune(drifted, 0.3, IMAGE, criterion="magnitude"),
        "samples": lambda: fxpath.analyze(model, example_inputs=sample),
        "compile": lambda: fxpath.analyze(model, compile=True),
        "backend": lambda: fxpath.compile(model),
        "log_path_norm": program.log_path_norm,
        "exported": program.exported,
        "certificate": program.certificate,
        "out": lambda: program.scores(out=program.scores()),
        "path_metric": lambda: fxpath.path_metric(model, plain),
        "other": lambda: fxpath.path_metric(plain, model),
        "state dict": lambda: fxpath.path_metric(plain, pruned.state_dict),
        "bounds": lambda: pruned.certificate.bounds,
        "Pruned.model": pruned.model,
        "Pruned.save": lambda: pruned.save("nowhere.safetensors"),
        "apply_masks": lambda: fxpath.apply_masks(model, pruned.masks),
        "apply_plan": lambda: fxpath.apply_plan(model, fxpath.prune_channels(plain, 1).plan),
        "lipschitz_bound": lambda: fxpath.lipschitz_bound(model, other=plain),
        "certify": lambda: fxpath.certify(model),
        "path_lifting": lambda: fxpath.path_lifting(model),
        "prune_channels": lambda: fxpath.prune_channels(model, 1),
        "remove_dead": lambda: fxpath.remove_dead(model),
        "rescale": lambda: fxpath.rescale(model),
        "normalize": lambda: fxpath.normalize(model),
        "channel_groups": lambda: fxpath.channel_groups(model),
        "quantize": lambda: fxpath.quantize(model, 8),
        "verify_pattern": lambda: fxpath.verify_pattern(model, fxpath.NM(2, 4)),
        "canonical_magnitude": lambda: fxpath.criteria.canonical_magnitude(model),
        "magnitude": lambda: fxpath.criteria.magnitude(masked),
        "obd": lambda: fxpath.criteria.obd(model, nn.functional.mse_loss, batch),
    }
    return {name: _said(call) for name, call in calls.items()}


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextmanager
def one_thread() -> Iterator[None]:
    """Processes that torch starts meanwhile have one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
