"""Models with their own trained heads: what they compute, what of them is edited, and how folders are told apart."""

import copy
from pathlib import Path

import pytest
import torch
from small_text import make_tokenizer, make_trainer, reviews, write_classifier, write_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef

from tva import edit_model, open_weights
from tva.data import TableTask
from tva.evaluation.evaluate import evaluate
from tva.models import CausalLM, Seq2SeqLM, TimmModel, TransformersModel
from tva.models.network import as_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_classifier(folder / "bert")
    write_classifier(folder / "tuned", moved=0.1)
    for kind in ("causal", "seq2seq"):
        write_model(folder / kind, kind)
    import pandas

    table = pandas.DataFrame(reviews(60))
    table["sentiment"] = [["negative", "Positive"][label] for label in table["label"]]
    table["answer"] = [["bad", "good"][label] for label in table["label"]]
    table["other"], table["value"] = table["text"].tolist()[::-1], [index / 60 for index in range(60)]
    table["words"] = [text.split() for text in table["text"]]
    table["tags"] = [[["O", "B"][len(word) % 2] for word in words] for words in table["words"]]
    table.to_parquet(folder / "reviews.parquet")
    return folder


def table(folder, **options):
    split = {"split_fractions": {"val": 0.3, "test": 0.3}, "batch_size": 7}
    return TableTask(str(folder / "reviews.parquet"), **split, **options)


def test_a_classifier_keeps_its_own_head_and_gives_the_logits_of_transformers(folder):
    from transformers import AutoModelForSequenceClassification

    data = table(folder, label_column="sentiment", metric="f1_score")
    model = TransformersModel(str(folder / "bert"))
    found = evaluate(make_trainer(), model, data, "test")
    own, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder / "bert").double(), make_tokenizer()
    rows = data._select_parts(False)["test"]
    with torch.no_grad():
        logits = torch.cat([own(**tokenizer(text, return_tensors="pt")).logits for text in rows["text"]])
    torch.testing.assert_close(found.preds.double(), logits, rtol=1e-4, atol=1e-5)
    labels = torch.tensor(rows["label"])
    assert found.metrics["accuracy"] == float((logits.argmax(-1) == labels).double().mean())
    assert found.metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert "f1_score" in found.metrics
    assert {f"network.{name}" for name in own.state_dict()} == set(model.state_dict())


def test_tokens_are_labeled_by_the_words_they_begin(folder):
    write_classifier(Path("tagger"), "token", labels=("B", "O"))
    data = table(folder, text_column="words", label_column="tags", metric="f1_score")
    found = evaluate(make_trainer(), TransformersModel("tagger"), data, "test")
    rows = data._select_parts(False)["test"]
    wanted = torch.tensor([["B", "O"].index(tag) for tags in rows["tags"] for tag in tags])
    assert found.labels.tolist() == wanted.tolist()
    assert found.metrics["accuracy"] == pytest.approx((found.predicted == found.labels).mean(), abs=1e-6)
    assert "accuracy" not in found.scores  # tokens of one text are not independent
    assert len(found.scores["accuracy_by_text"]) == found.num_examples


@pytest.mark.parametrize(("kind", "family"), [("causal", CausalLM), ("seq2seq", Seq2SeqLM)])
def test_language_models_answer_prompts_of_a_table(folder, kind, family):
    model = TransformersModel(str(folder / kind), max_new_tokens=3)
    assert isinstance(model, family)
    assert isinstance(copy.deepcopy(model), TransformersModel)
    data = table(folder, target_column="answer", metric=["exact_match", f"{__name__}.length"])
    found = evaluate(make_trainer(), model, data, "test")
    assert {"loss", "perplexity", "exact_match", "length"} <= set(found.metrics)
    assert len(found.scores["length"]) == found.num_examples
    reference = family(str(folder / kind))
    assert evaluate(make_trainer(), reference, data, "test").metrics["loss"] == found.metrics["loss"]


def length(preds, target):
    """Compute how many words were generated for each prompt."""
    assert all(isinstance(text, str) for text in (*preds, *target))
    return [len(text.split()) for text in preds]


def test_the_head_is_edited_unless_it_is_left_alone(folder, tmp_path):
    base, tuned = open_weights(folder / "bert"), open_weights(folder / "tuned")
    for edit_head in (True, False):
        model = TransformersModel(str(folder / "bert"), edit_head=edit_head)
        tasks = {"a": table(folder, label_column="sentiment")}
        options = {"targets": tasks, "scaling_coef": 0.5, "random_seed": None, "output": tmp_path / str(edit_head)}
        edit_model(model, vectors={"a": folder / "tuned"}, **options)
        for name, tensor in model.network.state_dict().items():
            moved = edit_head or not name.startswith("classifier.")
            torch.testing.assert_close(tensor, base[name] + 0.5 * moved * (tuned[name] - base[name]), msg=name)


