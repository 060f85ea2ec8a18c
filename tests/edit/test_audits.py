"""Audits of forgetting: relearning and rounding, against the same done by hand."""

import json

import numpy as np
import pytest
import torch
from small_edit import Net, Task, edit
from torch import nn

from tva import EditReport, TaskVector
from tva.edit.audit_options import Relearn
from tva.edit.audits import round_to_int8, rounded_weights
from tva.report.page import edit_page
from tva.report.schema import problems


def accuracy(model, task):
    with torch.no_grad():
        return float(np.mean(torch.cat([model(x).argmax(-1) == y for x, y in task._loader(2)]).double().numpy()))


def forgotten(vectors):
    """Return the model of the edit below: the base minus a."""
    model = Net()
    TaskVector.load(vectors["a"]).write_into(model.state_dict(), Net().state_dict(), -1.0)
    return model


def forget(vectors, folder, **changes):
    options = {"recipe": "-a", "targets": {"a": Task(1)}, "maximize": None, "search": None, "scaling_coef": 1.0}
    return edit(vectors, folder=folder, **options | changes)


def test_rounding_is_symmetric_with_a_scale_for_each_output():
    weight = torch.randn(5, 3, 2, dtype=torch.float64)
    weight[2] = 0
    for dimension in (0, 1):
        scale = np.abs(weight.numpy()).max(axis=tuple({0, 1, 2} - {dimension}), keepdims=True) / 127
        expected = np.round(weight.numpy() / np.where(scale > 0, scale, 1)) * scale
        assert round_to_int8(weight, dimension).numpy() == pytest.approx(expected, rel=1e-6)
    found = round_to_int8(weight.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found[2] == 0).all()


def test_weights_of_linear_layers_and_convolutions_are_rounded_but_not_what_an_embedding_shares():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv": nn.Conv2d(2, 3, 1),
            "up": nn.ConvTranspose2d(2, 3, 1),
            "gpt": Conv1D(3, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(5, 2),
            "head": nn.Linear(2, 5),
            "norm": nn.LayerNorm(2),
        }
    )
    model["head"].weight = model["embedding"].weight
    outputs = dict.fromkeys(["linear", "conv", "attention.out_proj"], 0) | {"up": 1, "gpt": 1}
    expected = {f"{name}.weight": dimension for name, dimension in outputs.items()}
    assert rounded_weights(model) == expected | {"attention.in_proj_weight": 0}


def test_int8_evaluates_base_and_edited_with_rounded_weights(vectors, tmp_path):
    report = forget(vectors, tmp_path, audits=["int8"])
    found = report.audits["int8"]
    assert found["rounded"] == 2
    models = {"base": Net(), "edited": forgotten(vectors)}
    for label, model in models.items():
        for layer in (model.net[0], model.net[2]):
            layer.weight.data = round_to_int8(layer.weight.data)
        for task, seed in (("a", 1), ("other", 3)):
            after = found["tasks"][task][f"{label}_after"]
            assert after["value"] == accuracy(model, Task(seed))
            assert after["low"] < after["value"] < after["high"] or after["value"] in (0, 1)
    entry = found["tasks"]["a"]
    base, edited, after = (entry[name]["value"] for name in ("base", "edited", "edited_after"))
    assert entry["recovered"] == pytest.approx((after - edited) / (base - edited))
    assert entry["change"]["difference"] == pytest.approx(after - edited)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_relearning_is_a_few_steps_on_a_few_examples_from_the_edited_model_and_from_the_base(
    optimizer, vectors, tmp_path
):
    asked = Relearn(steps=6, examples=70, learning_rate=0.02, optimizer=optimizer, seed=3)
    report = forget(vectors, tmp_path, audits=["relearn"], relearn=asked)
    found = report.audits["relearn"]["tasks"]["a"]
    inputs, labels = Task(1).train_dataloader().dataset.tensors
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(3))[:70]
    batches = rows.split(20)
    options = {"weight_decay": 0.0} if optimizer == "AdamW" else {}
    for label, model in (("base", Net()), ("edited", forgotten(vectors))):
        descent = getattr(torch.optim, optimizer)(model.parameters(), lr=0.02, **options)
        curve = []
        for step in range(6):
            batch = batches[step % len(batches)]
            descent.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descent.step()
            curve.append(accuracy(model, Task(1)))
        assert found[f"{label}_after"]["value"] == pytest.approx(curve[-1], abs=0.011)
        assert [point[label] for point in found["curve"]] == pytest.approx([curve[1], curve[3], curve[5]], abs=0.011)
    assert [point["step"] for point in found["curve"]] == [2, 4, 6]
    assert found["num_trained"] == 70
    assert report.audits["relearn"]["options"] == {
        "steps": 6,
        "examples": 70,
        "learning_rate": 0.02,
        "optimizer": optimizer,
        "seed": 3,
    }


