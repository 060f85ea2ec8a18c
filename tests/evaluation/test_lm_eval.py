"""Tasks of lm-evaluation-harness, defined here: scores by document against plain transformers, halves, mistakes."""

import json
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from small_text import make_tokenizer, write_model

from tva.cli.main import main
from tva.evaluation.lm_eval import LmEvalTask
from tva.models import CausalLM
from tva.vectors.task_vector import TaskVector

TASK = """
task: feelings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [good, bad]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "causal", "causal")
    texts = ["the film is", "it was a", "food is", "the food was", "it is", "a film was a", "is it", "and it was"] * 3
    table = datasets.Dataset.from_dict({"text": texts, "label": [index % 2 for index in range(len(texts))]})
    table.to_json(folder / "feelings.json")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "feelings.yaml").write_text(TASK.format(file=folder / "feelings.json"))
    return folder


def test_scores_are_those_of_the_likelier_continuation(folder):
    model, tokenizer = CausalLM(str(folder / "causal")), make_tokenizer(kind="causal")
    task = LmEvalTask("lm_eval:feelings", include_path=str(folder / "tasks"), limit_test=7)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = task.evaluate(model.bare_network, "test")
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    rows = [
        datasets.load_dataset("json", data_files=str(folder / "feelings.json"))["train"][row]
        for row in task._documents["test"]
    ]
    expected = []
    for row in rows:
        logs = []
        for choice in ("good", "bad"):
            context = tokenizer(row["text"])["input_ids"]
            whole = torch.tensor([tokenizer(f"{row['text']} {choice}")["input_ids"]])
            steps = model.network.eval()(whole).logits[0, :-1].detach().log_softmax(dim=-1)
            logs.append(float(steps[len(context) - 1 :].gather(1, whole[0, len(context) :, None]).sum()))
        expected.append(int(np.argmax(logs)) == row["label"])
    assert found.scores["acc"].tolist() == expected
    assert found.scores["acc"].dtype == bool
    assert found.num_examples == 7
    assert found.higher("acc")
    assert found.interval("acc") is not None
    assert not set(task._documents["val"]) & set(task._documents["test"])
    assert task.tva_settings["task"] == "feelings"


@pytest.mark.slow
def test_an_edit_is_chosen_and_limited_by_tasks_of_the_harness(folder):
    model = CausalLM(str(folder / "causal"))
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    moved = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items()}
    moved |= {name: moved[tied] for name, tied in (("network.lm_head.weight", "network.model.embed_tokens.weight"),)}
    TaskVector.between(base, moved).save("feelings.tv.safetensors")
    task = {"class_path": "tva.evaluation.lm_eval.LmEvalTask"}
    options = {"task": "lm_eval:feelings", "include_path": str(folder / "tasks"), "limit_val": 8, "limit_test": 9}
    config = {
        "model": {"class_path": "tva.models.CausalLM", "init_args": {"name": str(folder / "causal")}},
        "vectors": {"feelings": "feelings.tv.safetensors"},
        "recipe": "-feelings",
        "targets": {"harness": task | {"init_args": options}},
        "controls": {"same": task | {"init_args": options | {"seed": 1}}},
        "minimize": "harness/acc",
        "subject_to": ["same/acc >= base - 0.9"],
        "search": {"class_path": "tva.search.Grid", "init_args": {"num": 2}},
        "output": "edit",
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    Path("edit.yaml").write_text(yaml.safe_dump(config))
    main(["edit", "--config", "edit.yaml"])
    found = json.loads(Path("edit/edit.json").read_text())
    entry, coef = found["tasks"]["harness"], found["coefficients"]["scaling_coef"]
    assert (entry["metric"], entry["num_examples"], entry["higher_is_better"]) == ("acc", 9, True)
    assert entry["settings"]["task"] == "feelings"
    assert entry["base"]["low"] <= entry["base"]["value"] <= entry["base"]["high"]
    vector = TaskVector.load("feelings.tv.safetensors")
    for label, weights in (("base", base), ("edited", (-vector).apply_to(base, coef))):
        model.load_state_dict(weights)
        assert entry[label]["value"] == LmEvalTask(**options).evaluate(model.bare_network, "test").metrics["acc"]


def test_a_task_that_the_harness_lacks_is_refused(folder):
    with pytest.raises(ValueError, match="lm-eval must have a task 'feelnigs'"):
        LmEvalTask("feelnigs", include_path=str(folder / "tasks"))


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'tva\[lm-eval\]'"):
        LmEvalTask("hellaswag")
