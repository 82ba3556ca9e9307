"""What is special about PyTorch: strict restores, lazy and meta modules, skipped steps, several optimizers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from supervise_core import CheckpointDirectory, IncompatibleCheckpointError, NotReadyError, Supervisor  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402

nn = torch.nn
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def run(
    logdir: Path, step: Callable[[], object] = lambda: None, steps: int = 0, *, global_step: Any = None,
    init_fn: Any = None, device: Any = "cpu", **parts: Any,
) -> Any:  # fmt: skip
    """One session of that many rounds; what it reports as the global step."""
    backend = TorchBackend(global_step=global_step, device=device, **parts)
    supervisor = Supervisor(backend, logdir, summarize_every=None, signals=False, init_fn=init_fn)
    with supervisor.managed_session() as session:
        for _ in range(steps):
            if supervisor.should_stop():
                break
            step()
        supervisor.request_stop()
        return session.global_step


def trainer(model: Any, optimizer: Any, **made: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3, **made)).square().sum().backward()
        optimizer.step()

    return step


# ---- the parts


def test_a_backend_needs_parts() -> None:
    with pytest.raises(TypeError, match=r"TorchBackend\(model=model, optimizer=optimizer\)"):
        TorchBackend()


def test_a_part_without_state_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="rate= has no state_dict and load_state_dict; a float cannot be saved"):
        TorchBackend(model=nn.Linear(1, 1), rate=0.1)


@pytest.mark.parametrize("name", ["torch", "state", "manifest", "a.b"])
def test_a_name_that_cannot_be_that_of_a_part_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="part"):
        TorchBackend(**{name: nn.Linear(1, 1)})


def test_the_session_gives_the_programs_own_objects() -> None:
    model, optimizer = nn.Linear(1, 1), None
    optimizer = torch.optim.SGD(model.parameters())
    session = TorchBackend(model=model, optimizer=optimizer).create_session()
    assert session.model is session["model"] is model
    assert session.optimizer is optimizer
    with pytest.raises(AttributeError, match="the session has no part 'scheduler'; it has: model, optimizer"):
        _ = session.scheduler


# ---- strict restore


def other(kind: str) -> Any:
    match kind:
        case "missing":
            return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), [r"'1\.bias' is missing", r"'1\.weight' is missing"]
        case "unexpected":
            return nn.Sequential(nn.Linear(3, 2, bias=False)), [r"'0\.bias' is unexpected"]
        case "shape":
            return nn.Sequential(nn.Linear(4, 2)), [r"'0\.weight' has shape \(2, 3\) there and \(2, 4\) here"]
        case _:
            return nn.Sequential(nn.Linear(3, 2).half()), [r"'0\.bias' has dtype torch.float32 there and torch.float16"]


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "dtype"])
def test_what_does_not_fit_is_named_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    run(tmp_path, model=nn.Sequential(nn.Linear(3, 2)))
    model, complaints = other(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for complaint in complaints:
        with pytest.raises(IncompatibleCheckpointError, match=complaint) as caught:
            run(tmp_path, model=model)
        assert caught.value.part == "model"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert CheckpointDirectory(tmp_path).set_aside() == {}


def test_a_part_more_or_less_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    run(tmp_path, model=model)
    with pytest.raises(IncompatibleCheckpointError, match=r"'optimizer'.*it is missing; the checkpoint has"):
        run(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(IncompatibleCheckpointError, match="'model'"):
        run(tmp_path, network=model)


def test_an_optimizer_of_other_parameters_is_refused_before_the_model_is_changed(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    run(tmp_path, trainer(model, optimizer), 1, model=model, optimizer=optimizer)
    fresh = nn.Linear(3, 2)
    before = fresh.weight.detach().clone()
    with pytest.raises(IncompatibleCheckpointError, match=r"groups have \[2\] parameters there and \[1\] here"):
        run(tmp_path, model=fresh, optimizer=torch.optim.Adam([fresh.weight]))
    with pytest.raises(IncompatibleCheckpointError, match=r"exp_avg.* of parameter 0 has shape"):
        run(tmp_path, model=fresh, optimizer=torch.optim.Adam([fresh.bias, fresh.weight]))
    assert torch.equal(fresh.weight, before)


# ---- lazy parameters, the meta device, metadata


def test_a_lazy_module_is_restored_without_being_run_and_stays_in_its_optimizer(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = make()
    first = run(
        tmp_path, trainer(model, optimizer), 2, model=model, optimizer=optimizer,
        init_fn=lambda session: model(torch.zeros(1, 3)),
    )  # fmt: skip
    again, again_optimizer = make()
    second = run(tmp_path, trainer(again, again_optimizer), 0, model=again, optimizer=again_optimizer)
    assert (first, second) == (2, 2)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    held = [parameter for group in again_optimizer.param_groups for parameter in group["params"]]
    assert all(one is two for one, two in zip(held, again.parameters(), strict=True))
    before = again[0].weight.detach().clone()
    trainer(again, again_optimizer)()
    assert not torch.equal(again[0].weight, before)


def test_a_lazy_module_that_nothing_has_run_is_not_ready(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"model\.weight \(a lazy parameter"):
        run(tmp_path, model=nn.LazyLinear(2))


def test_a_module_on_meta_is_restored_onto_its_device_and_stays_tied(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    run(tmp_path, trainer(model, optimizer), 2, model=model, optimizer=optimizer)
    again, again_optimizer = make()
    run(tmp_path, model=again, optimizer=again_optimizer)
    assert again[0].weight.device.type == "cpu"
    assert again[0].weight is again[1].weight
    assert again_optimizer.param_groups[0]["params"][0] is again[0].weight
    assert torch.equal(again[0].weight, model[0].weight)
    before = again[0].weight.detach().clone()
    trainer(again, again_optimizer)()
    assert not torch.equal(again[0].weight, before)


def test_the_metadata_of_a_state_dict_comes_back(tmp_path: Path) -> None:
    """Without its version, an old BatchNorm would be assumed, and its counter set to zero."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    run(tmp_path, model=model)
    seen: list[Any] = []

    class Watched(nn.BatchNorm1d):
        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *more: Any) -> None:
            seen.append(dict(metadata))
            super()._load_from_state_dict(state, prefix, metadata, *more)

    again = nn.Sequential(nn.Linear(3, 3), Watched(3))
    run(tmp_path, model=again)
    assert seen[-1]["version"] == nn.BatchNorm1d._version
    assert int(again[1].num_batches_tracked) == 1


