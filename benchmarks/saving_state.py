"""The state that is saved, and how it is known whether what came back is what was saved.

Every element is a whole number of ``UNIT``, and a step adds one ``UNIT``: to all of them (``flood``), or to the first
and the last element of every tensor (``touch``), which costs next to nothing. Sums are exact, so from the state of now
the state after any earlier step is known to the bit, and a checkpoint that holds two steps is found out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

UNIT = 2.0**-13
_UNITS = 1 << 22
"""Values begin below so many units; float32 counts up to four times as many exactly."""

LAYERS = 12
_torch: Any = torch  # what is done to a list of tensors at once has no annotations
NEVER = -1.0


class FalseFigureError(Exception):
    """What came back is not what was saved: a figure of that is worth nothing."""


class Gpt(torch.nn.Module):
    """The parameters of a model like GPT-2 with twelve layers, 148 tensors; nothing is computed with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(65 * width, width)
        self.wpe = torch.nn.Embedding(1024, width)
        self.h = torch.nn.ModuleList(_Block(width) for _ in range(LAYERS))
        self.ln_f = torch.nn.LayerNorm(width)

    @classmethod
    def of_size(cls, nbytes: int) -> Gpt:
        """About so many bytes of float32."""
        width = 16
        while _gpt_size(width + 1) <= nbytes:
            width += 1
        return cls(width)


class _Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(width)
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)
        self.ln_2 = torch.nn.LayerNorm(width)
        self.c_fc = torch.nn.Linear(width, 4 * width)
        self.c_out = torch.nn.Linear(4 * width, width)


class Tensors(torch.nn.Module):
    """Parameters of equal size."""

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__()
        for number in range(count):
            self.register_parameter(f"p{number}", torch.nn.Parameter(torch.empty(max(1, nbytes // count // 4))))


class Adding(torch.optim.AdamW):
    """AdamW by its state (two moments and a count per parameter). There are no gradients, and a step adds one unit."""

    def __init__(self, parameters: Any, moments: bool) -> None:
        super().__init__(parameters)
        self.register_step_post_hook(lambda *_: self._add())
        self._moments = moments
        self.frozen: frozenset[int] = frozenset()
        """Numbers of the parameters that no step changes."""
        self.floods = self.touches = 0
        self.floods_next = True
        self._everything: list[torch.Tensor] = []
        self._ends: list[torch.Tensor] = []

    @torch.no_grad()
    def _add(self) -> None:
        """Add one unit to everything, or to the ends."""
        if not self._everything:
            self._begin()
        _torch._foreach_add_(self._everything if self.floods_next else self._ends, UNIT)
        if self.floods_next:
            self.floods += 1
        else:
            self.touches += 1

    def freeze(self, numbers: frozenset[int]) -> None:
        """Have steps pass over these parameters, and their moments, from now on."""
        self.frozen = numbers
        self._everything = []

    def _begin(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self._moments and not self.state:
            for parameter in parameters:
                self.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": _filled_like(parameter),
                    "exp_avg_sq": _filled_like(parameter),
                }
        for number, parameter in enumerate(parameters):
            if number not in self.frozen:
                self._everything += [parameter.detach(), *self.state.get(parameter, {}).values()]
        flat = [tensor.view(-1) for tensor in self._everything]
        self._ends = [tensor[:1] for tensor in flat] + [tensor[-1:] for tensor in flat if tensor.numel() > 1]


class State:
    """A model, its optimizer, and what is known of their values."""

    def __init__(self, model: torch.nn.Module, moments: bool, device: str = "cpu") -> None:
        self.model = model.to(device)
        for parameter in model.parameters():
            _fill(parameter)
        self.optimizer = Adding(model.parameters(), moments)
        self.moments = moments
        self._history: dict[int, tuple[int, int]] = {}
        self._remember()

    @classmethod
    def like_gpt(cls, nbytes: int, device: str = "cpu") -> State:
        """About so many bytes: a third of it the model, the rest of the optimizer."""
        return cls(Gpt.of_size(nbytes // 3), True, device)

    @classmethod
    def of_tensors(cls, count: int, nbytes: int) -> State:
        """So many bytes in so many tensors of equal size, and an optimizer without a state."""
        return cls(Tensors(count, nbytes).requires_grad_(False), False)

    def twin(self) -> State:
        """Another one of the same shapes, the optimizer's state with it, every page of it there already."""
        twin = State(copy.deepcopy(self.model), self.moments)
        twin.flood()
        return twin

    @property
    def steps(self) -> int:
        """How many were made."""
        return self.optimizer.floods + self.optimizer.touches

    def flood(self) -> None:
        """A step that changes every element."""
        self.optimizer.floods_next = True
        self._step()

    def touch(self) -> None:
        """A step that changes the ends of every tensor."""
        self.optimizer.floods_next = False
        self._step()

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, parameter in enumerate(self.model.parameters()):
            for name, tensor in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{number}.{name}"] = tensor
        return named

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self.named().values())

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def scramble(self) -> None:
        """Put values into every tensor that no step leaves, so that a restore that does nothing is found out."""
        with torch.no_grad():
            _torch._foreach_mul_(self.tensors, 0.0)
            _torch._foreach_add_(self.tensors, NEVER)

    def check(self, other: Mapping[str, Any], step: int) -> None:
        """See that another one's tensors are, bit by bit, what they were here after that step.

        :raises FalseFigureError: if not; says whether it holds several steps.
        """
        floods, touches = self._history[step]
        behind, touched = self.optimizer.floods - floods, self.optimizer.touches - touches
        mine = self.named()
        if mine.keys() != other.keys():
            raise FalseFigureError(f"other tensors came back: {sorted(mine.keys() ^ other.keys())[:3]}")
        wrong: dict[str, float] = {}
        for name, tensor in mine.items():
            theirs = _as_tensor(other[name]).to(tensor.device).reshape(-1)
            expected = tensor.detach().reshape(-1) - behind * UNIT
            expected[:1] -= touched * UNIT
            if expected.numel() > 1:
                expected[-1:] -= touched * UNIT
            if not torch.equal(expected.view(torch.int32), theirs.view(torch.int32)):
                wrong[name] = float(theirs[0] - expected[0]) / UNIT
        if not wrong:
            return
        offsets = {*wrong.values()} | ({0.0} if len(wrong) < len(mine) else set())
        torn = f"it is torn: beside step {step} it holds " if len(offsets) > 1 else "all of it lies "
        steps = ", ".join(f"{offset:+g}" for offset in sorted(offsets)[:5])
        raise FalseFigureError(
            f"{len(wrong)} of {len(mine)} tensors are not as they were after step {step}, {next(iter(wrong))!r} say; "
            f"{torn}{steps} steps off"
        )

    def _step(self) -> None:
        self.optimizer.step()
        self._remember()

    def _remember(self) -> None:
        self._history[self.steps] = self.optimizer.floods, self.optimizer.touches


def _fill(tensor: torch.Tensor) -> None:
    """Whole numbers of units, with as many random bits as there is room for."""
    with torch.no_grad():
        tensor.random_(0, _UNITS).mul_(UNIT)


def _filled_like(parameter: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty_like(parameter.detach())
    _fill(tensor)
    return tensor


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)


def _gpt_size(width: int) -> int:
    return 4 * (65 * width * width + 1024 * width + LAYERS * (12 * width * width + 13 * width) + 2 * width)
