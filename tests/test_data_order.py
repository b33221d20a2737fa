"""The order of the data: a stateless permutation of windows, and what that promises."""
import json

import numpy as np
import pytest
import torch

from conftest import make_data
from data.splits import fingerprint, load_meta, open_split
from train import Split, permute


def split_of(ids, block_size=8, seed=0, mask=None, vocab_size=2**16):
    ids = np.arange(ids, dtype=np.uint16) if isinstance(ids, int) else ids
    return Split("x.bin", ids, mask, vocab_size, block_size, seed)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(n):
    assert sorted(permute(np.arange(n), n, key=7).tolist()) == list(range(n))


def test_permute_needs_no_memory_for_huge_n_and_looks_random():
    n = 10**15
    images = permute(np.arange(20000), n, key=3)
    assert len(set(images.tolist())) == 20000 and 0 <= images.min() and images.max() < n
    assert np.histogram(images, bins=10, range=(0, n))[0].min() > 1800  # 2000 each, 4.7 standard deviations
    steps = np.diff(permute(np.arange(5000), 5000, key=1))
    assert abs(np.corrcoef(np.arange(5000), permute(np.arange(5000), 5000, key=1))[0, 1]) < 0.05 and len(set(steps.tolist())) > 3000
    assert not np.array_equal(permute(np.arange(50), 50, key=1), permute(np.arange(50), 50, key=2))


def test_no_token_is_a_target_twice_in_an_epoch_and_the_phase_moves():
    split = split_of(1003)
    assert split.n_windows == 1002 // 8 - 1
    phases = set()
    for epoch in range(20):
        _, y = split.get_batch(epoch * split.n_windows, split.n_windows)
        targets = y.flatten().tolist()
        assert len(set(targets)) == len(targets) == split.n_windows * 8
        phases.add(min(targets))
    assert len(phases) > 5


def test_every_position_comes_up_over_the_epochs():
    split, seen = split_of(100), set()
    for epoch in range(60):
        seen |= set(split.get_batch(epoch * split.n_windows, split.n_windows)[1].flatten().tolist())
    assert seen == set(range(1, 100))


def test_targets_are_one_token_ahead():
    x, y = split_of(1000).get_batch(5, 4)
    assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64 and torch.equal(y, x + 1)


def test_rows_do_not_depend_on_how_they_are_asked_for():
    """Two micro-batches are one, across the end of an epoch and of a cached chunk too: ranks and batch sizes do not matter."""
    split = split_of(np.arange(60000) % 60000, block_size=4)
    assert split.n_windows > 3 * 4096
    for cursor in (0, 4090, split.n_windows - 3, 5 * split.n_windows - 1):
        whole = split.get_batch(cursor, 12)[0]
        parts = torch.cat([split.get_batch(cursor + i, 3)[0] for i in range(0, 12, 3)])
        again = Split("x.bin", split.tokens, None, 2**16, 4, 0).get_batch(cursor, 12)[0]
        assert torch.equal(whole, parts) and torch.equal(whole, again)
    assert not torch.equal(split.get_batch(0, 12)[0], split_of(split.tokens, 4, seed=1).get_batch(0, 12)[0])


def test_a_batch_larger_than_the_data_straddles_epochs():
    split = split_of(9)  # one window, and no room to move
    assert split.n_windows == 1
    x, _ = split.get_batch(0, 3)
    assert x.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100, 105])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_evaluation_sees_every_target_once_in_its_context(length, batch_size):
    seen = []
    for x, y in split_of(length).batches(batch_size):
        assert x.shape == y.shape == (batch_size, 8)
        assert x.min() >= 0
        counted = y != -100
        assert torch.equal(y[counted], x[counted] + 1)
        for row_x, row_y in zip(x.tolist(), y.tolist()):
            if row_y[0] != -100:
                assert row_x[0] % 8 == 0  # windows stand where they would without batches
        seen += y[counted].tolist()
    assert sorted(seen) == list(range(1, length))


def test_an_evaluation_of_n_batches_is_always_the_same():
    a, b = ([x.tolist() for x, _ in split_of(1000).batches(4, count=3)] for _ in range(2))
    assert a == b and len(a) == 3


def test_masked_targets_are_left_out():
    mask = (np.arange(1000) % 3 > 0).astype(np.uint8)
    x, y = split_of(1000, mask=mask).get_batch(0, 8)
    assert x.min() >= 0
    assert torch.equal(y, torch.where((x + 1) % 3 > 0, x + 1, -100))


def test_a_bad_id_in_the_middle_is_caught_by_its_batch():
    ids = np.zeros(1000, np.uint16)
    ids[500] = 64
    with pytest.raises(ValueError, match="token id 64.*vocab_size=64"):
        for i in range(200):
            split_of(ids, vocab_size=64).get_batch(i, 1)


def test_nanogpts_folders_and_npy_files_are_valid(tmp_path, caplog):
    ids = np.arange(1000) % 500
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "val.npy", ids)
    meta = load_meta(tmp_path)
    assert meta["vocab_size"] == 50257 and meta["dtype"] == "uint16" and "no meta.json" in caplog.text
    for split in ("train", "val"):
        _, tokens, mask = open_split(tmp_path, split, meta, 8)
        assert np.array_equal(tokens, ids) and mask is None
    assert open_split(tmp_path, "test", meta, 8) is None


@pytest.mark.parametrize("spoil, words", [
    (lambda d: (d / "train.bin").unlink(), "train.bin.*prepare.py"),
    (lambda d: (d / "train.bin").write_bytes(b""), "0 tokens.*block_size"),
    (lambda d: (d / "train.bin").write_bytes(b"abc"), "3 bytes"),
    (lambda d: (d / "train.bin").write_bytes(b"\0" * 32), "16 tokens.*17"),
    (lambda d: (d / "train.bin").write_bytes(b"\0" * 200 + b"\x30\0"), "token id 48.*vocab_size=48"),
    (lambda d: (d / "meta.json").write_text("[]"), "meta.json"),
    (lambda d: (d / "meta.json").write_text("{"), "meta.json"),
    (lambda d: (d / "meta.json").write_text('{"vocab_size": 48, "dtype": "int8"}'), "meta.json.*dtype"),
    (lambda d: (d / "train.mask.bin").write_bytes(b"1"), "train.mask.bin"),
    (lambda d: ((d / "meta.json").rename(d / "meta.pkl")), "meta.pkl.*never opened.*meta.json")])
def test_bad_data_is_named(tmp_path, spoil, words):
    folder = make_data(tmp_path / "d")
    spoil(folder)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        open_split(folder, "train", load_meta(folder), 16)


def test_max_id_in_meta_is_believed(tmp_path):
    folder = make_data(tmp_path / "d")
    meta = json.loads((folder / "meta.json").read_text()) | {"max_id": 48}
    with pytest.raises(ValueError, match="token id 48"):
        open_split(folder, "train", meta, 16)


def test_the_fingerprint_tells_data_apart():
    a, b = np.arange(100, dtype=np.uint16), np.arange(1, 101, dtype=np.uint16)
    assert fingerprint({"train": a}) == fingerprint({"train": a.copy()})
    assert len({fingerprint(s) for s in ({"train": a}, {"train": b}, {"train": a[:99]}, {"train": a, "val": b})}) == 4
