"""Streams: the same examples as with an index, shared out to ranks and workers, an order for each epoch."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from small_images import everything, ready, table, to_tensor
from torch.utils.data import get_worker_info

from tva.data import ImageTask
from tva.data.loading import load_splits


@pytest.fixture
def parquet():
    table(40, style=["ink", "oil"] * 20).to_parquet("pets-train.parquet")
    table(12, seed=1, style=["ink", "oil"] * 6).to_parquet("pets-test.parquet")
    return "pets-{split}.parquet"


def stream(path, rank=0, ranks=1, **options):
    task = ImageTask(path, streaming=True, **{"val_size": 6, **options})
    model = SimpleNamespace(image_transform=to_tensor)
    task.trainer = SimpleNamespace(lightning_module=model, global_rank=rank, world_size=ranks, max_steps=5)
    task.setup("fit")
    return task


def as_set(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_a_stream_gives_the_examples_that_the_table_gives(parquet):
    task, indexed = stream(parquet), ready(parquet)
    assert task.class_names == ["ant", "bee", "cat"]
    for left, right in zip(everything(task.test_dataloader()), everything(indexed.test_dataloader()), strict=True):
        assert left.equal(right)
    train, val = (everything(loader)[0] for loader in (task.train_dataloader(), task.val_dataloader()))
    whole = [everything(loader)[0] for loader in (indexed.train_dataloader(), indexed.val_dataloader())]
    assert len(val) == 6
    assert as_set([*train, *val]) == as_set([*whole[0], *whole[1]])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_each_epoch_has_its_order_and_the_seed_gives_it_again(parquet, num_workers):
    loader = stream(parquet, num_workers=num_workers).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(everything(loader)[0])
    assert orders[0].equal(orders[2])
    assert not orders[0].equal(orders[1])
    assert as_set(orders[0]) == as_set(orders[1])


@pytest.mark.slow
def test_workers_read_the_epoch_and_never_set_it(parquet, monkeypatch):
    # datasets sets it by an addition in shared memory: two workers that set it from 1 to 0 at once leave -1
    whole = datasets.IterableDataset.set_epoch

    def guarded(table, epoch):
        assert get_worker_info() is None
        whole(table, epoch)

    monkeypatch.setattr(datasets.IterableDataset, "set_epoch", guarded)
    loader = stream(parquet, num_workers=2).train_dataloader()
    loader.sampler.set_epoch(1)
    assert len(everything(loader)[0]) == 34


@pytest.fixture
def folder():
    """Several files a split, which streams are tempted to share out."""
    Path("many").mkdir()
    for split, count in (("train", 46), ("test", 13)):
        for index in range(4):
            table(count, seed=index).shard(4, index).to_parquet(f"many/{split}-{index}-of-4.parquet")
    return "many"


@pytest.mark.parametrize(("ranks", "num_workers"), [(2, 0), pytest.param(2, 2, marks=pytest.mark.slow), (3, 0)])
def test_ranks_and_workers_take_together_what_one_process_takes(folder, ranks, num_workers):
    def steps(part, ranks, num_workers, epoch=1):
        loaders = []
        for rank in range(ranks):
            task = stream(folder, rank, ranks, val_size=7, batch_size=6 // ranks, num_workers=num_workers)
            loaders.append(getattr(task, f"{part}_dataloader")())
            if part == "train":
                loaders[-1].sampler.set_epoch(epoch)
        found = [[as_set(images) for images, _ in loader] for loader in loaders]
        longest = max(map(len, found))
        padded = [batches + [[]] * (longest - len(batches)) for batches in found]
        return [sorted(image for batch in step for image in batch) for step in zip(*padded, strict=True)], found

    for part in ("val", "test"):
        assert steps(part, ranks, num_workers)[0] == steps(part, 1, 0)[0]
    alone, _ = steps("train", 1, 0)
    shared, found = steps("train", ranks, num_workers)
    assert len({tuple(map(len, batches)) for batches in found}) == 1  # else a rank would wait for one that has ended
    assert shared[:-1] == alone[:-1]
    assert set(shared[-1]) <= set(alone[-1])
    assert len(shared[-1]) == 39 % 6 // ranks * ranks


def test_what_is_held_out_of_a_stream_is_never_trained_on(folder):
    held = as_set(everything(stream(folder, val_size=7).val_dataloader())[0])
    for rank in range(2):
        task = stream(folder, rank, 2, val_size=7)
        trained = as_set(everything(task.train_dataloader())[0])
        assert len(held) == 7
        assert not set(held) & set(trained)


def test_heads_are_made_of_all_training_examples_on_every_rank(folder):
    seen = [everything(stream(folder, rank, 2).prototype_dataloader())[0] for rank in (0, 1)]
    assert len(seen[0]) == 40
    assert seen[0].equal(seen[1])


def test_streams_keep_the_named_rows_and_limits(parquet):
    task = stream(parquet, where={"style": "ink", "label": ["ant", "cat"]}, limit_test=3)
    assert set(everything(task.train_dataloader())[1].tolist()) <= {0, 2}
    assert len(everything(task.test_dataloader())[1]) == 3


def test_the_hub_is_asked_to_stream(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return {split: table(20).to_iterable_dataset() for split in ("train", "validation")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = stream("owner/pets", test_split="validation", class_names=["x", "y", "z"])
    assert asked == [(("owner/pets",), {"name": None, "revision": None, "streaming": True})]
    assert len(everything(task.test_dataloader())[1]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": None}, "no tenth can be held out. Set val_split, or val_size"),
        ({"label_column": "class"}, "no column 'class'; its columns are 'image', 'label', 'style'"),
        ({"test_split": "tset"}, "no split 'tset'"),
        ({"where": {"label": "dog"}}, "where asks label for 'dog'; it holds 'ant', 'bee', 'cat'"),
        ({"prototype_where": {}}, "picks rows by number, which a stream does not have"),
    ],
)
def test_mistakes_with_streams_say_what_to_do(parquet, options, message):
    with pytest.raises(ValueError, match=message):
        stream(parquet, **options)


def test_what_cannot_be_streamed_is_refused(parquet):
    with pytest.raises(ValueError, match="takes a hub set's name, a folder, a mapping from split to file"):
        stream("builtin:digits")
    with pytest.raises(ValueError, match="must be there and of one format"):
        stream({"train": "a.npz"})
    task = ImageTask(parquet, streaming=True, val_size=3)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(image_transform=to_tensor), max_steps=-1)
    with pytest.raises(ValueError, match="training needs trainer.max_steps"):
        task.setup("fit")
    short = stream(parquet, label_column="style", class_names=["ink"])
    with pytest.raises(ValueError, match="label 'oil' is not in class_names 'ink'"):
        everything(short.test_dataloader())


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_this_machine_are_loaded_without_the_network_and_without_bars_in_pipes(monkeypatch, capsys, streaming):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a server"), raising=False)
    Path("texts.csv").write_text("text\na\n")
    for path in (".", {"train": "texts.csv"}):
        assert [row["text"] for row in load_splits(path, None, None, None, streaming)["train"]] == ["a"]
    assert not asked
    assert "Generating" not in capsys.readouterr().err
    assert not datasets.utils.are_progress_bars_disabled()
