"""What each rank draws of one global order of samples, and how a pass goes on among another number of ranks.

``DistributedSampler`` gives rank r of N every N-th sample of an order that all ranks agree on, from the r-th on. So
after k batches of B on N ranks, the first k·B·N samples of the order are used, and no others. A pass that is gone on
with on M ranks, or with another batch size, deals out the rest of the order anew, in the same way: no sample is lost
and none comes twice, but for those that fill up the last round, of which there are fewer than M, as in any pass. (With
``drop_last`` fewer than M are left out instead.)

The order is that of the sampler's epoch, as ``set_epoch`` says. Where that is 0, because nobody has called it, the
number of the pass takes its place, so that each pass has an order of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from supervise_core.errors import DataPositionError


def used_samples(size: int, ranks: int, batch: int, batches: int, begin: int = 0) -> int:
    """How much of an order of so many samples all ranks have used, when each had so many batches from ``begin`` on."""
    return min(size, begin + batches * batch * ranks)


def dealt(order: Sequence[int], begin: int, rank: int, ranks: int, *, drop_last: bool = False) -> list[int]:
    """What a rank gets of the samples of an order from ``begin`` on; all ranks get equally many.

    The last round is filled up from the beginning of the order, or left out.
    """
    rest = list(order[begin:])
    over = len(rest) % ranks
    if over and drop_last:
        del rest[-over:]
    elif over:
        rest += itertools.islice(itertools.cycle(order), ranks - over)
    return rest[rank::ranks]


@dataclass(frozen=True, slots=True)
class Order:
    """What decides the order of a pass."""

    size: int
    seed: int
    epoch: int
    shuffle: bool

    def samples(self) -> list[int]:
        """The order, as a sampler for all ranks at once has it."""
        whole: DistributedSampler[Any] = DistributedSampler(range(self.size), 1, 0, self.shuffle, self.seed)  # type: ignore[arg-type]
        whole.set_epoch(self.epoch)
        return list(whole)


@dataclass(frozen=True, slots=True)
class Share:
    """Which samples of the order of a pass a rank draws."""

    order: Order
    rank: int
    ranks: int
    batch: int
    drop_last: bool
    begin: int = 0
    """How much of the order was used up before, among other numbers of ranks."""
    after: int = 0
    """How many batches this rank had by then."""

    def indices(self) -> list[int]:
        """The samples in their order."""
        return dealt(self.order.samples(), self.begin, self.rank, self.ranks, drop_last=self.drop_last)

    def state(self) -> dict[str, Any]:
        """What ``share_of`` needs to go on; plain data, and the same on all ranks."""
        stretch = {"ranks": self.ranks, "batch": self.batch, "begin": self.begin, "after": self.after}
        return {"order": asdict(self.order), **stretch}


def share_of(loader: DataLoader[Any], number: int) -> Share | None:
    """The share of a loader's rank in the pass ``number``; None if the loader does not share its samples."""
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if type(sampler) is not DistributedSampler or type(batches) not in (BatchSampler, type(None)):
        return None
    dataset: Any = sampler.dataset
    order = Order(len(dataset), sampler.seed, sampler.epoch or number, sampler.shuffle)
    batch = 1 if batches is None else batches.batch_size
    return Share(order, sampler.rank, sampler.num_replicas, batch, sampler.drop_last)


def share_going_on(share: Share, saved: Mapping[str, Any], consumed: int) -> Share:
    """The share with which a pass is gone on with of which ``consumed`` batches were used.

    :raises DataPositionError: if the dataset is another one.
    """
    order = Order(**saved["order"])
    if order.size != share.order.size:
        raise DataPositionError(
            f"the dataset has {share.order.size} samples, and it had {order.size} when it was saved; "
            "resume with the data that the run was saved with"
        )
    begin, after = saved["begin"], saved["after"]
    if (saved["ranks"], saved["batch"]) != (share.ranks, share.batch):
        begin = used_samples(order.size, saved["ranks"], saved["batch"], consumed - after, begin)
        after = consumed
    return Share(order, share.rank, share.ranks, share.batch, share.drop_last, begin, after)
