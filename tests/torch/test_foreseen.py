"""The state that an optimizer makes in its first step is known before it, by shape and dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supervise_core.staging import Outline
from supervise_torch import TorchBackend
from supervise_torch.codec import OutlineCodec
from supervise_torch.foreseen import foreseen_state

Make = Callable[[Any], torch.optim.Optimizer]

FORESEEN: dict[str, Make] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups),
    "Adam, amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "SGD, momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "RMSprop, centered": lambda groups: torch.optim.RMSprop(groups, centered=True, momentum=0.9),
    "NAdam": lambda groups: torch.optim.NAdam(groups),
    "RAdam": lambda groups: torch.optim.RAdam(groups),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups),
    "Adamax": lambda groups: torch.optim.Adamax(groups),
    "Rprop": lambda groups: torch.optim.Rprop(groups),
}


class OwnStep(torch.optim.AdamW):
    """Its step is the program's own, and must not be tried on anything."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError("a step was made")


def with_a_hook(groups: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups)
    optimizer.register_state_dict_post_hook(lambda _, state: {"mine": state})
    return optimizer


NOT_FORESEEN: dict[str, Make] = {
    "its state is given in another form": with_a_hook,
    "its step needs the loss": lambda groups: torch.optim.LBFGS(groups[0]["params"]),
    "its step needs values": lambda groups: torch.optim.Adafactor(groups),
    "its step is not PyTorch's": lambda groups: OwnStep(groups),
    "it has a state already": lambda groups: torch.optim.Adagrad(groups),
}


class Model(torch.nn.Module):
    """Weights of several shapes, layouts and dtypes, some of them alike; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.linear = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        self.narrow = torch.nn.Linear(4, 2, dtype=torch.bfloat16)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*self.conv.parameters(), *self.frozen.parameters()]},
            {"params": [*self.linear.parameters(), *self.narrow.parameters()], "lr": 0.5},
        ]


def form_of(state: Any) -> Any:
    outline = Outline()
    outline.put("optimizer", state, OutlineCodec())
    return outline.forms["optimizer"]


@pytest.mark.parametrize("kind", FORESEEN)
def test_it_is_what_the_first_step_makes(kind: str) -> None:
    model = Model()
    optimizer = FORESEEN[kind](model.groups())
    foreseen = foreseen_state(optimizer)
    assert foreseen is not None
    assert len(optimizer.state) == 0
    for parameter in model.parameters():
        assert parameter.grad is None
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert form_of(foreseen) == form_of(optimizer.state_dict())
    assert foreseen_state(optimizer) is None or not optimizer.state, "it is there now"


@pytest.mark.parametrize("kind", NOT_FORESEEN)
def test_what_cannot_be_known_is_not_guessed(kind: str) -> None:
    model = Model()
    optimizer = NOT_FORESEEN[kind](model.groups())
    before = len(optimizer.state)
    assert foreseen_state(optimizer) is None
    assert len(optimizer.state) == before


def test_how_a_step_is_made_on_a_device_makes_no_other_state() -> None:
    model = Model()
    plain, capturable = torch.optim.AdamW(model.groups()), torch.optim.AdamW(model.groups(), capturable=True)
    assert form_of(foreseen_state(capturable)) == form_of(foreseen_state(plain))


def test_no_hook_is_called_and_no_value_changed() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.groups(), lr=1.0)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    everywhere = register_optimizer_step_pre_hook(lambda *_: called.append("everywhere"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert foreseen_state(optimizer) is not None
    everywhere.remove()
    assert called == []
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_thousands_of_parameters_of_few_shapes_are_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[int] = []
    step = inspect.unwrap(torch.optim.SGD.step)

    def noted(self: Any, closure: Any = None) -> Any:
        stepped.append(len(self.param_groups[0]["params"]))
        return step(self, closure)

    noted.__module__ = step.__module__
    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    parameters = [torch.nn.Parameter(torch.zeros(2 + number % 2)) for number in range(1000)]
    foreseen = foreseen_state(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    assert foreseen is not None
    assert len(foreseen["state"]) == 1000
    assert stepped == [2]


def test_a_backend_puts_what_each_optimizer_will_be() -> None:
    model = Model()
    known, unknown = torch.optim.AdamW(model.groups()), OwnStep(model.groups())
    backend = TorchBackend(model=model, known=known, unknown=unknown)
    outline = Outline()
    session = backend.create_session()
    backend.foresee(session, outline)
    backend.close_session(session)
    assert list(outline.forms) == ["known"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    known.step()
    assert outline.forms["known"] == form_of(known.state_dict())
