"""Passes that several ranks share: cut in two on every rank, and gone on with among another number of ranks."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler  # noqa: E402

from supervise_core import DataPositionError, Supervisor  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402
from supervise_torch.loader import LoaderSource  # noqa: E402
from supervise_torch.shares import dealt, used_samples  # noqa: E402

EPOCHS = 3


class Items(Dataset[Any]):
    """Numbers, each with something that is drawn when it is fetched."""

    def __init__(self, size: int = 26) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, random.random(), float(torch.rand(1))], dtype=torch.float64)


def loader(rank: int, ranks: int, batch: int | None = 2, size: int = 26, workers: int = 0, **options: Any) -> Any:
    sampler = DistributedSampler(Items(size), ranks, rank, **options)
    return DataLoader(sampler.dataset, batch, sampler=sampler, num_workers=workers)


def train(logdir: Path, data: Any, stop_at: int = 0, *, told: bool = False) -> list[Any]:
    """The batches that one rank trains on; it asks to stop after ``stop_at`` steps. ``told``: of each epoch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), logdir, summarize_every=None)
    seen: list[Any] = []
    with sv.managed_session() as session:
        for epoch in sv.epochs(EPOCHS):
            if told:
                data.sampler.set_epoch(epoch)
            for batch in sv.batches(data):
                optimizer.zero_grad()
                model(batch.float()).sum().backward()
                optimizer.step()
                seen.append(batch.tolist())
                if session.global_step == stop_at:
                    sv.request_stop()
    return seen


