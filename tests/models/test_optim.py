"""What the classifiers share: heads that are probed or learned, layer-wise decay, options of memory and speed."""

import inspect
import os
import platform
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_models import quiet_trainer
from small_networks import SIZE, write_images, write_network
from torch.nn import functional as F
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, edit_model, open_weights
from tva.data import ImageTask
from tva.evaluation.evaluate import evaluate
from tva.models import ClipClassifier, VisionClassifier
from tva.models.heads import fit_probe
from tva.models.optim import FineTuned, layer_depths


@pytest.fixture(autouse=True)
def own_heads(monkeypatch):
    monkeypatch.setenv("TVA_CACHE", "cache")


@pytest.fixture
def task():
    path = write_images(Path(), [0, 1, 2] * 10)
    return lambda **options: ImageTask(path, class_names=["red", "green", "blue"], batch_size=8, **options)


def make_vision(name="test_efficientnet", **options):
    path = Path(f"{name}.safetensors")
    path = str(path) if path.exists() else write_network(Path(), name)
    options = {"learning_rate": 1e-2, "warmup_steps": 0} | options
    return VisionClassifier(name, path, **({"image_size": SIZE} if name != "test_vit" else {}), **options)


def make_trainer(*callbacks, **options):
    return quiet_trainer(*callbacks, num_sanity_val_steps=0, **options)


def last(folder, **options):
    return ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False, **options)


# --- probes


