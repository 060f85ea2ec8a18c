"""TextTask and LanguageTask: tokens of the model's own tokenizer, splits, blocks, order, and a newcomer's mistakes."""

import gzip
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from small_text import make_tokenizer, reviews, write_reviews, write_running_text

from tva.data import LanguageTask, TextTask
from tva.data.text_task import tokenize


def ready(task, kind="bert", max_length=256, **trainer):
    """Set up a task as a Trainer would."""
    model = SimpleNamespace(
        tokenizer=make_tokenizer(kind=kind), max_length=max_length, encoder_decoder=kind == "seq2seq"
    )
    task.trainer = SimpleNamespace(lightning_module=model, **trainer)
    task.setup("fit")
    return task


def rows(loader):
    """Return every example of a loader without its padding, with its label."""
    return [(tuple(t[t >= 0].tolist()), int(y)) for tokens, labels in loader for t, y in zip(tokens, labels)]  # noqa: B905


@pytest.fixture
def parquet():
    return write_reviews()


def test_tokens_are_the_tokenizers_and_padding_is_minus_one(parquet):
    task = ready(TextTask(parquet, batch_size=7))
    texts, tokenizer = reviews(24, 1), make_tokenizer()
    assert rows(task.test_dataloader()) == [
        (tuple(tokenizer(text)["input_ids"]), label) for text, label in zip(texts["text"], texts["label"], strict=True)
    ]
    tokens, labels = next(iter(task.test_dataloader()))
    assert (tokens.dtype, labels.dtype, len(tokens)) == (torch.int64, torch.int64, 7)
    assert (tokens == -1).any()
    assert not (tokens[:, -1] == -1).all()  # no longer than the longest


def test_texts_are_split_by_the_papers_rule_as_images_are(parquet):
    task = ready(TextTask(parquet))
    parts = [rows(loader()) for loader in (task.prototype_dataloader, task.val_dataloader, task.test_dataloader)]
    assert [len(part) for part in parts] == [54, 6, 24]
    order = np.random.default_rng(0).permutation(60)
    texts = reviews(60, 0)["text"]
    tokenizer = make_tokenizer()
    assert [ids for ids, _ in parts[1]] == [tuple(tokenizer(texts[i])["input_ids"]) for i in sorted(order[:6])]
    limited = ready(TextTask(parquet, limit_train=10, limit_test=5, val_size=20, where={"label": "positive"}))
    assert [len(limited._examples[part]) for part in ("train", "val", "test")] == [10, 20, 5]
    assert {label for _, label in rows(limited.test_dataloader())} == {1}


def test_shots_are_examples_of_each_class_and_those_of_fewer_are_among_those_of_more(parquet):
    def trained(shots, seed=0, **options):
        task = ready(TextTask(parquet, val_size=20, shots=shots, seed=seed, **options))
        assert task.drawn["shots"] == shots
        return rows(task.prototype_dataloader())

    few, more = trained(1), trained(4)
    assert [sorted(label for _, label in found) for found in (few, more)] == [[0, 1], [0] * 4 + [1] * 4]
    assert set(few) <= set(more)
    assert {frozenset(trained(1, seed=seed)) for seed in range(5)} > {frozenset(few)}
    assert [label for _, label in trained(3, where={"label": "positive"})] == [1] * 3
    assert "shots" not in TextTask(parquet).drawn
    with pytest.raises(ValueError, match="each class must have 99 training examples .shots.; there are of 'negative "):
        trained(99)
    for options in ({"shots": 0}, {"shots": 1, "streaming": True}):
        with pytest.raises(ValueError, match="must be at least 1 and no stream's"):
            TextTask(parquet, **options)


