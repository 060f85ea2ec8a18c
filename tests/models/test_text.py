"""TextClassifier, CausalLM and Seq2SeqLM: heads, vectors, metrics, options, and a newcomer's mistakes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from small_models import run_ranks
from small_text import WORDS, make_tokenizer, make_trainer, reviews, write_model, write_reviews, write_running_text
from torch.nn import functional as F
from torchmetrics.functional.text import perplexity
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints.wrappers import network_of
from tva.data import LanguageTask, TextTask
from tva.evaluation.evaluate import evaluate
from tva.models import CausalLM, Seq2SeqLM, TextClassifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_model(folder / kind, kind)
    write_reviews(folder)
    write_running_text(folder)
    return folder


@pytest.fixture(autouse=True)
def own_heads(monkeypatch):
    monkeypatch.setenv("TVA_CACHE", "cache")


KINDS = {"bert": TextClassifier, "causal": CausalLM, "seq2seq": Seq2SeqLM}


def make(folder, kind, **options):
    return KINDS[kind](str(folder / kind), **options)


def trained(folder, kind, **options):
    return make(folder, kind, learning_rate=1e-2, warmup_steps=0, **options)


def texts(folder, **options):
    return TextTask(str(folder / "reviews-{split}.parquet"), batch_size=16, **options)


def prose(folder, **options):
    return LanguageTask(str(folder / "prose-{split}.txt"), **{"block_length": 16, "batch_size": 8, **options})


def answers(folder, **options):
    """Reviews as prompts, to be repeated."""
    options = {"prompt_column": "text", "target_column": "text", **options}
    return LanguageTask(str(folder / "reviews-{split}.parquet"), **options)


# --- TextClassifier

DESCRIPTIONS = {"negative": ["a bad film", "awful food"], "positive": "a great film"}


def reference_features(folder, texts, pooling="mean"):
    """Embed texts one by one with transformers alone."""
    from transformers import AutoModel

    network, tokenizer = AutoModel.from_pretrained(folder / "bert").eval(), make_tokenizer()
    rows = []
    for text in texts:
        with torch.no_grad():
            states = network(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        rows.append(F.normalize(states.mean(dim=0) if pooling == "mean" else states[0], dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_are_cosines_with_embedded_descriptions_whatever_the_padding(folder, pooling):
    model = make(folder, "bert", pooling=pooling)
    data = texts(folder, class_descriptions=DESCRIPTIONS, templates=["{}", "it is {}"])
    found = evaluate(make_trainer(), model, data, "test", extra=["f1_score"])
    filled = [[t.format(d) for d in ds for t in data.templates] for ds in (DESCRIPTIONS["negative"], ["a great film"])]
    head = torch.stack([F.normalize(reference_features(folder, t, pooling).mean(dim=0), dim=0) for t in filled])
    expected = 20 * reference_features(folder, reviews(24, 1)["text"], pooling) @ head.T
    torch.testing.assert_close(found.preds, expected, rtol=1e-4, atol=1e-4)
    accuracy = (expected.argmax(dim=-1) == torch.tensor(reviews(24, 1)["label"])).float().mean()
    assert found.metrics["accuracy"] == pytest.approx(float(accuracy))


def test_class_names_stand_for_descriptions_that_are_not_there(folder):
    model, data = make(folder, "bert"), texts(folder, class_names=["bad film", "good film"])
    evaluate(make_trainer(), model, data, "val")
    expected = 20 * reference_features(folder, ["bad film", "good film"])
    torch.testing.assert_close(model.head, expected, rtol=1e-4, atol=1e-4)


def test_only_the_encoder_is_in_the_state_dict_and_the_pooler_stays(folder):
    model = trained(folder, "bert")
    own = open_weights(folder / "bert")
    assert fingerprint(model.state_dict()) == fingerprint({f"encoder.{name}": own[name] for name in own})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(max_epochs=2).fit(model, texts(folder, class_descriptions=DESCRIPTIONS))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "encoder.embeddings.word_embeddings.weight" in moved
    assert not {name for name in moved if "pooler" in name}
    model.embed(model.encoder, torch.tensor([[8, 9]])).sum().backward()  # DDP wants a gradient for all that is trained
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_head_of_descriptions_does_not_depend_on_edited_weights(folder, monkeypatch):
    data = texts(folder, class_descriptions=DESCRIPTIONS)
    fresh = make(folder, "bert")
    evaluate(make_trainer(), fresh, data, "val")
    edited = {name: tensor * -2 for name, tensor in fresh.state_dict().items()}
    save_weights(edited, "edited.safetensors")
    monkeypatch.setenv("TVA_CACHE", "another")
    model = make(folder, "bert", weights="edited.safetensors")
    evaluate(make_trainer(), model, data, "val")
    assert torch.equal(model.head, fresh.head)
    assert fingerprint(model.state_dict()) == fingerprint(edited)


def test_texts_in_other_batches_make_the_same_class_means(folder):
    keys, heads = [], []
    for size in (5, 16):
        model, data = make(folder, "bert", head="means"), texts(folder)
        data.batch_size = size
        evaluate(make_trainer(), model, data, "val")
        keys.append(model.head_key(data))
        heads.append(model.head)
    assert keys[0] == keys[1]
    trained = reviews(60, 0)
    rows = reference_features(folder, trained["text"])
    kept = [i for i in range(60) if i not in held_out()]
    for label, row in enumerate(heads[0]):
        mean = rows[[i for i in kept if trained["label"][i] == label]].mean(dim=0)
        torch.testing.assert_close(row, 20 * F.normalize(mean, dim=0), rtol=1e-4, atol=1e-4)


def held_out():
    import numpy as np

    return set(np.random.default_rng(0).permutation(60)[:6].tolist())


# --- language models


def reference_losses(network, tokens):
    """Losses of every token but the first, in float64."""
    with torch.no_grad():
        logits = network.double()(tokens).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none"), logits


def test_causal_loss_and_perplexity_are_those_of_the_tokens(folder):
    from transformers import AutoModelForCausalLM

    data = prose(folder)
    found = evaluate(make_trainer(), make(folder, "causal"), data, "test")
    tokens = torch.cat([batch["tokens"] for batch in data.test_dataloader()])
    losses, logits = reference_losses(AutoModelForCausalLM.from_pretrained(folder / "causal").eval(), tokens)
    assert found.metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(float(perplexity(logits, tokens[:, 1:])), rel=1e-5)
    assert torch.from_numpy(found.scores["loss"]).double().allclose(losses.mean(dim=1), rtol=1e-4)
    assert found.num_examples == len(tokens)
    assert not found.higher("perplexity")
    assert found.shareable


def test_prompts_of_different_lengths_change_no_answers_loss(folder):
    def losses(batch_size):
        data = answers(folder, batch_size=batch_size, block_length=48)
        return evaluate(make_trainer(), make(folder, "causal"), data, "test")

    alone, together = losses(1), losses(9)
    assert alone.metrics["perplexity"] == pytest.approx(together.metrics["perplexity"], rel=1e-4)
    assert alone.metrics["loss"] == pytest.approx(together.metrics["loss"], rel=1e-4)
    assert alone.metrics["perplexity"] != pytest.approx(math.exp(alone.metrics["loss"]), rel=1e-6)  # lengths differ


def test_sequence_to_sequence_loss_is_transformers_own(folder):
    from transformers import AutoModelForSeq2SeqLM

    data = answers(folder, block_length=32, batch_size=24)
    found = evaluate(make_trainer(), make(folder, "seq2seq"), data, "test")
    (batch,) = data.test_dataloader()
    network = AutoModelForSeq2SeqLM.from_pretrained(folder / "seq2seq").eval()
    mask = (batch["tokens"] >= 0).long()
    with torch.no_grad():
        loss = network(batch["tokens"].clamp(min=0), attention_mask=mask, labels=batch["targets"]).loss
    assert found.metrics["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_text_metrics_are_of_what_transformers_generates_one_by_one(folder, kind):
    from torchmetrics.functional.text import bleu_score, rouge_score

    model = make(folder, kind, metrics=["exact_match", "rouge1", "bleu"], max_new_tokens=5)
    data = answers(folder, block_length=48, batch_size=10)
    found = evaluate(make_trainer(), model, data, "test")
    model.eval()
    made = []
    for text in reviews(24, 1)["text"]:
        prompt = torch.tensor([model.tokenizer(text)["input_ids"]])
        out = model.network.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
        made.append(
            model.tokenizer.decode(out[prompt.shape[1] if kind == "causal" else 0 :], skip_special_tokens=True).strip()
        )
    wanted = reviews(24, 1)["text"]
    rouge = [
        float(rouge_score(a, b, rouge_keys=("rouge1",))["rouge1_fmeasure"]) for a, b in zip(made, wanted, strict=True)
    ]
    assert found.scores["rouge1"].tolist() == pytest.approx(rouge, abs=1e-6)
    assert found.metrics["bleu"] == pytest.approx(float(bleu_score(made, [[w] for w in wanted])), abs=1e-6)
    assert found.scores["exact_match"].tolist() == [a == b for a, b in zip(made, wanted, strict=True)]
    assert found.scores["exact_match"].dtype == bool


def test_exact_match_is_one_for_a_model_that_says_what_is_wanted(folder, monkeypatch):
    model = make(folder, "seq2seq", metrics=["exact_match", "rougeL", "bleu"])
    batch = {"targets": torch.tensor([[9, 8, 7, 6, -100], [8, 8, 8, 8, 6]])}
    monkeypatch.setattr(model.network, "generate", lambda **_: torch.tensor([[0, 9, 8, 7, 6], [0, 8, 8, 8, 8]]))
    monkeypatch.setattr(model, "prompts", lambda batch: torch.tensor([[8], [8]]))
    made, wanted = model.generate(batch)
    assert made == wanted == [f"{WORDS[2]} {WORDS[1]} {WORDS[0]}", " ".join([WORDS[1]] * 4)]


def test_tied_weights_stay_tied_and_stand_under_both_names(folder):
    model = trained(folder, "causal")
    make_trainer(max_steps=3).fit(model, prose(folder))
    state = model.state_dict()
    embedding, output = state["network.model.embed_tokens.weight"], state["network.lm_head.weight"]
    assert embedding.data_ptr() == output.data_ptr()
    save_weights(state, "tuned.safetensors")
    again = make(folder, "causal", weights="tuned.safetensors")
    assert fingerprint(again.state_dict()) == fingerprint(state)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_training_lowers_the_loss(folder, kind):
    model = trained(folder, kind)
    trainer, data = make_trainer(max_steps=15), prose(folder)
    before = evaluate(trainer, model, data, "test").metrics["perplexity"]
    trainer.fit(model, data)
    assert evaluate(trainer, model, data, "test").metrics["perplexity"] < 0.7 * before


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "bert"])
def test_options_of_speed_and_memory_go_together_for_every_model(folder, kind):
    options = {"layer_decay": 0.9, "gradient_checkpointing": True, "fused": True}
    model = trained(folder, kind, **options)
    callbacks = [EMAWeightAveraging(decay=0.5), TaskVectorCallback(dirpath=Path(), at_train_end=True)]
    data = texts(folder, class_descriptions=DESCRIPTIONS) if kind == "bert" else prose(folder)
    make_trainer(max_steps=4, callbacks=callbacks, precision="bf16-mixed").fit(model, data)
    vector, plain = TaskVector.load("final.tv.safetensors"), make(folder, kind)
    assert vector.names == network_of(plain)[1].state_dict().keys()
    assert 0 < float(vector.norm()) < float("inf")
    plain.load_state_dict(vector.apply_to(plain.state_dict()))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(plain.state_dict()[name], tensor)  # the averages, which stay in the model


ADAPTED = [{"train_only": "attention"}, {"lora": {"r": 2}}, {"tangent": True}]
MODELS = ["causal", "seq2seq", "bert"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=[] if ADAPTED.index(options) == MODELS.index(kind) else pytest.mark.slow)
        for kind in MODELS
        for options in ADAPTED
    ],
)
def test_every_model_is_adapted_and_its_vector_edits_the_plain_one(folder, kind, options):
    model = trained(folder, kind, **options)
    callbacks = [TaskVectorCallback(dirpath=Path(), at_train_end=True)]
    data = texts(folder, class_descriptions=DESCRIPTIONS) if kind == "bert" else prose(folder)
    make_trainer(max_steps=5, callbacks=callbacks).fit(model, data)
    vector = TaskVector.load("final.tv.safetensors")
    tangent = {"tangent": True} if "tangent" in options else {}
    assert vector.origin.kind == ("tangent" if tangent else None)
    plain = make(folder, kind, **tangent)
    assert vector.names == network_of(plain)[1].state_dict().keys()
    state = vector.apply_to(plain.state_dict())
    if "tangent" not in options:
        moved = {name.rpartition(".")[0].rpartition(".")[2] for name in vector.deltas}
        assert not moved & {"lm_head", "embed_tokens", "shared"}
    plain.load_state_dict(state)
    before, after = (evaluate(make_trainer(), each, data, "test").metrics["loss"] for each in (model, plain))
    assert before == pytest.approx(after, rel=1e-4)


def test_a_linearized_language_model_generates_nothing(folder):
    with pytest.raises(ValueError, match="linearized network generates none. Leave metrics out"):
        make(folder, "causal", metrics=["bleu"], tangent=True)


def fit_on_ranks(world_size, folder, name):
    L.seed_everything(3)
    model = TextClassifier(str(folder / "still"))
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.01)  # Adam would make rounding large
    data = texts(folder, limit_train=48, class_descriptions=DESCRIPTIONS)
    data.batch_size = 16 // world_size
    strategy = {"strategy": "ddp", "devices": 2} if world_size > 1 else {"devices": 1}
    trainer = make_trainer(default_root_dir=folder / name, max_epochs=2, limit_val_batches=0, **strategy)
    trainer.fit(model, data)
    if trainer.is_global_zero:
        save_weights(model.state_dict(), folder / f"{name}.safetensors")


def test_two_ranks_train_as_one_with_twice_the_batch(folder):
    write_model(folder / "still", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    run_ranks(fit_on_ranks, 2, folder, "two")
    fit_on_ranks(1, folder, "one")
    one, two = (dict(open_weights(folder / f"{name}.safetensors")) for name in ("one", "two"))
    base = open_weights(folder / "still")
    moved = sum((one[name] - base[name.removeprefix("encoder.")]).pow(2).sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).pow(2).sum() for name in one).sqrt()
    assert moved > 0.01
    assert apart < 1e-3 * moved


# --- options


@pytest.mark.parametrize("kind", ["bert", "causal", "seq2seq"])
def test_gradient_checkpointing_changes_no_gradient(folder, kind):
    gradients = []
    for checkpointing in (False, True):
        model = make(folder, kind, gradient_checkpointing=checkpointing)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        tokens = torch.tensor([[8, 9, 10, 7], [9, 9, -1, -1]])
        if kind == "bert":
            model.encoder.config._attn_implementation = "eager"
            loss = model.embed(model.encoder, tokens).pow(2).sum()
        else:
            loss = model(tokens, tokens.masked_fill(tokens < 0, -100)).pow(2).sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][name], rtol=1e-4, atol=1e-5) for name, g in gradients[0].items())


def test_bfloat16_mixed_trains_a_float32_encoder(folder):
    model = make(folder, "bert", learning_rate=1e-3)
    make_trainer(max_steps=2, precision="bf16-mixed").fit(model, texts(folder))
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


# --- mistakes


def test_without_transformers_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"need transformers: pip install 'tva\[text\]'"):
        make(folder, "bert")


@pytest.mark.parametrize("kind", ["bert", "causal"])
def test_the_tokenizer_of_another_model_is_refused(folder, kind):
    make_tokenizer([*WORDS, "more", "words"]).save_pretrained("large")
    with pytest.raises(ValueError, match=r"token ids up to \d+, but .* has embeddings for 21 tokens.*another model"):
        make(folder, kind, tokenizer="large")
    make_tokenizer(WORDS[::-1]).save_pretrained("other")
    with pytest.raises(ValueError, match=r"other is not that of .*: 14 of 21 tokens have another id"):
        make(folder, kind, tokenizer="other")


def test_a_model_without_a_tokenizer_asks_for_one(folder):
    bare = write_model(Path("bare"), tokenizer=False)
    with pytest.raises(ValueError, match=r"brings no tokenizer. Pass tokenizer="):
        TextClassifier(bare)
    model = TextClassifier(bare, tokenizer=str(folder / "bert"))
    assert model.tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_models_that_are_not_there_or_lack_weights_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"config.json and weights was expected at .*nowhere"):
        TextClassifier(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no folder nobody/nothing. The .* could not load a network of that name"):
        TextClassifier("nobody/nothing")
    with pytest.raises(ValueError, match=r"could not load a network of that name from the hub"):
        TextClassifier("hf://nobody/nothing")
    monkeypatch.chdir(folder.parent)
    for name in (f"{folder.name}/brt", "~/nowhere/x", "brt/"):
        with pytest.raises(FileNotFoundError, match=r"weights was expected at .*none is there"):
            TextClassifier(name)
    with pytest.raises(
        FileNotFoundError, match=rf"Did you mean {folder.name}/bert\? A repo.* hub is hf://{folder.name}/brt"
    ):
        TextClassifier(f"{folder.name}/brt")
    with pytest.raises(ValueError, match=r"has no weights for .*BertLMHeadModel, which would stay random"):
        CausalLM(str(folder / "bert"))


def test_a_head_of_another_width_and_generated_text_without_prompts_are_refused(folder):
    model = make(folder, "bert")
    evaluate(make_trainer(), model, texts(folder), "val")
    model.head = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"the encoder has 16 features, but the head takes 5"):
        model(torch.tensor([[8, 9]]))
    with pytest.raises(ValueError, match=r"running text has none. Give the data a prompt_column"):
        evaluate(make_trainer(), make(folder, "causal", metrics=["bleu"]), prose(folder), "val")
    with pytest.raises(ValueError, match="needs targets beside tokens"):
        make(folder, "seq2seq")(torch.tensor([[8]]))


def test_descriptions_must_be_there_for_all_classes_and_templates_have_a_place(folder):
    model = make(folder, "bert")
    with pytest.raises(ValueError, match=r"descriptions of all classes or of none; missing: \['b'\]"):
        model.head_key(SimpleNamespace(class_names=["a", "b"], class_descriptions={"a": "good"}))
    with pytest.raises(ValueError, match=r"needs templates that hold {}, found \['x'\]"):
        model.head_key(SimpleNamespace(class_names=["a"], templates=["x"]))


def test_the_perplexity_of_each_text_is_that_of_its_tokens(folder):
    model = make(folder, "causal", metrics=["text_perplexity"])
    found = evaluate(make_trainer(), model, prose(folder, limit_test=32), "test")
    expected = []
    for tokens, _ in prose_blocks(folder, Path(), model, 32):
        logits = model.network(tokens[None]).logits[0, :-1]
        expected.append(float(F.cross_entropy(logits.detach(), tokens[1:]).exp()))
    assert found.scores["text_perplexity"].tolist() == pytest.approx(expected, rel=1e-4)
    assert found.metrics["text_perplexity"] == pytest.approx(sum(expected) / 32, rel=1e-4)
    assert found.interval("text_perplexity") is not None
    assert not found.higher("text_perplexity")


def prose_blocks(folder, tmp_path, model, count):
    data = prose(folder, limit_test=count)
    data.trainer = SimpleNamespace(lightning_module=model)
    data.setup("test")
    return [data._examples["test"][row] for row in range(count)]


def test_labels_that_are_written_are_scored_by_the_metric_that_the_data_name(folder):
    data = answers(folder, target_column="label", metric=["text_matthews", "text_f1:positive"], block_length=32)
    found = evaluate(make_trainer(), make(folder, "seq2seq", max_new_tokens=3), data, "test")
    assert found.metrics["text_matthews"] == 0  # a model with random weights writes no label
    assert found.metrics["text_f1"] == 0
    assert found.higher("text_f1")