def samples(batches: list[Any]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


@pytest.mark.parametrize("told", [True, False], ids=["set_epoch is called", "it is not"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_goes_on_where_it_was(tmp_path: Path, workers: int, told: bool) -> None:
    ranks = 3
    for rank in range(ranks):
        whole = train(tmp_path / f"{rank} whole", loader(rank, ranks, workers=workers), told=told)
        assert len(whole) == EPOCHS * 5
        for cut in (7, 10):  # in the middle of an epoch, and at the end of one
            logdir = tmp_path / f"{rank} {cut}"
            first = train(logdir, loader(rank, ranks, workers=workers), cut, told=told)
            second = train(logdir, loader(rank, ranks, workers=workers), told=told)
            assert first + second == whole
            assert len(first) == cut


def test_each_pass_has_an_order_of_its_own_whoever_says_so(tmp_path: Path) -> None:
    told = train(tmp_path / "told", loader(0, 3), told=True)
    assert train(tmp_path / "not told", loader(0, 3)) == told
    orders = [samples(told[5 * epoch : 5 * epoch + 5]) for epoch in range(EPOCHS)]
    for epoch, order in enumerate(orders):
        sampler = DistributedSampler(Items(), 3, 0)
        sampler.set_epoch(epoch)
        assert order == list(sampler)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_an_epoch_that_the_program_has_set_stands(tmp_path: Path) -> None:
    data = loader(0, 3)
    data.sampler.set_epoch(7)
    whole = train(tmp_path, data)
    assert [samples(whole[5 * epoch : 5 * epoch + 5]) for epoch in range(EPOCHS)] == [list(data.sampler)] * EPOCHS


def test_a_pass_goes_on_in_the_order_in_which_it_began(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", loader(0, 3))
    train(tmp_path / "cut", loader(0, 3), 3)
    data = loader(0, 3)
    data.sampler.set_epoch(5)
    assert train(tmp_path / "cut", data)[:2] == whole[3:5]


def test_ranks_that_are_seeded_alike_draw_other_values() -> None:
    drawn = []
    for rank in range(3):
        source = LoaderSource(loader(rank, 3), 1)
        source.start(0, None, 0)
        drawn.append(tuple(source.draw()[:, 1].tolist()))
    assert len(set(drawn)) == 3


def test_the_order_is_saved_and_a_sampler_is_left_as_it_was() -> None:
    data = loader(1, 2)
    source = LoaderSource(data, 1)
    source.start(4, None, 0)
    assert source.state()["share"]["order"]["epoch"] == 4
    assert (data.sampler.epoch, data.sampler.rank, data.sampler.num_replicas) == (0, 1, 2)


# ---- among another number of ranks


def drawn(source: LoaderSource, count: int | None = None) -> list[Any]:
    batches: list[Any] = []
    while count is None or len(batches) < count:
        try:
            batches.append(source.draw().reshape(-1, 3).tolist())
        except StopIteration:
            break
    return batches


def begun(ranks: int, **options: Any) -> list[LoaderSource]:
    sources = [LoaderSource(loader(rank, ranks, **options), 1) for rank in range(ranks)]
    for source in sources:
        source.start(1, None, 0)
    return sources


def gone_on(state: Any, consumed: int, before: int, ranks: int, **options: Any) -> list[LoaderSource]:
    sources = [LoaderSource(loader(rank, ranks, **options), 1) for rank in range(ranks)]
    for source in sources:
        if before == ranks:
            source.start(1, state, consumed)
        else:
            source.start_among(1, state, consumed, (before, ranks))
    return sources


def stretch(sources: list[LoaderSource], count: int | None = None) -> list[int]:
    """The samples that all ranks draw in so many batches each; each rank has equally many."""
    each = [samples(drawn(source, count)) for source in sources]
    assert len({len(one) for one in each}) == 1
    return [sample for one in each for sample in one]


def test_three_worlds_one_after_another_see_each_sample_once() -> None:
    sources = begun(4)
    seen = stretch(sources, 2)
    assert len(seen) == 16
    sources = gone_on(sources[0].state(), 2, 4, 3, batch=1)
    assert sources[0].length() == 2 + 4
    seen += stretch(sources, 2)
    assert len(set(seen)) == len(seen) == 22
    sources = gone_on(sources[2].state(), 4, 3, 2)
    seen += stretch(sources)
    assert sorted(seen) == list(range(26))


def test_a_position_among_others_is_saved_and_gone_on_with() -> None:
    sources = begun(3)
    stretch(sources, 1)
    state = sources[0].state()
    whole = [drawn(source) for source in gone_on(state, 1, 3, 2)]
    sources = gone_on(state, 1, 3, 2)
    first = [drawn(source, 3) for source in sources]
    second = [drawn(source) for source in gone_on(sources[1].state(), 4, 2, 2)]
    assert [one + two for one, two in zip(first, second, strict=True)] == whole


def test_another_batch_size_goes_on_at_the_sample() -> None:
    sources = begun(2, batch=4)
    seen = stretch(sources, 2)
    seen += stretch(gone_on(sources[0].state(), 2, 2, 2, batch=3))
    assert sorted(seen) == list(range(26))


def test_without_batches_and_with_a_batch_sampler_of_the_program() -> None:
    sources = begun(2, batch=None)
    seen = stretch(sources, 7)
    [state, _] = [source.state() for source in sources]
    for rank in range(3):
        sampler = DistributedSampler(Items(), 3, rank)
        source = LoaderSource(DataLoader(Items(), batch_sampler=BatchSampler(sampler, 2, drop_last=False)), 1)
        source.start_among(1, state, 7, (2, 3))
        seen += samples(drawn(source))
    assert sorted(seen) == list(range(26))


def test_a_dataset_of_another_size_is_an_error() -> None:
    [source] = begun(1)
    with pytest.raises(DataPositionError, match="the dataset has 25 samples, and it had 26 when it was saved"):
        gone_on(source.state(), 1, 1, 2, size=25)


def test_a_loader_that_does_not_share_is_an_error() -> None:
    source = LoaderSource(DataLoader(Items(), 2, shuffle=True), 1)
    source.start(0, None, 0)
    with pytest.raises(DataPositionError, match="begun on 2 ranks, and there are 3 now"):
        source.start_among(0, source.state(), 1, (2, 3))


sizes = st.integers(1, 60)
worlds = st.integers(1, 9)


@settings(deadline=None)
@given(sizes, worlds, st.booleans(), st.booleans(), st.integers(0, 3))
def test_ranks_are_dealt_what_the_sampler_gives_them(
    size: int, ranks: int, drop_last: bool, shuffle: bool, epoch: int
) -> None:
    order = list(range(size))
    whole = DistributedSampler(order, 1, 0, shuffle)
    whole.set_epoch(epoch)
    if drop_last and size < ranks:
        return  # PyTorch fails there
    for rank in range(ranks):
        sampler = DistributedSampler(order, ranks, rank, shuffle, drop_last=drop_last)
        sampler.set_epoch(epoch)
        assert dealt(list(whole), 0, rank, ranks, drop_last=drop_last) == list(sampler)


@settings(deadline=None)
@given(sizes, st.lists(st.tuples(worlds, st.integers(1, 8), st.integers(0, 5)), min_size=1, max_size=4), st.booleans())
def test_whatever_the_worlds_each_sample_comes_once(
    size: int, stretches: list[tuple[int, int, int]], drop_last: bool
) -> None:
    """``stretches``: how many ranks, batches of what size, and how many of them until the next stop."""
    order = random.Random(size).sample(range(size), size)
    seen: Counter[int] = Counter()
    begin = 0
    for number, (ranks, batch, batches) in enumerate(stretches):
        is_last = number == len(stretches) - 1
        shares = [dealt(order, begin, rank, ranks, drop_last=drop_last) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        taken = [share if is_last else share[: batch * batches] for share in shares]
        seen.update(sample for share in taken for sample in share)
        begin = size if is_last else used_samples(size, ranks, batch, batches, begin)
        lost, repeated = set(order) - set(seen), seen.total() - len(seen)
        assert not lost & set(order[:begin]) or (drop_last and begin == size and len(lost) < ranks)
        assert repeated == 0 or (not drop_last and begin == size and repeated < ranks)
        if begin == size:
            break
