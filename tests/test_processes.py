"""common/processes.py: what several processes share out, agree on and do together."""

from types import SimpleNamespace

import pytest
import torch

from common.processes import Run, on_main


def process(rank: int, world_size: int) -> Run:
    """A run as one of its processes sees it."""
    place = SimpleNamespace(process_index=rank, num_processes=world_size, is_main_process=rank == 0)
    names = dict.fromkeys(Run.__dataclass_fields__) | {"accelerator": place, "strategy": "fsdp2"}
    return Run(**names)


@pytest.mark.parametrize(("items", "world_size"), [("abcde", 2), ("abcde", 3), ("ab", 4), ("abcd", 2), ("abc", 1)])
def test_all_do_as_many_forwards_and_each_item_counts_once(items, world_size):
    """Catches a validation that hangs, since one process of a sharded model calls it more often, and rows that are
    counted twice or not at all."""
    done = [list(process(rank, world_size).in_step(items)) for rank in range(world_size)]
    assert len({len(each) for each in done}) == 1
    counted = sorted((index, item) for each in done for index, item, counts in each if counts)
    assert counted == list(enumerate(items))
    assert all(item in items for each in done for _, item, _ in each)
    assert list(process(0, world_size).in_step("")) == []


def test_shares_are_a_partition():
    """Catches work that two processes do, or none."""
    shares = [process(rank, 3).share_of(list(range(10))) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_means_of_no_values_are_none():
    """Catches a held-out loss of nan or zero where there are no held-out rows."""
    run = process(0, 1)
    run.accelerator.device = torch.device("cpu")
    assert run.mean_of([]) is None
    assert run.mean_of([torch.tensor(1.0), torch.tensor(2.0).bfloat16(), torch.tensor(6.0)]) == pytest.approx(3.0)


def test_a_mistake_on_the_main_process_is_everybodys(monkeypatch):
    """Catches processes that wait for ever for one that has ended, or go on with nothing."""
    sent = []

    def broadcast(outcome: list, src: int) -> None:
        if sent:
            outcome[:] = sent[0]
        sent.append(list(outcome))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no folder")

    for rank in range(2):
        with pytest.raises(ValueError, match="data is no folder"):
            on_main(process(rank, 2), refuse, name="data")
    sent.clear()
    assert [on_main(process(rank, 2), max, 3, 4) for rank in range(2)] == [4, 4]