# ---- the global step


def test_without_an_optimizer_the_core_counts(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    supervisor = Supervisor(TorchBackend(model=model), tmp_path, summarize_every=None, signals=False)
    with supervisor.managed_session():
        for _ in supervisor.batches(range(5)):
            pass
        assert supervisor.global_step == 5


def test_a_step_that_a_scaler_skips_is_not_counted(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    losses = iter([1.0, float("inf"), 1.0, float("nan"), 1.0])

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * next(losses)).backward()
        scaler.step(optimizer)
        scaler.update()

    assert run(tmp_path, step, 5, model=model, optimizer=optimizer, scaler=scaler) == 3
    again = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer = nn.Linear(3, 1), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert run(tmp_path, model=model, optimizer=optimizer, scaler=again) == 3
    assert again.get_scale() == scaler.get_scale() == 1.0


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad], ids=lambda kind: kind.__name__
)
def test_a_step_that_a_fused_optimizer_skips_is_not_counted(make: Any, tmp_path: Path) -> None:
    """A fused optimizer is called for a skipped step, too, and leaves the parameters alone in its kernel."""
    model = nn.Linear(3, 1)
    try:
        optimizer = make(model.parameters(), lr=0.1, fused=True)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"no fused {make.__name__} on the CPU: {error}")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    losses = iter([1.0, float("inf"), 1.0])
    changed: list[bool] = []

    def step() -> None:
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * next(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        changed.append(not torch.equal(before, model.weight))

    assert run(tmp_path, step, 3, model=model, optimizer=optimizer, scaler=scaler) == sum(changed) == 2


def test_accumulation_counts_optimizer_steps_and_not_batches(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    supervisor = Supervisor(
        TorchBackend(model=model, optimizer=optimizer), tmp_path, summarize_every=None, signals=False
    )
    with supervisor.managed_session():
        for number in supervisor.batches(range(8)):
            model(torch.ones(1, 3)).sum().backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        assert supervisor.global_step == 2


class Gan:
    """Two optimizers; the critic makes two steps for each one of the generator."""

    def __init__(self) -> None:
        self.generator, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters())
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters())
        self.rounds = 0

    def parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "rounds"}

    def step(self) -> None:
        for optimizer in (self.critic_optimizer, self.critic_optimizer, self.generator_optimizer):
            optimizer.zero_grad()
            self.critic(self.generator(torch.randn(4, 2))).sum().backward()
            optimizer.step()
        self.rounds += 1


@pytest.mark.parametrize(
    ("global_step", "expected"), [(None, 6), ("critic_optimizer", 6), ("generator_optimizer", 3), ("function", 3)]
)
def test_with_two_optimizers_the_user_decides_what_a_step_is(global_step: Any, expected: int, tmp_path: Path) -> None:
    gan = Gan()
    counted = (lambda: gan.rounds) if global_step == "function" else global_step
    assert run(tmp_path, gan.step, 3, global_step=counted, **gan.parts()) == expected
    assert CheckpointDirectory(tmp_path).newest().step == expected
    if global_step != "function":
        assert run(tmp_path, global_step=global_step, **Gan().parts()) == expected


