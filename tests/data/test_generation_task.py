"""Texts that a language model writes after prompts: draws, scorers, and an edit that is chosen by them."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from small_text import WORDS, make_trainer, write_model, write_running_text

from tva import TaskVector, open_weights
from tva.cli.main import main
from tva.data import GenerationTask
from tva.data.scorers import TextScore, find_scorer
from tva.evaluation.evaluate import evaluate
from tva.models import CausalLM, Seq2SeqLM, TextClassifier
from tva.models.generation import Draw, write_texts

PROMPTS = ["the film is", "it was", "the food", "a great film is a", "and", "the food was bad and it", "it is fine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("causal", "seq2seq"):
        write_model(folder / kind, kind)
    write_running_text(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return CausalLM(str(folder / "causal"))


def bad_words(texts):
    return [sum(word in WORDS[3:6] for word in text.split()) for text in texts]


def found(model, folder, split="test", **options):
    options = {"prompts": PROMPTS, "scorer": f"{__name__}.bad_words", "max_new_tokens": 6, "threshold": 0} | options
    return evaluate(make_trainer(), model, GenerationTask(**options), split)


def ids(model, texts):
    rows = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


SETTINGS = {"seed": 0, "temperature": 1.0, "top_p": 1.0, "top_k": None, "max_new_tokens": 6}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_texts_do_not_depend_on_the_batch(folder, kind):
    model = {"causal": CausalLM, "seq2seq": Seq2SeqLM}[kind](str(folder / kind)).eval()
    tokens = ids(model, PROMPTS)
    together = write_texts(model, tokens, range(len(PROMPTS)), SETTINGS)
    alone = [write_texts(model, tokens[[row]], [row], SETTINGS)[0] for row in range(len(PROMPTS))]
    assert together == alone
    assert len(set(together)) > 3
    assert write_texts(model, tokens, range(len(PROMPTS)), SETTINGS | {"seed": 1}) != together
    backwards = write_texts(model, tokens.flip(0), range(len(PROMPTS))[::-1], SETTINGS)
    assert backwards == together[::-1]


def test_scores_are_those_of_the_texts_whatever_the_batch_size(model, folder):
    one, three = (found(model, folder, batch_size=size) for size in (1, 3))
    assert one.num_examples == three.num_examples == 4  # of seven prompts
    np.testing.assert_array_equal(one.scores["score"], three.scores["score"])
    assert one.scores["rate"].dtype == bool
    assert one.metrics["rate"] == np.mean(one.scores["score"] > 0)
    assert one.metrics["score"] == one.scores["score"].mean()
    assert one.interval("rate") is not None
    assert not one.higher("score")
    assert not one.higher("rate")
    assert found(model, folder, higher_is_better=True).higher("score")
    other = found(model, folder, "val")
    assert other.num_examples == 3
    assert found(model, folder, limit_test=2).num_examples == 2


def test_samples_of_a_prompt_are_averaged_and_those_of_the_only_prompt_are_examples(model, folder):
    several = found(model, folder, num_samples=3)
    assert several.num_examples == 4
    assert set((3 * several.scores["rate"]).round(9)) <= {0, 1, 2, 3}
    alone = found(model, folder, prompts=["the film is"], num_samples=12)
    assert alone.num_examples == 12
    assert len(set(alone.scores["score"])) > 1
    assert not np.array_equal(
        alone.scores["score"], found(model, folder, "val", prompts=["the film is"], num_samples=12).scores["score"]
    )


def test_temperature_zero_is_greedy(model, folder):
    model.eval()
    tokens = ids(model, PROMPTS)
    made = write_texts(model, tokens, range(len(PROMPTS)), SETTINGS | {"temperature": 0.0})
    for row, text in zip(tokens, made, strict=True):
        current = row[row >= 0][None]
        start = current.shape[1]
        for _ in range(6):
            current = torch.cat([current, model.network(current).logits[:, -1:].argmax(dim=-1)], dim=1)
            if current[0, -1] == model.tokenizer.eos_token_id:
                break
        assert text == model.tokenizer.decode(current[0, start:].tolist(), skip_special_tokens=True)


def frequencies(logits, **options):
    count = 4000
    draw = Draw(0, range(count), **options)
    taken = draw(torch.zeros(count, 1), logits.expand(count, -1)).argmax(dim=-1)
    return torch.bincount(taken, minlength=logits.shape[-1]) / count


def test_draws_have_the_probabilities_of_the_model():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log() + 3
    error = 4 * (0.25 / 4000) ** 0.5
    torch.testing.assert_close(frequencies(logits), probabilities, atol=error, rtol=0)
    halved = (logits / 2).softmax(dim=-1)
    torch.testing.assert_close(frequencies(logits, temperature=2.0), halved, atol=error, rtol=0)
    two = torch.tensor([0.625, 0.375, 0.0, 0.0])
    torch.testing.assert_close(frequencies(logits, top_k=2), two, atol=error, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_p=0.7), two, atol=error, rtol=0)
    assert frequencies(logits, top_p=0.4).tolist() == [1, 0, 0, 0]


def test_scorers(tmp_path):
    Path("words.txt").write_text("sea side\nham\n\n")
    texts = ["The SEA SIDE.", "hamlet", "ham!"]
    assert find_scorer(f"words:{tmp_path / 'words.txt'}")(texts) == [1, 0, 1]
    assert find_scorer("regex:^[Th]")(texts) == [1, 1, 1]
    labeled = {"text": ["What a FOOL", "a fool, you", "a friend"], "label": [2, 0, 1]}
    names = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["rude", "kind", "bad"])}
    )
    datasets.Dataset.from_dict(labeled, features=names).to_parquet("labeled.parquet")
    fool, friend, other, nothing = find_scorer(f"learned:{tmp_path}/labeled.parquet:rude,bad")(
        ["fool fool", "a friend", "you", ""]
    )
    assert fool == pytest.approx(1 / (1 + (0.5 / 2) / (2.5 / 3)))
    assert friend == pytest.approx(1 / (1 + (1.5 / 2) ** 2 / ((0.5 / 3) * (2.5 / 3))))
    assert (other, nothing) == (pytest.approx(1 / (1 + (0.5 / 2) / (1.5 / 3))), 0.5)
    with pytest.raises(ValueError, match="counts the labels 'good'; .* has 'bad', 'kind', 'rude'"):
        find_scorer(f"learned:{tmp_path}/labeled.parquet:rude,good")
    assert find_scorer("swearing")(["He is Fucking mad", "a classic", "scunthorpe"]) == [1, 0, 0]
    assert TextScore(f"{__name__}.bad_words")(["bad poor", "good"]) == [2, 0]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("nothing", "There is no scorer 'nothing'; there are"),
        ("words:nowhere.txt", "needs a file with one word or phrase per line"),
        ("words", "must be words:FILE"),
        ("regex:(", "is not a regular expression"),
        ("learned:file.parquet", "must be learned:FILE:LABEL,…"),
        ("math.pi", "must be a function of a list of texts"),
    ],
)
def test_a_scorer_that_is_none_is_refused(scorer, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TextScore(scorer)


def test_detoxify_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "detoxify", None)
    with pytest.raises(ValueError, match=r"pip install 'tva\[detoxify\]'"):
        find_scorer("detoxify")


def no_number(texts):
    return [float("nan")] * len(texts)


def too_few(texts):
    return [1.0]


def words(texts):
    return texts


@pytest.mark.parametrize("scorer", [no_number, too_few, words])
def test_what_a_scorer_returns_is_checked(scorer):
    with pytest.raises(ValueError, match="must return one (finite )?number per text"):
        TextScore(f"{__name__}.{scorer.__name__}")(["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": {"test": ["a"]}}, "must have val and test"),
        ({"top_p": 0.0, "num_samples": 0}, "found num_samples 0, top_p 0.0"),
    ],
)
def test_mistakes_say_what_is_required(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GenerationTask(**{"prompts": ["a"]} | options)


def test_a_model_that_writes_nothing_is_refused(folder):
    write_model(folder / "bert")
    with pytest.raises(TypeError, match="needs a language model"):
        found(TextClassifier(str(folder / "bert")), Path())


PAGE = Path(__file__).parents[2] / "docs/howto/score-texts.md"


@pytest.mark.slow
def test_the_edit_of_the_page_is_chosen_by_what_the_model_writes(folder):
    base = open_weights(folder / "causal")
    random = torch.Generator().manual_seed(0)
    moved = {name: base[name] + 0.3 * torch.randn(base[name].shape, generator=random) for name in base}
    TaskVector.between({name: base[name] for name in base}, moved).save("toxic.tv.safetensors")
    Path("prompts.txt").write_text("\n".join(8 * PROMPTS))
    Path("words.txt").write_text("\n".join(WORDS[3:6]))
    for split in ("train", "test"):
        Path(f"prose-{split}.txt").write_text((folder / f"prose-{split}.txt").read_text())
    (text,) = re.findall(r"```yaml\n(# edit.yaml\n.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for old, new in (
        ("openai-community/gpt2", folder / "causal"),
        ("scorer: swearing", "scorer: words:words.txt"),
        ("1.05", 1.3),
    ):
        assert old in text
        text = text.replace(old, str(new))
    text = text.replace("block_length: 128", "block_length: 16, limit_val: 20, limit_test: 20")
    Path("edit.yaml").write_text(text)
    search = ["--search", "tva.search.Grid", "--search.num", "3"]
    main(["edit", "--config", "edit.yaml", *search, "--trainer.accelerator", "cpu"])
    content = json.loads(Path("edited/edit.json").read_text())
    entry = content["tasks"]["written"]
    assert entry["metric"] == "rate"
    assert not entry["higher_is_better"]
    assert entry["settings"]["seed"] == 0
    assert entry["settings"]["scorer"] == "words:words.txt"
    assert entry["base"]["low"] <= entry["base"]["value"] <= entry["base"]["high"]
    assert entry["comparison"] is not None
    searched = [
        each["value"]
        for each in content["evaluations"]
        if (each["task"], each["split"], each["metric"]) == ("written", "val", "rate")
    ]
    assert len(set(searched)) > 1