def test_a_probe_is_the_optimum_of_regularized_logistic_regression(task):
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = F.normalize(torch.randn(60, 5, generator=generator) + 2 * F.one_hot(labels, 5), dim=-1)

    class Data(L.LightningDataModule):
        class_names = ("a", "b", "c")

        def train_dataloader(self):
            return [(features[:40], labels[:40]), (features[40:], labels[40:])]

    head = fit_probe(lambda inputs: inputs, Data())
    variance = float(features.double().var(dim=0, correction=0).sum())
    reference = LogisticRegression(C=1 / (60 * 1e-3 * variance), fit_intercept=False, tol=1e-10, max_iter=5000)
    reference.fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(head.numpy(), reference.coef_, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():  # where Lightning evaluates
        assert torch.equal(fit_probe(lambda inputs: inputs.clone(), Data()), head)


@pytest.mark.parametrize("head", ["probe", "means"])
def test_probe_and_means_belong_to_the_base_for_every_image_model(task, head):
    for make in (lambda **o: make_vision(**o), ClipClassifier):
        fresh, edited = make(head=head), make(head=head)
        with torch.no_grad():
            for parameter in edited.parameters():
                parameter.mul_(-3)
        found = evaluate(make_trainer(), fresh, task(), "val")
        evaluate(make_trainer(), edited, task(), "val")
        assert torch.equal(fresh.head, edited.head)
        assert not fresh.head.requires_grad
        assert not any(name.startswith("head") for name in fresh.state_dict())
        assert found.metrics["accuracy"] > 0.5  # colors that are plain to see


# --- learned heads


def test_a_learned_head_is_trained_and_stays_out_of_the_vector(task):
    model = make_vision(head="learned")
    trainer = make_trainer(TaskVectorCallback(), last(Path("run")), max_epochs=2)
    trainer.fit(model, task())
    start = make_vision()
    evaluate(make_trainer(), start, task(), "val")
    saved = torch.load("run/last.ckpt", weights_only=True)
    assert saved["head"]["weight"].shape == start.head.shape
    assert not torch.equal(saved["head"]["weight"], start.head)  # it began as class means
    assert all(name.startswith("encoder.") for name in saved["state_dict"])
    vector = TaskVector.load("run/last.tv.safetensors")
    assert vector.names == set(start.encoder.state_dict())  # the network's own names
    after = evaluate(trainer, model, task(), "test")
    assert torch.equal(model.head, saved["head"]["weight"])
    elsewhere = make_vision(head="learned", heads={"colors": "run/last.ckpt"})
    elsewhere.load_state_dict(saved["state_dict"])
    assert evaluate(make_trainer(), elsewhere, task(), "test").same_as(after)


@pytest.mark.slow
def test_an_edit_compares_all_models_under_the_learned_head(task):
    L.seed_everything(0)
    model = make_vision(head="learned")
    make_trainer(TaskVectorCallback(), last(Path("run")), max_epochs=6).fit(model, task())
    vector = Path("run/last.tv.safetensors")
    assert TaskVector.load(vector).untouched.keys() < set(model.encoder.state_dict())
    heads = {"colors": "run/last.ckpt"}
    report = edit_model(
        make_vision(head="learned", heads=heads),
        trainer=make_trainer(max_steps=1),
        vectors={"colors": str(vector)},
        recipe="colors",
        scaling_coef=1.0,
        output="out",
        minimize="colors/accuracy",
        baselines=["gradient_ascent"],  # which fits, and must not leave its head behind
        targets={"colors": task()},
    )
    scores = report.tasks["colors"].scores
    assert scores["edited"] == scores["finetuned"]
    assert scores["finetuned"].value > 0.5


def test_a_fit_with_a_learned_head_that_is_resumed_ends_where_one_fit_ends(task):
    ends = []
    for parts in ((4,), (2, 4)):
        folder = Path(str(len(parts)))
        for position, epochs in enumerate(parts):
            L.seed_everything(0)
            model = make_vision(head="learned")
            rate = torch.optim.SGD  # the schedule depends on the number of epochs, so a fixed rate is used
            model.configure_optimizers = lambda m=model, o=rate: o(m.parameters(), lr=0.1, momentum=0.9)
            data = task()
            data._loader = lambda part, shuffle=False, load=data._loader: load(part)  # in order
            trainer = make_trainer(last(folder, save_top_k=1), max_epochs=epochs)
            trainer.fit(model, data, ckpt_path=str(folder / "last.ckpt") if position else None)
        ends.append(torch.load(folder / "last.ckpt", weights_only=True))
    assert torch.equal(ends[0]["head"]["weight"], ends[1]["head"]["weight"])
    assert all(torch.equal(ends[1]["state_dict"][name], value) for name, value in ends[0]["state_dict"].items())


def test_learned_heads_that_are_not_there_or_of_other_classes_are_refused(task):
    with pytest.raises(ValueError, match=r"colors: with head='learned' .*heads: {colors: CHECKPOINT}"):
        evaluate(make_trainer(), make_vision(head="learned"), task(), "val")
    begun = make_vision(head="learned", heads={"colors": "start"})
    means = make_vision()
    assert evaluate(make_trainer(), begun, task(), "val").same_as(evaluate(make_trainer(), means, task(), "val"))
    with pytest.raises(FileNotFoundError, match=r"head of colors was expected in .*no\.ckpt"):
        model = make_vision(head="learned", heads={"colors": "no.ckpt"})
        evaluate(make_trainer(), model, task(), "val")
    for content, found in (({}, "it holds none"), ({"class_names": ["x"], "weight": torch.zeros(1, 2)}, "one of 'x'")):
        torch.save({"head": content or None}, "odd.ckpt")
        with pytest.raises(ValueError, match=found):
            model = make_vision(head="learned", heads={"colors": "odd.ckpt"})
            evaluate(make_trainer(), model, task(), "val")
    with pytest.raises(ValueError, match=r"heads are those of fits with head='learned', but head is 'means'"):
        make_vision(heads={"colors": "start"})
    with pytest.raises(ValueError, match=r"head must be one of 'means', 'probe', 'learned'; found 'zero_shot'"):
        make_vision(head="zero_shot")


def test_averaging_with_a_learned_head_is_refused_and_with_a_probe_is_not(task):
    average = EMAWeightAveraging(decay=0.5)
    with pytest.raises(ValueError, match=r"EMAWeightAveraging averages only the encoder.*head='probe'"):
        make_trainer(average, max_steps=1).fit(make_vision(head="learned"), task())
    model = make_vision(head="probe")
    callbacks = EMAWeightAveraging(decay=0.5), TaskVectorCallback(), last(Path("run"))
    make_trainer(*callbacks, max_epochs=1).fit(model, task())
    vector = TaskVector.load("run/last.tv.safetensors")
    averaged = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    base = open_weights(next(Path("run").glob("base-*")))
    assert all(torch.equal(delta, averaged[f"encoder.{name}"] - base[name]) for name, delta in vector.deltas.items())


# --- layer-wise decay


def test_depths_follow_the_layers_of_each_family():
    vit = layer_depths(name for name, _ in make_vision("test_vit").named_parameters())
    blocks = max(int(name.split(".")[2]) for name in vit if name.startswith("encoder.blocks.")) + 1
    assert {vit["encoder.cls_token"], vit["encoder.patch_embed.proj.weight"]} == {0}
    assert vit["encoder.blocks.0.norm1.weight"] == 1
    assert vit["encoder.norm.weight"] == blocks
    clip = layer_depths(name for name, _ in ClipClassifier().named_parameters())
    assert (clip["encoder.conv1.weight"], clip["encoder.transformer.resblocks.0.ln_1.weight"]) == (0, 1)
    assert clip["encoder.proj"] == clip["encoder.ln_post.weight"] == max(clip.values())


def test_each_layer_learns_slower_than_that_above_it(task):
    model = make_vision(layer_decay=0.5, learning_rate=1e-3)
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, task())
    (optimizer,) = trainer.optimizers
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    depths = layer_depths(names.values())
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            expected = 1e-3 * 0.5 ** (max(depths.values()) - depths[names[parameter]])
            assert group["initial_lr"] == pytest.approx(expected)
            seen.append(names[parameter])
    assert sorted(seen) == sorted(names.values())
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\]"):
            make_vision(layer_decay=wrong)


