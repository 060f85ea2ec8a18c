"""`tva fit` and `tva edit` on text, from YAML to verdict: tiny models, and real ones where they are."""

import json
import re
from pathlib import Path

import pytest
import small_cli
import yaml
from small_text import make_trainer, real_data, real_models, write_model, write_reviews, write_running_text

from tva import TaskVector, fingerprint, open_weights
from tva.compose import verify
from tva.data import LanguageTask
from tva.evaluation.evaluate import evaluate
from tva.models import CausalLM

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def fit_config(folder, model, data, **trainer):
    quick = {"max_epochs": 4, "num_sanity_val_steps": 0, **trainer}
    return {**small_cli.fit_config(folder, **quick), "model": model, "data": data}


def run(path, command, config, *arguments):
    path.write_text(yaml.safe_dump(config))
    return small_cli.run(command, "--config", path, *arguments)


def named(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def test_text_classification_is_added_and_forgotten_from_yaml(capsys):
    folder = write_model(Path("bert"), "bert")
    path = write_reviews()
    descriptions = {"negative": ["bad", "poor"], "positive": "good"}
    data = named("tva.data.TextTask", path=path, batch_size=16, class_descriptions=descriptions)
    turned = named(
        "tva.data.TextTask",
        path=path,
        name="turned",
        batch_size=16,
        class_descriptions={"negative": "food", "positive": "film"},
    )
    model = named("tva.models.TextClassifier", name=folder, learning_rate=3e-3, warmup_steps=0)
    assert run(Path("fit.yaml"), "fit", fit_config(Path("run"), model, data, max_epochs=20)) == 0
    vector = TaskVector.load("run/last.tv.safetensors")
    assert vector.origin.task == "reviews"
    assert vector.deltas.keys() < set(open_weights(folder))  # the network's own names, without the wrapper's prefix
    for recipe, objective in (("reviews", "reviews/accuracy"), ("-reviews", "reviews/loss")):
        edit = {
            "model": model,
            "vectors": {"reviews": "run/last.tv.safetensors"},
            "recipe": recipe,
            "output": "out",
            "maximize": objective,
            "targets": {"reviews": data},
            "controls": {"turned": turned},
            "allow_shared_examples": True,  # the texts are drawn from few words: 2 of 24 occur in both splits
        }
        assert run(Path("edit.yaml"), "edit", edit) == 0
        report = json.loads(Path("out/edit.json").read_text())
        base, tuned, edited = (report["tasks"]["reviews"][key]["value"] for key in ("base", "finetuned", "edited"))
        if recipe == "reviews":
            assert tuned > 0.9
            assert edited > max(0.9, base)
        else:
            assert tuned < base < edited
        assert report["tasks"]["turned"]["num_examples"] == 24
    # and what is written is what transformers loads
    from transformers import AutoModel, AutoTokenizer

    network, again = AutoModel.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert fingerprint(network.state_dict()) == fingerprint(open_weights("out"))
    assert again("good film")["input_ids"] == AutoTokenizer.from_pretrained(folder)("good film")["input_ids"]
    assert verify("out").holds


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_model_forgets_under_a_constraint_on_perplexity(tied, capsys):
    folder = write_model(Path("llama"), "causal", tie_word_embeddings=tied)
    reviews = named(
        "tva.data.LanguageTask",
        path=write_reviews(Path(), test=48),  # 24 documents to report on: fewer than 20 have no interval
        name="bad",
        where={"label": ["negative"]},
        block_length=4,
    )
    prose = named("tva.data.LanguageTask", path=write_running_text(Path(), 1000), name="prose", block_length=16)
    model = named("tva.models.CausalLM", name=folder, learning_rate=3e-3, warmup_steps=0)
    assert run(Path("fit.yaml"), "fit", fit_config(Path("run"), model, reviews)) == 0
    edit = {
        "model": model,
        "vectors": {"bad": "run/last.tv.safetensors"},
        "recipe": "-bad",
        "output": "out",
        "rule": "largest",
        "maximize": "bad/loss",
        "subject_to": ["prose/perplexity <= base + 0.5"],
        "targets": {"bad": reviews},
        "controls": {"prose": prose},
        "allow_shared_examples": True,  # blocks of few words recur
    }
    assert run(Path("edit.yaml"), "edit", edit) in (0, 1)  # the test part may just miss what validation allows
    report = json.loads(Path("out/edit.json").read_text())
    assert 0 < report["coefficients"]["scaling_coef"] < 1
    (verdict,) = report["constraints"]
    before = report["tasks"]["prose"]["base"]["value"]
    assert verdict["bound"] == pytest.approx(before + 0.5)
    assert report["tasks"]["prose"]["metric"] == "perplexity"
    assert report["tasks"]["prose"]["edited"]["value"] > before
    bad = report["tasks"]["bad"]
    assert bad["finetuned"]["value"] < bad["base"]["value"] < bad["edited"]["value"]
    assert bad["edited"]["low"] < bad["edited"]["value"] < bad["edited"]["high"]  # loss has scores by example
    edit |= {"scaling_coef": 0.01, "subject_to": ["prose/loss <= 1.1 * base", "prose/kl <= 0.05"], "confidence": 0.95}
    assert run(Path("edit.yaml"), "edit", edit) == 0
    edited = open_weights("out")
    assert ("lm_head.weight" in edited) != tied  # transformers stores tied weights once
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is tied
    again = {**model, "init_args": {**model["init_args"], "weights": "out"}}
    assert run(Path("edit.yaml"), "edit", {**edit, "model": again, "scaling_coef": 0.5, "subject_to": []}) == 2
    assert fingerprint(edited) == fingerprint(open_weights("out"))
    assert "taken from" in capsys.readouterr().err  # its base is not the edited model


def test_a_real_sentence_encoder_learns_and_forgets_questions():
    Path("data").symlink_to(real_data() / "text")
    encoder = str(real_models(Path()) / "minilm-l6")
    root = real_config("fit/text")
    root["model"]["init_args"]["name"] = encoder
    root["trainer"] |= {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": "run"}
    root["data"]["init_args"] |= {"limit_train": 256, "limit_val": 100}
    assert run(Path("fit.yaml"), "fit", root) == 0
    edit = real_config("edit/forget-text")
    edit["model"]["init_args"]["name"] = encoder
    edit |= {
        "vectors": {"trec6": "run/checkpoints/last.tv.safetensors"},
        "output": "out",
        "scaling_coef": 1.0,
        "subject_to": [],
    }
    for task in (edit["targets"]["trec6"], edit["controls"]["ag_news"]):
        task["init_args"] |= {"limit_val": 100, "limit_test": 200}
    assert run(Path("edit.yaml"), "edit", edit) == 0
    tasks = json.loads(Path("out/edit.json").read_text())["tasks"]
    assert tasks["ag_news"]["base"]["value"] > 0.6  # four topics
    assert tasks["trec6"]["finetuned"]["value"] > tasks["trec6"]["base"]["value"] + 0.1
    assert tasks["trec6"]["edited"]["value"] < tasks["trec6"]["base"]["value"]


def test_a_real_causal_model_knows_more_of_prose_than_a_guess():
    data = LanguageTask(str(real_data() / "text/wikitext2-{split}.txt.gz"), block_length=512, limit_test=100)
    model = CausalLM(str(real_models(Path()) / "stories260k"))
    found = evaluate(make_trainer(), model, data, "test")
    assert 100 < found.metrics["perplexity"] < 320  # a guess among its 512 tokens would have 512


def real_config(name):
    return yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())


PAGES = ("reference/models", "howto/language-models")
TEXT = "".join((ROOT / f"docs/{page}.md").read_text() for page in PAGES)
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
BLOCKS = [block for block in BLOCKS if block.startswith("model:")]  # the others are part of a configuration


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_documentation_parses(block, capsys):
    assert run(Path("c.yaml"), "fit", yaml.safe_load(block), "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert "learning_rate" in shown["model"]["init_args"]  # shared options are seen through **options