def test_a_constraint_on_an_audit_decides_at_the_gate(vectors, tmp_path):
    report = forget(vectors, tmp_path / "plain", audits=["int8"])
    after = report.audits["int8"]["tasks"]["a"]
    allowed = forget(vectors, tmp_path / "holds", audits=["int8"], subject_to=["a/int8_accuracy >= 1.5 * base"])
    (constraint,) = allowed.constraints
    assert allowed.holds
    assert (constraint.value, constraint.metric) == (after["edited_after"]["value"], "int8_accuracy")
    assert constraint.bound == pytest.approx(1.5 * after["base_after"]["value"])
    asked = {"audits": ["relearn", "int8"], "relearn": Relearn(steps=40, examples=200, learning_rate=0.05)}
    refused = forget(
        vectors, tmp_path / "fails", **asked, subject_to=["a/relearn_accuracy <= 0.5 * base"], confidence=0.95
    )
    assert not refused.holds
    assert refused.constraints[0].limit > refused.constraints[0].value
    assert not list((tmp_path / "fails/out").glob("*.safetensors"))
    content = json.loads((tmp_path / "fails/out/edit.json").read_text())
    assert not list(problems(content))
    assert EditReport.load(tmp_path / "fails/out").audits == content["audits"]
    page = edit_page(content)
    assert "after 10, 20, 30, 40 steps" in page
    assert "a/relearn_accuracy &lt;= 0.5 * base" in page


def test_a_report_without_audits_has_no_entry_and_is_still_read(vectors, tmp_path):
    forget(vectors, tmp_path)
    assert "audits" not in json.loads((tmp_path / "out/edit.json").read_text())
    assert EditReport.load(tmp_path / "out").audits == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject_to": ["a/int8_accuracy <= 0.5"]}, r"is on the audit 'int8': add it, as in audits: \[int8\]"),
        ({"relearn": Relearn()}, "add it to audits, or drop relearn"),
        (
            {"audits": ["relearn"], "subject_to": ["other/relearn_accuracy >= base"]},
            "is on the control 'other'. Put a target there: 'a'",
        ),
        ({"audits": ["int8"], "minimize": "a/int8_accuracy"}, "an objective cannot be on 'int8_accuracy'"),
        ({"audits": ["relearn"], "targets": {"a": lambda model, split: 1.0}}, "'a' has no training data"),
        ({"audits": ["relearn"], "relearn": Relearn(learning_rate=1e38, optimizer="SGD")}, "weights stay finite"),
    ],
)
def test_mistakes_are_said(changes, message, vectors, tmp_path):
    with pytest.raises(ValueError, match=message):
        forget(vectors, tmp_path, **changes)
    with pytest.raises(ValueError, match="found steps 0"):
        Relearn(steps=0)


@pytest.mark.slow
def test_a_language_model_is_audited_by_its_loss(tmp_path):
    from small_edit import make_trainer
    from small_text import WORDS, write_model

    from tva.data import LanguageTask
    from tva.edit.options import EditOptions
    from tva.edit.run import run_edit
    from tva.models import CausalLM

    folder = write_model(tmp_path / "lm", "causal")
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}.txt").write_text("\n".join(" ".join(WORDS[row % 5 : row % 5 + 6]) for row in range(150)))
    task = LanguageTask(
        {part: str(tmp_path / f"{part}.txt") for part in ("train", "val", "test")},
        val_split="val",
        block_length=16,
        batch_size=4,
    )
    model = CausalLM(folder)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    moved = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    moved["network.lm_head.weight"] = moved["network.model.embed_tokens.weight"]
    options = EditOptions(
        vectors={"texts": TaskVector.between(base, moved)},
        output=str(tmp_path / "out"),
        recipe="texts",
        scaling_coef=1.0,
        targets={"texts": task},
        audits=["relearn", "int8"],
        relearn=Relearn(steps=8, examples=8, learning_rate=3e-3),
        subject_to=["texts/relearn_loss <= 10"],
    )
    report = run_edit(make_trainer(), model, options)
    assert report.audits["int8"]["rounded"] == 14  # seven in each of two layers; the head is the embedding
    found = report.audits["relearn"]["tasks"]["texts"]
    assert found["metric"] == "loss"
    assert found["edited_after"]["value"] < found["edited"]["value"]
    assert found["change"]["difference_high"] < 0
    assert report.holds