# --- memory and speed


@pytest.mark.parametrize("family", ["clip", "test_vit", "test_efficientnet"])
def test_gradient_checkpointing_and_layout_change_no_gradient(family):
    gradients = []
    for options in ({}, {"gradient_checkpointing": True, "channels_last": True}):
        torch.manual_seed(0)
        model = ClipClassifier(**options) if family == "clip" else make_vision(family, **options)
        size = {"clip": 32, "test_vit": 160}.get(family, SIZE)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        model.encoder(images).pow(2).sum().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_checkpointing_that_a_network_does_not_know_is_an_error():
    from tva.models.optim import prepare

    with pytest.raises(ValueError, match=r"Linear knows no gradient checkpointing"):
        prepare(torch.nn.Linear(2, 2), gradient_checkpointing=True)


@pytest.mark.slow
def test_compiling_leaves_the_names_of_weights():
    plain, compiled = make_vision(), make_vision(compile=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert compiled.encoder._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_network_gives_the_same_features(task):
    plain, compiled = make_vision(), make_vision(compile=True)
    found = [evaluate(make_trainer(), model, task(), "val", extra=["f1_score"]) for model in (plain, compiled)]
    torch.testing.assert_close(found[1].preds, found[0].preds, rtol=1e-3, atol=1e-3)


def test_bfloat16_mixed_trains_float32_weights(task):
    model = ClipClassifier(channels_last=True, gradient_checkpointing=True)
    make_trainer(max_steps=2, precision="bf16-mixed").fit(model, task())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_the_fused_kernel_trains_to_the_same_weights(task):
    ends, base = [], ClipClassifier().state_dict()
    for fused in (False, True):
        model = ClipClassifier(learning_rate=1e-3, warmup_steps=0, fused=fused)
        trainer = make_trainer(max_steps=3, gradient_clip_val=1.0)
        L.seed_everything(0)
        trainer.fit(model, task())
        assert bool(trainer.optimizers[0].param_groups[0]["fused"]) == fused
        ends.append(model.state_dict())
    moved = sum((ends[0][name] - base[name]).pow(2).sum() for name in base).sqrt()
    apart = sum((ends[0][name] - ends[1][name]).pow(2).sum() for name in base).sqrt()
    assert moved > 0.1
    assert apart < 0.01 * moved


FAULTS = """
import resource, torch
from tva.models.optim import keep_freed_memory

def step():
    kept = [torch.ones(4 * 2**20) for _ in range(6)]  # 96 MiB; glibc gives back what exceeds 32 on its own

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_step_frees_is_used_by_the_next_without_new_pages():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    before, kept, after = run.stdout.split()
    assert kept == "True"
    assert int(after) < 0.1 * int(before)


@pytest.mark.parametrize(
    "name", ["ClipClassifier", "VisionClassifier", "TextClassifier", "CausalLM", "Seq2SeqLM", "TimmModel"]
)
def test_every_model_takes_every_option_of_training_on_the_command_line(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    options = {key: each.default for key, each in inspect.signature(FineTuned).parameters.items()}
    given = {"name": "some", **options, "weights": "edited"}
    found = parser.parse_object({"model": {"class_path": f"tva.models.{name}", "init_args": given}})
    assert {key: found.model.init_args[key] for key in given} == given
