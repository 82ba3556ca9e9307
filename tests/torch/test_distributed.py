"""A warm-up of DistributedDataParallel that cannot be used wrongly; what it is for is tested with several ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from supervise_core import SessionStateError  # noqa: E402
from supervise_torch import warm_up_ddp  # noqa: E402

X = torch.ones(4, 3)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return wrapped()


class Net(nn.Module):
    """Draws, normalises, and puts a new tensor in a buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.register_buffer("seen", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        return self.layers(x * self.frozen + random.random() + float(np.random.rand()))


def wrapped(**options: Any) -> Any:
    return DistributedDataParallel(Net(), **options)


def loss_of(model: Any) -> Callable[[], torch.Tensor]:
    return lambda: model(X).sum()


def values(model: Any) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def states() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_everything_is_put_back(options: dict[str, Any]) -> None:
    model = wrapped(**options)
    kept = nn.Parameter(model.module.layers[0].weight.detach() + 1)
    gradients = [None, torch.ones(4), None, None, torch.zeros(2, 4), None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    buffer, before, random_before = model.module.seen, values(model), states()
    warm_up_ddp(model, lambda: model(X).sum() + kept.sum())
    assert values(model) == before
    assert states() == random_before
    assert model.module.seen is buffer
    assert kept.grad is None
    assert all(parameter.grad is gradient for parameter, gradient in zip(trained, gradients, strict=True))
    assert [one.tolist() for one in gradients if one is not None] == [[1.0] * 4, [[0.0] * 4] * 2]


def test_all_is_put_back_after_an_error(model: Any) -> None:
    before, random_before = values(model), states()

    def fail() -> torch.Tensor:
        model(X).sum().backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warm_up_ddp(model, fail)
    assert values(model) == before
    assert states() == random_before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_second_call_does_nothing(model: Any) -> None:
    warm_up_ddp(model, loss_of(model))
    warm_up_ddp(model, pytest.fail)
    model(X).sum().backward()
    model(X).sum().backward()
    warm_up_ddp(model, pytest.fail)


def test_where_unused_parameters_are_looked_for_the_loss_is_not_made() -> None:
    warm_up_ddp(wrapped(find_unused_parameters=True), pytest.fail)


def test_a_static_graph_takes_two_passes(model: Any) -> None:
    calls: list[int] = []
    for static in (False, True):
        net = wrapped(static_graph=static)
        calls.append(0)

        def loss(net: Any = net) -> torch.Tensor:
            calls[-1] += 1
            return net(X).sum()

        warm_up_ddp(net, loss)
    assert calls == [1, 2]


def test_another_kind_of_model() -> None:
    net = Net()
    with pytest.raises(TypeError, match="wrapped in DistributedDataParallel, not a Net"):
        warm_up_ddp(net, loss_of(net))


def test_a_compiled_model(model: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(TypeError, match=r"give it the model inside of torch\.compile"):
        warm_up_ddp(compiled, loss_of(model))


def test_the_model_inside_is_called(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model\(\.\.\.\), not model\.module\(\.\.\.\)"):
        warm_up_ddp(model, loss_of(model.module))


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (lambda model: model(X), ValueError, r"has shape \(4, 2\); make it a scalar"),
        (lambda model: model(X).sum().detach(), ValueError, "requires no gradients"),
        (lambda model: model(X).sum().item(), TypeError, "must return the loss, not a float"),
        (lambda model: model(X).sum().backward(), TypeError, "must return the loss, not a NoneType"),
    ],
)
def test_what_is_no_loss(model: Any, value: Callable[[Any], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        warm_up_ddp(model, lambda: value(model))


def test_a_loss_that_does_its_own_backward(model: Any) -> None:
    def loss() -> torch.Tensor:
        value = model(X).square().sum()
        value.backward()
        return value

    with pytest.raises(RuntimeError) as raised:
        warm_up_ddp(model, loss)
    assert "leave backward() to warm_up_ddp" in "".join(raised.value.__notes__)


def test_a_parameter_that_is_not_used() -> None:
    model = DistributedDataParallel(nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]))
    model.module.forward = model.module[0].forward
    with pytest.raises(RuntimeError, match="did not receive grad"):
        warm_up_ddp(model, loss_of(model))


def test_without_gradients(model: Any) -> None:
    with torch.no_grad(), pytest.raises(SessionStateError, match=r"outside of torch\.no_grad"):
        warm_up_ddp(model, loss_of(model))
    with torch.inference_mode(), pytest.raises(SessionStateError, match=r"outside of torch\.no_grad"):
        warm_up_ddp(model, loss_of(model))


def test_without_synchronisation(model: Any) -> None:
    with model.no_sync(), pytest.raises(SessionStateError, match="outside of no_sync"):
        warm_up_ddp(model, loss_of(model))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("static", [False, True])
def test_a_model_that_has_trained_already(steps: int, static: bool) -> None:
    model = wrapped(static_graph=static)
    for _ in range(steps):
        model(X).sum().backward()
    with pytest.raises(SessionStateError, match="has trained already"):
        warm_up_ddp(model, loss_of(model))


def test_an_optimizer_that_steps_in_the_backward_pass(model: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    before = values(model)
    model.module.layers[0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(SessionStateError, match=r"\(Adam\) steps within warm_up_ddp"):
        warm_up_ddp(model, loss_of(model))
    assert values(model) == before
    assert not optimizer.state
