"""The cache of decoded examples: the same inputs bit for bit, decoded once, within its budget, whoever reads."""

import gc
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image
from small_images import everything, pictures, ready, table

from tva.data.decode_cache import Decoder, SampleCache


@pytest.fixture
def parquet():
    table(41).to_parquet("pets-train.parquet")
    table(13, seed=1).to_parquet("pets-test.parquet")
    return "pets-{split}.parquet"


def counting(calls, transform=None):
    from tva.models.clip import load_clip

    steps = (transform or load_clip("tva-tiny")[1]).transforms

    class Counted:
        transforms = [lambda image: (calls.append(1), image)[1], *steps]  # noqa: RUF012

        def __call__(self, image):
            for step in self.transforms:
                image = step(image)
            return image

    return Counted()


def timm_transform():
    from timm.data import create_transform

    return create_transform((3, 24, 24), is_training=False, crop_pct=1.0)


@pytest.mark.parametrize("make", [lambda: image_transform(24, is_train=False), timm_transform])
def test_inputs_are_those_of_the_transform_bit_for_bit_and_a_byte_a_value_is_kept(make):
    transform = make()
    images = [Image.fromarray(np.kron(picture, np.ones((9, 11, 1), np.uint8))) for picture in pictures(5)]
    decoder = Decoder(transform)
    kept = np.stack([decoder.decode(image) for image in images])
    assert kept.dtype == np.uint8
    assert torch.equal(decoder.finish(kept), torch.stack([transform(image) for image in images]))


def test_a_transform_that_cannot_be_cut_is_kept_whole():
    def halved(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 2

    decoder = Decoder(halved)
    image = Image.fromarray(pictures(1)[0])
    assert torch.equal(decoder.finish(decoder.decode(image)[None])[0], halved(image))


@pytest.mark.parametrize("budget", ["0", "600kB", "1GiB"])
def test_any_budget_gives_the_same_batches_and_only_what_fits_is_decoded_once(parquet, budget):
    calls = []
    task = ready(parquet, transform=counting(calls), batch_size=4, cache=budget)
    plain = ready(parquet, transform=counting([]), batch_size=4, cache="1GiB")
    for _ in range(3):
        images, labels = everything(task.val_dataloader())
        expected = everything(plain.val_dataloader())
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
    assert len(calls) == {"0": 3 * 4 + 1}.get(budget, 4)


def test_rows_beyond_the_budget_are_decoded_each_time():
    calls = []

    def decode(row):
        calls.append(row)
        return np.full((2, 2), row, np.uint8)

    cache = SampleCache(10, np.zeros((2, 2), np.uint8), max_bytes=15)  # three rows of 4 bytes and a flag each
    assert cache.num_bytes == 15
    for _ in range(2):
        assert cache.take([0, 2, 7], decode)[:, 0, 0].tolist() == [0, 2, 7]
    assert calls == [0, 2, 7, 7]


def test_a_copy_in_another_process_shares_the_file_and_only_the_maker_removes_it():
    cache = SampleCache(4, np.zeros(3, np.float32), max_bytes=1000)
    cache.take([1], lambda row: np.full(3, 5.5, np.float32))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.take([1], lambda row: None)[0].tolist() == [5.5] * 3
    folder = cache._path.parent
    del copy
    gc.collect()
    assert folder.exists()
    del cache
    gc.collect()
    assert not folder.exists()


def test_a_full_disk_is_reported_before_anything_is_decoded(monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ValueError, match="were to take 0 MiB in .* Lower the task's cache, or set TMPDIR"):
        SampleCache(10, np.zeros(100, np.uint8), max_bytes=10_000)
    assert shutil.disk_usage("/").free > 0


def test_examples_of_two_shapes_are_refused(parquet):
    sizes = iter([4, 4, 5])

    def odd(image):
        return torch.zeros(3, next(sizes), 4)

    with pytest.raises(ValueError, match="one shape after the model's image_transform; the first has"):
        everything(ready(parquet, transform=odd).test_dataloader())


# --- the same order on any number of ranks and workers


def epochs(path, ranks=1, rank=0, batch_size=8, num_workers=0, num_epochs=2, **options):
    """Return the images of each step of each epoch as a rank sees them."""
    task = ready(path, batch_size=batch_size, num_workers=num_workers, **options)
    task.trainer = SimpleNamespace(
        lightning_module=task.trainer.lightning_module, world_size=ranks, global_rank=rank, num_devices=ranks
    )
    loader = task.train_dataloader()
    steps = []
    for epoch in range(num_epochs):
        loader.sampler.set_epoch(epoch)
        steps.append([images for images, _ in loader])
    return steps


def as_set(images):
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_take_in_each_step_what_one_process_takes(parquet, num_workers):
    options = {"limit_train": 36, "num_workers": num_workers}
    alone = epochs(parquet, batch_size=8, **options)
    both = [epochs(parquet, ranks=2, rank=rank, batch_size=4, **options) for rank in (0, 1)]
    for epoch in range(2):
        for whole, left, right in zip(alone[epoch], both[0][epoch], both[1][epoch], strict=True):
            assert as_set(whole) == as_set([*left, *right])
    assert as_set(torch.cat(alone[0])) == as_set(torch.cat(alone[1]))
    assert not torch.equal(torch.cat(alone[0]), torch.cat(alone[1])), "each epoch has an order of its own"


@pytest.mark.slow
def test_workers_change_nothing_and_share_the_cache(parquet):
    plain, shared = epochs(parquet), epochs(parquet, num_workers=2, num_epochs=2)
    for left, right in zip(plain, shared, strict=True):
        assert torch.equal(torch.cat(left), torch.cat(right))


def test_the_runs_seed_decides_the_order_of_training(parquet, monkeypatch):
    default = epochs(parquet)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    first, again = epochs(parquet), epochs(parquet)
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], default[0][0])
