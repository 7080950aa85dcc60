"""A set of codes: shared batch by batch, resumed at that grain, the same files for any number of ranks, few open
files."""

import os
import resource
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.runtime.distributed import World
from neon.store import filling, shards
from neon.store.files import folder_lock
from neon.store.filling import Plan, fill


def plan(folder: Path, **changes) -> Plan:
    folder.mkdir(exist_ok=True)
    return Plan(**{"folder": folder, "num_images": 20, "shard_images": 8, "batch": 3, "damaged": "refuse", **changes})


class Maker:
    """Image i is filled with i; notes what it made, and is killed after `lives` batches."""

    def __init__(self, lives: int | None = None):
        self.made: list[list[int]] = []
        self.lives = lives

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[filling.Made]:
        for batch in batches:
            if len(self.made) == self.lives:
                raise KeyboardInterrupt
            self.made.append(list(batch))
            index = torch.tensor(batch)
            yield batch, index[:, None, None].expand(-1, 2, 2).to(torch.float32), index % 3


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_every_batch_is_made_once_whenever_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(filling._Keeper, "SHARE_OF_TIME", float("inf"))  # every batch is written down at once
    whole = Maker()
    found = fill(plan(tmp_path / "whole"), whole, World(), "synth")
    assert found.read(range(20))[:, 0, 0].tolist() == list(range(20))
    assert found.labels.tolist() == [i % 3 for i in range(20)]
    assert whole.made == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10], [11, 12, 13], [14, 15], [16, 17, 18], [19]]
    for lives in range(len(whole.made)):
        folder = tmp_path / f"killed-{lives}"
        killed, again = Maker(lives), Maker()
        with pytest.raises(KeyboardInterrupt):
            fill(plan(folder), killed, World(), "synth")
        fill(plan(folder), again, World(), "synth")
        assert killed.made + again.made == whole.made
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")
        assert not (folder / "parts").exists()


class Threads(World):
    """A rank of several that are threads of this process: they meet here, and gather here."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, said: list):
        super().__init__(rank, size)
        self.__dict__.update(meeting=meeting, said=said)

    def gather(self, value):
        self.said[self.rank] = value
        self.barrier()
        found = list(self.said)
        self.barrier()
        return found

    def broadcast(self, value):
        return self.gather(value)[0]

    def barrier(self):
        self.meeting.wait(30)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shard_images", [20, 8], ids=["one shard", "three shards"])
def test_ranks_share_batches_not_shards(tmp_path, size, shard_images):
    """Also of a single shard every rank makes its share; none makes two batches more than another in a round."""
    makers, (meeting, said) = [Maker() for _ in range(size)], (threading.Barrier(size), [None] * size)
    whole = plan(tmp_path / "s", shard_images=shard_images)
    with ThreadPoolExecutor(size) as pool:
        done = [
            pool.submit(fill, whole, makers[rank], Threads(rank, size, meeting, said), "synth") for rank in range(size)
        ]
        found = [one.result() for one in done]
    assert all(one.read(range(20))[:, 0, 0].tolist() == list(range(20)) for one in found)
    counts = [len(maker.made) for maker in makers]
    assert sum(counts) == (7 if shard_images == 20 else 8)
    rounds = -(-len(whole.ranges) // size)
    assert max(counts) - min(counts) <= rounds


def test_progress_moves_with_every_batch(tmp_path, monkeypatch):
    """Not once per shard: one of 1,024 images may take an hour."""
    moves: list[int] = []

    class Bar:
        def update(self, count: int) -> None:
            moves.append(count)

        def close(self) -> None: ...

    monkeypatch.setattr(filling, "progress", lambda **options: Bar())
    fill(plan(tmp_path / "s", shard_images=20), Maker(), World(), "synth")
    assert moves == [3, 3, 3, 3, 3, 3, 2]


def test_a_part_of_another_batch_size_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(filling._Keeper, "SHARE_OF_TIME", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        fill(plan(tmp_path / "a"), Maker(2), World(), "synth")
    again = Maker()
    found = fill(plan(tmp_path / "a", batch=5), again, World(), "synth")
    assert again.made[0] == [6, 7]
    assert found.read(range(20))[:, 0, 0].tolist() == list(range(20))


def test_a_damaged_derived_shard_is_made_again_with_a_warning(tmp_path, caplog):
    fill(plan(tmp_path / "a", damaged="remake"), Maker(), World(), "encode")
    whole = bytes_of(tmp_path / "a")
    (tmp_path / "a/shard-000001.npz").write_bytes(whole["shard-000001.npz"][:-40])
    again = Maker()
    fill(plan(tmp_path / "a", damaged="remake"), again, World(), "encode")
    assert [i for batch in again.made for i in batch] == list(range(8, 16))
    assert bytes_of(tmp_path / "a") == whole
    assert "shard-000001.npz: damaged" in caplog.text
    (tmp_path / "a/shard-000001.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"shard-000001\.npz: damaged"):
        fill(plan(tmp_path / "a"), Maker(), World(), "synth")


def test_a_damaged_part_is_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(filling._Keeper, "SHARE_OF_TIME", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        fill(plan(tmp_path / "a"), Maker(2), World(), "synth")
    (part, _) = sorted((tmp_path / "a/parts").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    again = Maker()
    found = fill(plan(tmp_path / "a"), again, World(), "synth")
    assert again.made[0] == [0, 1, 2]
    assert found.read(range(20))[:, 0, 0].tolist() == list(range(20))
    assert f"{part}: damaged" in caplog.text


def test_more_shards_than_a_process_may_open(tmp_path):
    """750,000 images in shards of 1,024 are 733 files; two arrays of each were kept open, the limit is 1,024."""
    count = 400
    for i in range(count):
        shards.write_shard(shards.shard_path(tmp_path, i), torch.full((2, 1), float(i)), None, [2 * i, 2 * i + 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + shards.OPEN_FILES + 20, hard))
    try:
        found = shards.open_shards(tmp_path, 2 * count, 2)
        order = np.random.default_rng(0).permutation(2 * count)
        for _ in range(2):
            assert found.read(order.tolist())[:, 0].tolist() == (order // 2).tolist()
        assert len(os.listdir("/proc/self/fd")) <= before + shards.OPEN_FILES + 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_owner_of_a_folder_removes_half_files_at_any_depth(tmp_path):
    deep = tmp_path / "finetune/encoded/parts"
    deep.mkdir(parents=True)
    (deep / ".shard-000000.npz.0123abcd.tmp").write_bytes(b"half")
    (deep / "part-0.npz").write_bytes(b"whole")
    with folder_lock(tmp_path):
        assert [path.name for path in deep.iterdir()] == ["part-0.npz"]
