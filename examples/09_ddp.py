"""A convolutional network in PyTorch on several ranks: gradients averaged by DDP, one checkpoint of all, one stop.

It runs on a CPU, with gloo::

    pip install '.[torch,examples]'
    torchrun --standalone --nproc-per-node 2 examples/09_ddp.py --logdir runs/ddp --epochs 5

End it at any moment with Ctrl-C, with ``kill`` or with ``kill -9``, one rank or all; run it again. All ranks go on with
their very next batch, and end with the same weights, to the last bit, as if nothing had happened. With
``--max-restarts 3`` torchrun itself starts the ranks again when one has died.
"""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, random_split

from supervise_core import EverySeconds, EverySteps, Supervisor
from supervise_torch import StoreMembership, TorchBackend, init_process_group, warm_up_ddp

Sample = tuple[torch.Tensor, ...]


class Shifted(Dataset[Sample]):
    """Digits, each moved by up to one pixel when it is fetched, on each rank by numbers of its own."""

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
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, digits: Dataset[Sample]) -> float:
    """The share of digits that the model recognises."""
    model.eval()
    right = total = 0
    for images, labels in DataLoader(digits, batch_size=297):
        right += int((model(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    model.train()
    return right / total


def main() -> None:
    """Train on this rank with the others; rank 0 says what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/ddp", help="a place that all ranks see")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights and the same split everywhere ...
    digits = load_digits()
    everything = TensorDataset(
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    )
    train, test = random_split(everything, [1500, 297])
    model = make_model()
    torch.manual_seed(1 + rank)  # ... and other dropout and other augmentation on each rank
    ddp = DistributedDataParallel(model)
    warm_up_ddp(ddp, lambda: ddp(torch.zeros(2, 1, 8, 8)).sum())  # or the first steps after a restart round otherwise
    sampler = DistributedSampler[Any](Shifted(train, 1500), seed=2)
    loader = DataLoader(sampler.dataset, batch_size=25, sampler=sampler, num_workers=options.workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)

    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer, scheduler=scheduler),  # the model itself, not the wrapper
        options.logdir,
        membership=StoreMembership.from_environment(),
        save_every=EverySeconds(600) | EverySteps(20),  # the same on all ranks
        summarize_every=EverySteps(10),
    )
    with sv.managed_session() as sess:
        if sv.is_chief:
            print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        for epoch in sv.epochs(options.epochs):
            sampler.set_epoch(epoch)
            for images, labels in sv.batches(loader):
                loss = nn.functional.cross_entropy(ddp(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sv.scalars(loss=loss)
            scheduler.step()
            if sv.is_chief:
                value = accuracy(model, test)
                sv.metrics(accuracy=value)
                print(f"epoch {epoch}: step {sess.global_step}, accuracy {value:.3f}", flush=True)
    if sv.is_chief:
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
        print(f"done: step {sv.global_step}, accuracy {accuracy(model, test):.3f}, weights {digest.hexdigest()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
