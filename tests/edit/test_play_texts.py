"""Texts and prompts that are typed into the page of a finished edit: what base and edited model answer."""

import time
from pathlib import Path

import datasets
import pytest
import torch
from chromium import DESKTOP, browser
from small_page import MARKUP, answer, served
from small_runs import classifier_run, image_run, language_run, text_run

from tva.cli.commands.play import open_run
from tva.edit.play.answers import Sampling
from tva.edit.play.model import Answer
from tva.edit.play.prompt_box import answer_html
from tva.report.edit_report import read_report

TEXT = "it was a good film"


def blended(folder, auto, coef):
    """Load a model and move it to a part of the way to the one that was moved."""
    import transformers

    base, other = (getattr(transformers, auto).from_pretrained(f"{folder}{end}") for end in ("", "-moved"))
    state = {name: tensor + coef * (other.state_dict()[name] - tensor) for name, tensor in base.state_dict().items()}
    base.load_state_dict(state)
    return base.eval()


@pytest.mark.slow
def test_the_answers_to_the_test_texts_have_the_accuracy_that_the_report_says(tmp_path):
    run = text_run(Path())
    playground, rows = (
        open_run(str(run)),
        datasets.load_dataset("parquet", data_files=f"{tmp_path}/reviews-test.parquet"),
    )
    rows = rows["train"]
    right = {}
    for row in rows:
        for task, classes in playground.answer(row["text"]).classes.items():
            assert sum(live for _, _, live in classes) == pytest.approx(1)
            for which in (1, 2):
                best = max(range(len(classes)), key=lambda at, classes=classes, which=which: classes[at][which])
                right.setdefault((task, which), []).append(best == row["label"])
    for task, entry in read_report(run)["tasks"].items():
        for which, label in ((1, "base"), (2, "edited")):
            assert sum(right[task, which]) / len(rows) == pytest.approx(entry[label]["value"])
    before = playground.at({"scaling_coef": 1.0}).rows
    at_base = playground.answer(TEXT, {"scaling_coef": 0.0})
    assert all(base == live for classes in at_base.classes.values() for _, base, live in classes)
    assert playground.at({"scaling_coef": 1.0}).rows == before  # each task has its own head again
    for text in ("", " \n", "x" * 4001):
        with pytest.raises(ValueError, match="Type a text of 1 to 4,000 characters; found"):
            playground.answer(text)


@pytest.mark.slow
def test_a_trained_head_gives_its_softmax_at_the_coefficient_of_the_slider():
    playground = open_run(str(classifier_run(Path())))
    tokens = playground.answers.model.tokenizer([TEXT], return_tensors="pt", return_token_type_ids=False)
    for coef in (0.5, 0.8):
        (classes,) = playground.answer(TEXT, {"scaling_coef": coef}).classes.values()
        for which, at in ((1, 0.0), (2, coef)):
            model = blended(Path("classifier"), "AutoModelForSequenceClassification", at)
            expected = model(**tokens).logits.softmax(-1)[0].tolist()
            assert [row[which] for row in classes] == pytest.approx(expected, abs=1e-6)
    assert [name for name, *_ in classes] == ["negative", "positive"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return language_run(tmp_path_factory.mktemp("prompts"))


@pytest.mark.slow
def test_a_prompt_is_continued_by_base_and_edited_model_with_the_same_draws(prompts):
    playground = open_run(str(prompts))
    greedy = Sampling(max_new_tokens=8, temperature=0)
    tokenizer = playground.answers.model.tokenizer
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    for coef in (0.5, 1.0):
        found = playground.answer(TEXT, {"scaling_coef": coef}, greedy).texts
        for text, at in zip(found, (0.0, coef), strict=True):
            made = blended(prompts.parent / "lm", "AutoModelForCausalLM", at).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
            assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    texts = [playground.answer(TEXT, {"scaling_coef": 0.0}, Sampling(seed=seed)).texts for seed in (1, 1, 2)]
    assert all(base == live for base, live in texts)  # the same draws
    assert texts[0] == texts[1] != texts[2]
    assert playground.answer(f"{TEXT} " * 200, sampling=greedy).texts  # of which the end counts
    with pytest.raises(ValueError, match="max_new_tokens must be from 1 to 200, temperature at least 0 and top_p in"):
        Sampling(max_new_tokens=201)


@pytest.mark.slow
def test_images_take_no_text():
    playground = open_run(str(image_run(Path())))
    with pytest.raises(ValueError, match="takes no text that can be typed"):
        playground.answer(TEXT)


def test_answers_are_escaped_and_the_likeliest_classes_come_first():
    rows = [(f"{MARKUP}{number}", number / 100, 0.0) for number in range(10)]
    page = answer_html(Answer({"scaling_coef": 0.5}, {MARKUP: rows}, None, 0.1), Sampling())
    assert page.index("&#34;9</th>") < page.index("&#34;2</th>")
    assert "and 2 less likely classes" in page
    written = answer_html(Answer({"scaling_coef": 0.5}, {}, (MARKUP, ""), 0.1), Sampling())
    assert "At most 20 tokens, temperature 1, top p 1, seed 0." in written
    assert "(nothing)" in written
    for part in (page, written):
        assert "&lt;img" in part
        assert "<img" not in part


@pytest.mark.slow
def test_the_page_takes_a_prompt_in_a_browser(prompts):
    with served(prompts) as port:
        status, headers, body = answer(port)
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert b"Continue a prompt" in body
        assert answer(port, Host="evil.example")[0] == 403
        with browser() as tab:
            tab.open(f"http://127.0.0.1:{port}/", DESKTOP, until="document.querySelector('textarea')")
            tab.evaluate("document.querySelector('textarea').focus()")
            tab.send("Input.insertText", text="<b>it was</b> a good")
            until = time.monotonic() + 300  # a click is lost while the page is not yet connected
            while not tab.evaluate("Boolean(document.querySelector('.beside'))") and time.monotonic() < until:
                tab.evaluate("[...document.querySelectorAll('.asking button')].pop().click()")
                time.sleep(0.3)
            assert tab.evaluate("document.querySelectorAll('.written').length") == 2
            assert tab.complaints == []