def test_a_frozen_head_is_not_trained(folder):
    model = TransformersModel(str(folder / "bert"), edit_head=False, learning_rate=1e-2, warmup_steps=0)
    before = copy.deepcopy(model.state_dict())
    make_trainer(max_epochs=1).fit(model, table(folder, label_column="sentiment"))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert not any("classifier" in name for name in moved)


def right(preds, target):
    return preds.argmax(dim=-1) == target


def test_a_folder_is_a_model_and_is_measured_by_loaders_and_functions(folder):
    rows = [{"input_ids": torch.tensor([2, 7 + row, 3]), "labels": torch.tensor(row % 2)} for row in range(12)]
    loaders = (DataLoader(rows[:6], 3), DataLoader(rows[6:], 3))

    def evaluate_it(network, split):
        batch = torch.stack([row["input_ids"] for row in rows[6:]])
        return network(input_ids=batch).logits.argmax(-1) == torch.tensor([row["labels"] for row in rows[6:]])

    tasks = {"a": (*loaders, right), "b": evaluate_it}
    options = {"targets": tasks, "scaling_coef": 0.5, "output": Path("out")}
    report = edit_model(str(folder / "bert"), vectors=folder / "tuned", **options)
    assert report.tasks["a"].scores["edited"].value == report.tasks["b"].scores["edited"].value
    assert report.recipe == "tuned"


def test_vit_has_other_names_in_its_folder_than_in_memory():
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    for seed, name in ((0, "base"), (1, "tuned")):
        torch.manual_seed(seed)
        transformers.ViTForImageClassification(config).save_pretrained(name)
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(name)
    model, tuned = (transformers.ViTForImageClassification.from_pretrained(n) for n in ("base", "tuned"))
    expected = {n: (t + tuned.state_dict()[n]) / 2 for n, t in model.state_dict().items()}
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    tasks = {"a": (DataLoader(rows[:3], 3), DataLoader(rows[3:], 3), right)}
    options = {"targets": tasks, "scaling_coef": 0.5, "output": Path("out")}
    edit_model(model, vectors={"a": "tuned"}, **options)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert isinstance(as_module("base"), TransformersModel)


def test_a_timm_folder_keeps_its_classifier(monkeypatch):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=4)
    save_for_hf(network, Path("timm"), safe_serialization=True)
    model = as_module("timm")
    assert isinstance(model, TimmModel)
    image = torch.randn(1, 3, *network.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), network.eval()(image))
    assert model.head_patterns == []
    assert len(TimmModel("timm", edit_head=False).head_patterns) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_sentence_transformer_is_edited_with_its_dense_layer_and_measured_on_pairs(folder):
    sentence = pytest.importorskip("sentence_transformers", reason="the extra tva[sentence] is not installed")
    from sentence_transformers import models

    write_model(Path("bert"))
    torch.manual_seed(0)
    modules = [models.Transformer("bert"), models.Pooling(16), models.Dense(16, 8)]
    base = sentence.SentenceTransformer(modules=modules, device="cpu")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    base.save("base")
    tuned.save("tuned")
    old, new = base.state_dict(), tuned.state_dict()
    model = as_module("base")
    data = table(folder, text_column=["text", "other"], target_column="value")
    options = {"targets": {"pairs": data}, "scaling_coef": 0.5, "random_seed": None, "allow_shared_examples": True}
    report = edit_model(model, vectors=Path("tuned"), output=Path("out"), **options)
    for name, tensor in model.network.state_dict().items():
        torch.testing.assert_close(tensor, old[name] + 0.5 * (new[name] - old[name]))
    rows = data._select_parts(False)["test"]
    one, other = (torch.from_numpy(model.network.encode(list(rows[column]))) for column in ("text", "other"))
    expected = spearman_corrcoef(F.cosine_similarity(one, other), torch.tensor(rows["value"]).float())
    score = report.tasks["pairs"].scores["edited"]
    assert (report.tasks["pairs"].metric, score.value) == ("spearman", pytest.approx(float(expected), abs=1e-3))


def test_mistakes_say_what_would_do(folder):
    Path("empty").mkdir()
    write_model(Path("encoder"))
    for make, message in (
        (lambda: as_module("empty"), "must be a model's folder: .*it holds nothing"),
        (lambda: as_module("./nowhere"), "A folder with config.json and weights was expected"),
        (lambda: TransformersModel("encoder"), "'BertModel'. Pass task= .*TextClassifier"),
        (lambda: TransformersModel("encoder", "sequence-classification"), "would stay random"),
        (lambda: TransformersModel(str(folder / "causal"), edit_head=False), "is its embedding"),
        (lambda: TransformersModel(str(folder / "bert"), metrics=["bleu"]), "metrics .* are of generated text"),
        (lambda: TimmModel("tset_vit"), "must be a folder .*'test_vit'"),
        (lambda: TimmModel("test_vit"), "test_vit needs weights"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make()
