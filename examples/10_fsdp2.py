"""FSDP2 in PyTorch: each process keeps a piece of the weights, and checkpoints go on with any number of processes.

Start it, end it at any moment, and start it again with as many processes, or with fewer, or with more::

    pip install '.[torch,examples]'
    torchrun --nproc-per-node 4 examples/10_fsdp2.py --logdir runs/fsdp2 --epochs 5
    torchrun --nproc-per-node 2 examples/10_fsdp2.py --logdir runs/fsdp2 --epochs 8

All processes must see the log directory: each writes its own pieces there. With as many processes as before, what
follows is what would have followed anyway, to the last bit.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from supervise_core import CheckpointDirectory, EverySeconds, EverySteps, KeepLatest, Supervisor
from supervise_torch import StoreMembership, TorchBackend, init_process_group


def make_model() -> nn.Sequential:
    """A network of three layers."""
    return nn.Sequential(
        nn.Linear(64, 200), nn.LayerNorm(200), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/fsdp2")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    torch.set_num_threads(1)
    init_process_group("gloo")
    membership = StoreMembership.from_environment()
    torch.manual_seed(0)  # the same weights everywhere, before each process keeps only its piece of them
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # made of the pieces, so after fully_shard
    torch.manual_seed(membership.rank)  # and from here on each process draws numbers of its own

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = TensorDataset(images[:1500], labels[:1500])
    loader = DataLoader(train, batch_size=20, sampler=DistributedSampler(train, drop_last=True))

    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer),
        options.logdir,
        membership=membership,
        save_every=EverySeconds(600) | EverySteps(50),
        keep=KeepLatest(2),
    )
    with sv.managed_session() as sess:
        if membership.is_chief:
            print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        for epoch in sv.epochs(options.epochs):
            for batch, targets in sv.batches(loader):
                loss = nn.functional.cross_entropy(model(batch), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sv.scalars(loss=loss)
            if membership.is_chief:
                print(f"epoch {epoch}: step {sess.global_step}, loss {loss.item():.3f}", flush=True)

    if membership.is_chief:
        print(f"done: step {sv.global_step}, by {dist.get_world_size()} processes")
        whole = make_model()  # in one piece, in one process, without any of the above
        whole.load_state_dict(CheckpointDirectory(options.logdir).newest().load("model"))
        right = (whole.eval()(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean().item()
        print(f"accuracy {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