def test_every_format_gives_the_same_texts(parquet):
    expected = rows(ready(TextTask(parquet)).test_dataloader())
    tables = {split: datasets.Dataset.from_parquet(parquet.format(split=split)) for split in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(Path("arrow"))
    for split, table in tables.items():
        plain = table.cast_column("label", datasets.Value("int64"))
        plain.to_csv(f"c-{split}.csv")
        plain.to_json(f"j-{split}.json")
    for path in (Path("arrow"), Path("c-{split}.csv"), Path("j-{split}.json")):
        task = ready(TextTask(str(path), class_names=["negative", "positive"]))
        assert rows(task.test_dataloader()) == expected, path


def test_long_texts_are_cut_off(parquet):
    task = ready(TextTask(parquet, max_length=4))
    assert all(len(ids) == 4 and ids[-1] == 3 for ids, _ in rows(task.test_dataloader()))  # 3 is [SEP]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_order_is_the_same_on_any_number_of_ranks_and_workers(parquet, monkeypatch, num_workers):
    def batches(world_size, seed="5", epoch=1):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        loaders = []
        for rank in range(world_size):
            task = TextTask(parquet, limit_train=48, batch_size=12 // world_size, num_workers=num_workers)
            loaders.append(ready(task, world_size=world_size, global_rank=rank).train_dataloader())
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        steps = zip(*([rows([batch]) for batch in loader] for loader in loaders), strict=True)
        return [sorted(row for rank in step for row in rank) for step in steps]

    one = batches(1)
    assert len(one) == 4
    torch.rand(1)  # nothing depends on torch's global generator
    assert batches(1) == one
    assert batches(2) == one
    assert batches(1, seed="6") != one
    assert batches(1, epoch=2) != one


def test_another_models_tokenizer_makes_other_tokens(parquet):
    task = ready(TextTask(parquet))
    before = rows(task.test_dataloader())
    task.trainer.lightning_module.tokenizer = make_tokenizer(kind="causal")
    task.setup("test")
    assert rows(task.test_dataloader()) != before


# --- language


def test_running_text_is_cut_into_blocks_that_hold_all_of_it():
    path = write_running_text()
    task = ready(LanguageTask(path, block_length=16), "causal")
    text = Path("prose-test.txt").read_text()
    tokens = [*make_tokenizer(kind="causal")(text)["input_ids"], 6]  # 6 is </s>
    blocks = torch.cat([batch["tokens"] for batch in task.test_dataloader()])
    assert blocks.flatten().tolist() == tokens[: len(tokens) // 16 * 16]
    assert all(torch.equal(batch["tokens"], batch["targets"]) for batch in task.test_dataloader())
    train, val = (len(task._examples[part]) for part in ("train", "val"))
    assert val == (train + val) // 10


def test_compressed_text_and_rows_of_text_are_running_text_too():
    path = write_running_text()
    for split in ("train", "test"):
        text = Path(f"prose-{split}.txt").read_text()
        with gzip.open(f"packed-{split}.txt.gz", "wt") as file:
            file.write(text)
        datasets.Dataset.from_dict({"text": text.split("\n")}).to_parquet(f"rows-{split}.parquet")
    plain, packed = (
        ready(LanguageTask(p, block_length=16), "causal")._examples["test"].blocks
        for p in (path, "packed-{split}.txt.gz")
    )
    assert np.array_equal(plain, packed)
    by_row = ready(LanguageTask("rows-{split}.parquet", block_length=16), "causal")
    first = by_row._examples["test"].blocks[0].tolist()
    assert first[0] == 5  # every row has its own <s> and </s>
    assert 6 in first


def test_prompts_have_no_targets_in_a_causal_model_and_their_answers_do(parquet):
    options = {"prompt_column": "text", "target_column": "label", "prompt": "a {} is"}
    words = ["negative", "positive"]
    task = LanguageTask(parquet, **options, block_length=32)
    model = SimpleNamespace(tokenizer=make_tokenizer([*_words(), *words], "causal"), max_length=256)
    task.trainer = SimpleNamespace(lightning_module=model)
    task.setup("fit")
    texts = reviews(24, 1)
    for index in (0, 1, 5):
        tokens, targets = task._examples["test"][index]
        prompt = model.tokenizer(f"a {texts['text'][index]} is")["input_ids"]
        answer = model.tokenizer(words[texts["label"][index]], add_special_tokens=False)["input_ids"]
        assert tokens.tolist() == [*prompt, *answer, 6]
        assert targets.tolist() == [-100] * len(prompt) + [*answer, 6]
    short = LanguageTask(parquet, **options, block_length=4)
    short.trainer = task.trainer
    short.setup("fit")
    tokens, targets = short._examples["test"][0]  # the beginning of the prompt gives way
    assert (len(tokens), targets.tolist()[2:]) == (4, tokens.tolist()[2:])


def _words():
    from small_text import WORDS

    return WORDS


def test_sequence_to_sequence_models_get_prompt_and_answer_apart(parquet):
    task = ready(LanguageTask(parquet, prompt_column="text", target_column="text", block_length=32), "seq2seq")
    tokens, targets = task._examples["test"][3]
    assert tokens.tolist() == targets.tolist() == make_tokenizer(kind="seq2seq")(reviews(24, 1)["text"][3])["input_ids"]
    halves = ready(LanguageTask(write_running_text(), block_length=16), "seq2seq")
    first, second = halves._examples["test"][0]
    assert (len(first), len(second)) == (8, 8)


# --- streams


@pytest.fixture
def shards():
    """Several files a split."""
    Path("shards").mkdir()
    for split, count, seed in (("train", 90, 0), ("test", 26, 1)):
        table = datasets.Dataset.from_dict(reviews(count, seed))
        for index in range(3):
            table.shard(3, index).to_parquet(f"shards/{split}-{index}-of-3.parquet")
    return "shards"


KINDS = [
    (lambda path, **o: TextTask(path, class_names=["negative", "positive"], **o), "bert"),
    (lambda path, **o: LanguageTask(path, block_length=16, **o), "causal"),
    (lambda path, **o: LanguageTask(path, prompt_column="text", target_column="text", **o), "causal"),
    (lambda path, **o: LanguageTask(path, prompt_column="text", target_column="text", **o), "seq2seq"),
]


def examples_of(batches):
    """Return every example of batches without its padding."""
    pairs = []
    for batch in batches:
        left, right = batch.values() if isinstance(batch, dict) else batch
        for tokens, wanted in zip(left, right, strict=True):
            pairs.append((tuple(tokens[tokens >= 0].tolist()), tuple(wanted[wanted != -100].reshape(-1).tolist())))
    return pairs


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=["classes", "blocks", "causal", "seq2seq"])
def test_a_stream_of_texts_gives_the_examples_of_the_table(shards, make, kind):
    indexed = ready(make(shards, val_split="train"), kind)
    streamed = ready(make(shards, streaming=True, val_size=5, limit_train=20), kind, max_steps=1)
    train = examples_of(indexed.val_dataloader())
    assert examples_of(streamed.test_dataloader()) == examples_of(indexed.test_dataloader())
    assert examples_of(streamed.val_dataloader()) == train[:5]
    trained = examples_of(streamed.train_dataloader())
    assert len(trained) == 20
    if make is not KINDS[1][0]:
        assert examples_of(streamed.prototype_dataloader()) == train[5:25]


def test_running_text_of_a_stream_leaves_out_the_rows_that_are_held_out(shards):
    task = ready(LanguageTask(shards, block_length=16, streaming=True, val_size=1), "causal", max_steps=1)
    tokenizer, texts = make_tokenizer(kind="causal"), reviews(90, 0)["text"]
    rest = [token for text in texts for token in [*tokenizer(text)["input_ids"], 6]]
    blocks = [block for block, _ in examples_of(task.prototype_dataloader())]
    ordered = [token for block in blocks for token in block]
    starts = [at for at in range(len(rest)) if rest[at : at + len(ordered)] == ordered]
    assert starts
    assert starts[0] >= 16


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "kind"), KINDS[:3], ids=["classes", "blocks", "causal"])
def test_ranks_and_workers_stream_together_what_one_process_streams(shards, make, kind, num_workers):
    def steps(part, ranks, num_workers, epoch=1):
        found = []
        for rank in range(ranks):
            task = make(shards, streaming=True, val_size=5, batch_size=8 // ranks, num_workers=num_workers)
            ready(task, kind, max_steps=1, world_size=ranks, global_rank=rank)
            loader = getattr(task, f"{part}_dataloader")()
            if part == "train":
                loader.sampler.set_epoch(epoch)
            else:  # another epoch would take the files in another order, and limits other examples
                assert not hasattr(loader.sampler, "set_epoch")
            found.append([examples_of([batch]) for batch in loader])
        return [sorted(pair for batch in step for pair in batch) for step in zip_longest(*found, fillvalue=[])]

    for part in ("train", "val", "test"):
        alone, shared = steps(part, 1, 0), steps(part, 2, num_workers)
        full = sum(map(len, alone)) // 8 if part == "train" else len(alone)  # ranks have equally many to train on
        assert shared[:full] == alone[:full]
    assert steps("train", 1, num_workers) == steps("train", 1, 0) != steps("train", 1, 0, epoch=2)


# --- mistakes


def test_mistakes_with_streams_of_text(shards):
    classes = {"class_names": ["negative", "positive"], "streaming": True}
    with pytest.raises(ValueError, match="no tenth can be held out. Set val_split, or val_size"):
        ready(TextTask(shards, **classes))
    with pytest.raises(ValueError, match="streamed labels in 'label' have no class names; pass class_names"):
        ready(TextTask(shards, streaming=True, val_size=5))
    with pytest.raises(ValueError, match="no column 'review'; its columns are 'text', 'label'"):
        ready(TextTask(shards, text_column="review", **classes))
    with pytest.raises(ValueError, match="where names the column 'stars', not one of 'text', 'label'"):
        ready(TextTask(shards, where={"stars": 1}, val_size=5, **classes))
    with pytest.raises(ValueError, match="training needs trainer.max_steps"):
        ready(TextTask(shards, val_size=5, **classes), max_steps=-1)
    with pytest.raises(ValueError, match="column 'label' must hold texts; a row holds 0. Set text_column"):
        list(ready(TextTask(shards, text_column="label", val_size=5, **classes)).test_dataloader())
    with pytest.raises(ValueError, match=r"labels must be in 0 … 0; found 1. Give one class name for each class"):
        list(ready(TextTask(shards, class_names=["bad"], streaming=True, val_size=5)).test_dataloader())
    with pytest.raises(ValueError, match="999 examples are to be held out, and the training split has"):
        ready(LanguageTask(shards, block_length=16, streaming=True, val_size=999), "causal")
    with pytest.raises(ValueError, match="Files to stream must be there and of one format"):
        ready(LanguageTask(write_running_text(), streaming=True, val_size=5), "causal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "review"}, r"no column 'review'; its columns are 'text', 'label'.*Set text_column"),
        ({"label_column": "class"}, r"no column 'class'.*Set label_column"),
        ({"class_names": ["bad"]}, r"has 2 classes, but class_names has 1"),
        (
            {"class_descriptions": {"negative": "a bad one", "positiv": "a good one"}},
            r"must describe each class .*'negative', 'positive'; 'positive' has none and 'positiv' is not a class",
        ),
        ({"max_length": 257}, r"takes 256 tokens at most, but 257 are requested. Lower max_length"),
    ],
)
def test_mistakes_name_what_is_there(parquet, options, message):
    with pytest.raises(ValueError, match=message):
        ready(TextTask(parquet, **options))


