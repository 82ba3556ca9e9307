"""A convolutional network in PyTorch: dropout, augmentation, AdamW, a schedule, and the best checkpoint read back.

Run it, end it at any moment, run it again: it goes on with the very next batch, whatever the number of data workers::

    pip install '.[torch,examples]'
    python examples/02_torch_digits.py --logdir runs/digits --epochs 5
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from supervise_core import CheckpointDirectory, EverySeconds, EverySteps, Histogram, KeepBest, KeepLatest, Supervisor
from supervise_torch import TorchBackend

Sample = tuple[torch.Tensor, ...]


class Shifted(Dataset[Sample]):
    """Digits, each moved by up to one pixel when it is fetched, in whichever process fetches it."""

    def __init__(self, digits: Dataset[Sample], size: int) -> None:
        self.digits = digits
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        image, label = self.digits[index]
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return image.roll((down, right), dims=(-2, -1)), label


def make_model() -> nn.Sequential:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Sample]) -> float:
    """The share of the loader's digits that the model recognises."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        right += int((model(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    return right / total


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the quickest for a network of this size
    digits = load_digits()
    everything = TensorDataset(
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    )
    train, test = random_split(everything, [1500, 297])
    loader = DataLoader(Shifted(train, 1500), batch_size=50, shuffle=True, num_workers=options.workers)
    test_loader = DataLoader(test, batch_size=297)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)

    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer, scheduler=scheduler),
        options.logdir,
        save_every=EverySeconds(600) | EverySteps(50),
        summarize_every=EverySteps(10),
        keep=KeepLatest(2) | KeepBest("accuracy", mode="max"),
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        for epoch in sv.epochs(options.epochs):
            model.train()
            for images, labels in sv.batches(loader):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sv.scalars(loss=loss, learning_rate=scheduler.get_last_lr()[0])
            value = accuracy(model, test_loader)
            sv.metrics(accuracy=value)
            sv.summary_computed(sess, {"filters": Histogram(model[0].weight)})
            scheduler.step()
            print(f"epoch {epoch}: step {sess.global_step}, accuracy {value:.3f}", flush=True)

    directory = CheckpointDirectory(options.logdir)
    checkpoints = [directory.at(step) for step in directory.steps()]
    best = max(checkpoints, key=lambda checkpoint: checkpoint.metrics.get("accuracy", 0.0))
    model.load_state_dict(best.load("model"))
    print(f"done: step {sv.global_step}, {sv.report.saves} checkpoints saved")
    print(f"best: {best.path.name}, accuracy {accuracy(model, test_loader):.3f}")


if __name__ == "__main__":
    main()
