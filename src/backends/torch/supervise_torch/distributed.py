"""Making gradients add up in the same order after a restart as before it, under ``DistributedDataParallel``.

It sums gradients bucket by bucket, and where in a bucket an element lies decides in which order the ranks' values are
added. It lays its buckets out twice: at first all parameters are in one, and after the first backward pass that is
synchronised (the second one for a static graph) they are put into buckets anew, once and for good, in the order in
which their gradients came. So a model that is wrapped again rounds its first step otherwise than the run that was not
interrupted did. Throw-away passes before training bring every start to the second layout.

With ``find_unused_parameters=True``, and no static graph, there is only the first layout, and nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakSet

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supervise_core.errors import SessionStateError
from supervise_torch.random_state import set_torch_random_state, torch_random_state

_MOST_PASSES: Final = 2  # one, or two for a static graph

_warm: WeakSet[torch.nn.Module] = WeakSet()


def warm_up_ddp(model: DistributedDataParallel, loss: Callable[[], torch.Tensor]) -> None:
    """Bring a model that was just wrapped to where gradients are summed in the order of the rest of the run::

        model = DistributedDataParallel(Net())
        warm_up_ddp(model, lambda: model(torch.zeros(1, 32)).sum())

    Call it on every rank, at every start (the very first one, too), before the first step. ``loss`` calls the wrapped
    model and makes a scalar of everything that it gives; which values go in makes no difference, but they must take the
    same way through the model at every start. It is called once or twice, and its gradients are thrown away.

    What it changes is put back: random states of Python, NumPy, PyTorch and CUDA; buffers, such as the statistics of
    batch normalisation; parameters that are trained; gradients, of which those that were None are None again.
    Gradients of other models are not touched. Generators of the program's own and attributes that are no tensors are
    not put back. A second call for the same wrapped model does nothing.

    :raises TypeError: if the model is no ``DistributedDataParallel``, or the loss no tensor.
    :raises ValueError: if the loss is no scalar that requires gradients, or was not made by calling this model.
    :raises SessionStateError: if the model has trained already, where gradients are off or not synchronised, or if an
        optimizer steps.
    """
    _check_model(model)
    if model in _warm:
        return
    if not (model.find_unused_parameters and not model.static_graph):
        _check_moment(model)
        with _kept_random_state(), _kept_tensors(model), _no_optimizer():
            _lay_out_buckets(model, loss)
    _warm.add(model)


def _check_model(model: Any) -> None:
    if isinstance(model, DistributedDataParallel):
        return
    inner = getattr(model, "_orig_mod", None)
    hint = "; give it the model inside of torch.compile" if isinstance(inner, DistributedDataParallel) else ""
    raise TypeError(f"warm_up_ddp takes a model wrapped in DistributedDataParallel, not a {type(model).__name__}{hint}")


def _check_moment(model: DistributedDataParallel) -> None:
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise SessionStateError("warm_up_ddp needs gradients; call it outside of torch.no_grad and inference_mode")
    if not model.require_backward_grad_sync:
        raise SessionStateError("warm_up_ddp synchronises gradients; call it outside of no_sync")
    first_of_static = getattr(model, "_static_graph_delay_allreduce_enqueued", False)
    if first_of_static or model._has_rebuilt_buckets or model.reducer._rebuild_buckets():
        raise SessionStateError(
            "this model has trained already, so its first steps cannot be repeated after a restart; "
            "call warm_up_ddp right after DistributedDataParallel(...)"
        )


def _lay_out_buckets(model: DistributedDataParallel, loss: Callable[[], torch.Tensor]) -> None:
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for _ in range(_MOST_PASSES):
        value = loss()
        _check_loss(value)
        try:
            value.backward(inputs=trained)  # no gradients for anything else that the loss was made with
        except RuntimeError as error:
            error.add_note("In warm_up_ddp: the loss must use every parameter, and leave backward() to warm_up_ddp.")
            raise
        for parameter in trained:
            parameter.grad = None
        if model.reducer._rebuild_buckets():
            return
    raise ValueError(
        "no gradients came through the wrapped model; the loss given to warm_up_ddp must call that model itself: "
        "model(...), not model.module(...)"
    )


def _check_loss(value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"the function given to warm_up_ddp must return the loss, not a {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"the loss given to warm_up_ddp has shape {tuple(value.shape)}; make it a scalar: .mean()")
    if not value.requires_grad:
        raise ValueError("the loss given to warm_up_ddp requires no gradients; make it by calling the model")


@contextmanager
def _kept_random_state() -> Generator[None, None, None]:
    state = torch_random_state()
    try:
        yield
    finally:
        set_torch_random_state(state)


@contextmanager
def _kept_tensors(model: torch.nn.Module) -> Generator[None, None, None]:
    """Without gradients inside, and after it with the values and gradients that were there before.

    The copies are in the memory of the CPU, so that a model that only just fits its device can be warmed up there.
    Parameters that are not trained are not copied; there may be many more of them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = trained + [tensor for _, own in buffers for tensor in own.values() if tensor is not None]
    copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        yield
    finally:
        for module, own in buffers:
            module._buffers.clear()  # a forward pass may have put other tensors in their place
            module._buffers.update(own)
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _no_optimizer() -> Generator[None, None, None]:
    """One that steps by itself in the backward pass would be changed for good."""

    def refuse(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        raise SessionStateError(
            f"an optimizer ({type(optimizer).__name__}) steps within warm_up_ddp, which would be a step too many; the "
            "loss must not step, and what steps during the backward pass is to be set up after warm_up_ddp"
        )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