def test_a_column_must_hold_texts_and_the_model_must_have_a_tokenizer():
    path = write_reviews(Path(), stars=[1, 2, 3])
    with pytest.raises(ValueError, match=r"column 'stars' must hold texts; row 0 holds 1 \(\d+ such rows\)"):
        ready(TextTask(path, text_column="stars"))
    task = TextTask(path)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace())
    with pytest.raises(TypeError, match="transformers tokenizer as its attribute tokenizer"):
        task.setup("fit")


def test_language_mistakes(parquet):
    with pytest.raises(ValueError, match="prompt_column and target_column go together"):
        LanguageTask(parquet, prompt_column="text")
    with pytest.raises(ValueError, match="prompt must hold {}"):
        LanguageTask(parquet, prompt="say")
    with pytest.raises(ValueError, match=r"no column 'reply'.*Set target_column"):
        ready(LanguageTask(parquet, prompt_column="text", target_column="reply"), "causal")
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than one block of 60"):
        ready(LanguageTask(write_running_text(Path(), 8), block_length=60), "causal")
    empty = write_reviews(Path(), reply=["", "good"])
    with pytest.raises(ValueError, match=r"a target must hold text; \d+ of \d+ are empty"):
        ready(LanguageTask(empty, prompt_column="text", target_column="reply"), "causal")
    Path("pictures").mkdir()
    with pytest.raises(ValueError, match="must hold files of one format"):
        ready(LanguageTask("pictures"), "causal")