def test_a_global_step_that_names_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="global_step='critic' names no optimizer; the parts are: generator, critic"):
        TorchBackend(global_step="critic", **Gan().parts())


def test_hooks_are_gone_after_the_session(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(tmp_path, trainer(model, optimizer), 2, model=model, optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert not model._forward_pre_hooks


# ---- other parts


def test_an_average_of_the_weights_is_part_of_the_state(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any, Any]:
        model = nn.Linear(3, 1)
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        return model, torch.optim.SGD(model.parameters(), lr=0.01), ema

    model, optimizer, ema = make()
    train = trainer(model, optimizer)

    def step() -> None:
        train()
        ema.update_parameters(model)

    run(tmp_path, step, 3, model=model, optimizer=optimizer, ema=ema)
    again_model, again_optimizer, again = make()
    run(tmp_path, model=again_model, optimizer=again_optimizer, ema=again)
    assert int(again.n_averaged) == 3
    assert torch.equal(again.module.weight, ema.module.weight)
    assert not torch.equal(again.module.weight, again_model.weight)


def test_a_generator_of_the_user_goes_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    run(tmp_path, model=nn.Linear(1, 1), generator=generator)
    again = torch.Generator()
    run(tmp_path, model=nn.Linear(1, 1), generator=again)
    assert torch.equal(torch.rand(4, generator=again), torch.rand(4, generator=generator))


def test_the_random_states_of_the_process_go_on(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    run(tmp_path, model=nn.Linear(1, 1))
    expected = draw()
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    run(tmp_path, model=nn.Linear(1, 1))
    assert draw() == expected


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"]
)
def test_every_optimizer_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        model = nn.Linear(3, 2)
        settings = {"momentum": 0.9, "nesterov": True} if kind == "SGD" else {}
        return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **settings)

    model, optimizer = make()
    run(tmp_path, trainer(model, optimizer), 3, model=model, optimizer=optimizer)
    again, again_optimizer = make()
    run(tmp_path, model=again, optimizer=again_optimizer)
    state = torch.get_rng_state()
    for _ in range(3):
        trainer(model, optimizer)()
    torch.set_rng_state(state)
    for _ in range(3):
        trainer(again, again_optimizer)()
    assert torch.equal(model.weight, again.weight)
    assert torch.equal(model.bias, again.bias)


def test_frozen_parameters_and_inference_models_can_be_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with torch.inference_mode():
        run(tmp_path, model=model)
    again = nn.Linear(2, 2).requires_grad_(False)
    run(tmp_path, model=again)
    assert torch.equal(model.weight, again.weight)
    assert not again.weight.requires_grad


# ---- CUDA


@needs_cuda
def test_a_model_on_a_device_comes_back_there_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        model = nn.Linear(3, 2, device="cuda").to(memory_format=torch.preserve_format)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    run(tmp_path, trainer(model, optimizer, device="cuda"), 3, model=model, optimizer=optimizer)
    again, again_optimizer = make()
    run(tmp_path, model=again, optimizer=again_optimizer)
    assert again.weight.device.type == "cuda"
    assert torch.equal(again.weight, model.weight)
    trainer(model, optimizer, device="cuda")
    state = again_optimizer.state[again.weight]
    assert state["exp_avg"].device.type == "cuda"
    assert torch.equal(state["exp_avg"], optimizer.state[model.weight]["exp_avg"])


@needs_cuda
def test_random_states_of_devices_go_on(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, device="cuda")
    run(tmp_path, model=model)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed_all(99)
    run(tmp_path, model=model)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@needs_cuda
def test_a_snapshot_on_a_device_is_not_changed_by_the_training_that_follows(tmp_path: Path) -> None:
    from supervise_core import Staging

    model = nn.Linear(2048, 2048, device="cuda")
    backend = TorchBackend(model=model)
    session = backend.create_session()
    expected = model.weight.detach().cpu().numpy().tobytes()
    snapshot = backend.snapshot(session, Staging())
    with torch.no_grad():
        for _ in range(10):
            model.weight.add_(1)
    snapshot.finish()
    assert expected in b"".join(snapshot.parts["model"].files[0].chunks())
    backend.close_session(session)


@needs_cuda
def test_a_checkpoint_of_a_device_is_restored_on_the_cpu(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, device="cuda")
    run(tmp_path, model=model)
    again = nn.Linear(3, 2)
    run(tmp_path, model=again)
    assert torch.equal(again.weight, model.weight.cpu())
