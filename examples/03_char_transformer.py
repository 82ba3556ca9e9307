"""A character transformer in PyTorch, on the text of Python's own manual that ships with CPython.

It counts in steps, not in epochs: one endless stream of random windows, whose generator is a part of the checkpoint.
Gradients are accumulated over two batches; no checkpoint ever holds half a step::

    pip install '.[torch]'
    python examples/03_char_transformer.py --logdir runs/characters --steps 100
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pydoc_data import topics

import torch
from torch import nn

from supervise_core import EverySteps, KeepLatest, Supervisor, Text
from supervise_torch import TorchBackend

CONTEXT = 48
WIDTH = 64
BATCH = 16
ACCUMULATE = 2

TEXT = "".join(topics.topics[name] for name in sorted(topics.topics))[:400_000]
ALPHABET = sorted(set(TEXT))
CODES = torch.tensor([ALPHABET.index(character) for character in TEXT[:200_000]])


class CharacterTransformer(nn.Module):
    """Predicts each next character from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        nn.init.normal_(self.characters.weight, std=0.05)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.scores = nn.Linear(WIDTH, len(ALPHABET), bias=False)
        self.scores.weight = self.characters.weight  # tied; a checkpoint keeps it so

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.characters(codes) + self.places(torch.arange(length)), mask=mask, is_causal=True)
        return torch.as_tensor(self.scores(hidden))

    @torch.no_grad()
    def write(self, begin: str, length: int) -> str:
        """Go on with a text, always by the likeliest character."""
        self.eval()
        codes = [ALPHABET.index(character) for character in begin]
        for _ in range(length):
            codes.append(int(self(torch.tensor([codes[-CONTEXT:]]))[0, -1].argmax()))
        self.train()
        return "".join(ALPHABET[code] for code in codes)


class Windows:
    """Random windows of the text, without end."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            starts = torch.randint(len(CODES) - CONTEXT - 1, (BATCH,), generator=self.generator)
            yield torch.stack([CODES[start : start + CONTEXT + 1] for start in starts.tolist()])

    def state_dict(self) -> dict[str, bytes]:
        """Where the stream stands, as plain data: ``sv.batches`` asks for this, and need not replay anything."""
        return {"generator": self.generator.get_state().numpy().tobytes()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        """Go on from there."""
        self.generator.set_state(torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8))


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/characters")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the quickest for a network of this size
    model = CharacterTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    windows = Windows(torch.Generator().manual_seed(1))

    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer, scheduler=scheduler),
        options.logdir,
        save_every=EverySteps(20),
        summarize_every=EverySteps(5),
        keep=KeepLatest(2),
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        if sess.global_step >= options.steps:
            sv.request_stop()
        for number, window in enumerate(sv.batches(windows), start=1):
            scores = model(window[:, :-1])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten())
            (loss / ACCUMULATE).backward()
            if number % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if sess.global_step % 20 == 0:
                    print(f"step {sess.global_step}: loss {loss.item():.3f}", flush=True)
            sv.scalars(loss=loss)
            if sess.global_step >= options.steps:
                sv.request_stop()  # and no break: so the stream's position is kept, and more --steps go on from it
        sample = model.write("The ", 60)
        sv.summary_computed(sess, {"sample": Text(sample)})
    print(f"done: step {sv.global_step}; it writes: {sample!r}")


if __name__ == "__main__":
    main()