def test_tokenizing_is_that_of_the_tokenizer():
    tokenizer = make_tokenizer()
    (ids,) = tokenize(tokenizer, ["the film is great"], 4)
    assert ids.tolist() == tokenizer("the film is great", truncation=True, max_length=4)["input_ids"]


def test_where_takes_a_comparison():
    scores = [0.1, 0.9, 0.81, 0.8, None, 0.95]
    for split in ("train", "test"):
        columns = {
            "text": [f"it is {word}" for word in ("a", "good", "bad", "fine", "the", "great")],
            "toxicity": scores,
        }
        datasets.Dataset.from_dict(columns).to_parquet(f"c-{split}.parquet")
    path = "c-{split}.parquet"

    def kept(condition, **options):
        task = LanguageTask(path, where={"toxicity": condition}, block_length=5, val_size=1, **options)
        return ready(task, "causal", max_steps=3)

    assert sum(len(part) for name, part in kept("> 0.8")._examples.items() if name != "test") == 3
    assert kept(">= 0.8")._examples["test"].blocks.shape == (4, 5)
    assert kept("< 0.85")._examples["test"].blocks.shape == (3, 5)
    streamed = [tokens for batch in kept("> 0.8", streaming=True).test_dataloader() for tokens in batch["tokens"]]
    assert len(streamed) == 3


def test_a_prompt_is_made_of_several_columns():
    for split in ("train", "test"):
        columns = {"one": ["good film", "bad"], "two": ["it was", "the food"], "label": ["fine", "poor"]}
        datasets.Dataset.from_dict(columns).to_parquet(f"p-{split}.parquet")
    path, tokenizer = "p-{split}.parquet", make_tokenizer(kind="seq2seq")
    options = {"prompt_column": ["one", "two"], "target_column": "label", "prompt": "a {} and {} is", "val_size": 1}
    options |= {"metric": ["text_f1:fine", "exact_match"]}
    for streaming in (False, True):
        task = ready(LanguageTask(path, streaming=streaming, **options), "seq2seq", max_steps=1)
        tokens = next(iter(task.test_dataloader()))["tokens"][0]
        assert tokens[tokens >= 0].tolist() == tokenizer("a good film and it was is")["input_ids"]
    assert task.tva_metrics == {"text_f1": "text_f1:fine", "exact_match": "exact_match"}
    with pytest.raises(ValueError, match="where each column goes"):
        LanguageTask(path, **options | {"prompt": "{}"})
    with pytest.raises(ValueError, match="no column 'three'; its columns are"):
        ready(LanguageTask(path, **options | {"prompt_column": ["one", "three"]}), "seq2seq")
