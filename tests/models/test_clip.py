"""ClipClassifier: the frozen zero-shot head, the state dict, the paper's recipe, and where weights come from."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import quiet_trainer
from torch.nn import functional as F

from tva import fingerprint, save_weights
from tva.data import ImageTask
from tva.models import ClipClassifier
from tva.models.clip import load_clip

NAMES = ["circle", "square", "star"]


def task(**options):
    return SimpleNamespace(name="marks", class_names=NAMES, templates=["a {}", "a drawing of a {}"], **options)


def with_head(model, datamodule, stage="test"):
    """Do what a Trainer does before it evaluates."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    model._trainer = SimpleNamespace(datamodule=datamodule, strategy=strategy, is_global_zero=True, barebones=False)
    model.setup(stage)
    return model


def test_the_head_is_the_text_towers_mean_over_templates():
    model = with_head(ClipClassifier(), task())
    clip, _, tokenizer = load_clip("tva-tiny")
    for row, name in zip(model.head, NAMES, strict=True):
        with torch.no_grad():
            texts = tokenizer([f"a {name}", f"a drawing of a {name}"])
            features = F.normalize(clip.encode_text(texts).double(), dim=-1).mean(dim=0)
        expected = F.normalize(features, dim=0) * clip.logit_scale.double().exp()
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_the_whole_clip_model():
    model = with_head(ClipClassifier(), SimpleNamespace(name="m", class_names=NAMES, templates=["a {}"])).eval()
    clip, _, tokenizer = load_clip("tva-tiny")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image_features, text_features, scale = clip(images, tokenizer([f"a {name}" for name in NAMES]))
        torch.testing.assert_close(model(images), scale * image_features @ text_features.T, rtol=1e-4, atol=1e-4)


def test_the_state_dict_is_only_the_image_encoder():
    model = with_head(ClipClassifier(), task())
    assert all(name.startswith("encoder.") for name in model.state_dict())
    assert all(name.startswith("encoder.") for name, _ in model.named_parameters())
    visual = load_clip("tva-tiny")[0].visual.state_dict()
    assert fingerprint(model.state_dict()) == fingerprint({f"encoder.{name}": value for name, value in visual.items()})


def test_the_head_is_built_once_per_class_list_and_kept_on_disk(monkeypatch):
    monkeypatch.setenv("TVA_CACHE", ".")
    builds = []
    build = ClipClassifier.build_head
    monkeypatch.setattr(ClipClassifier, "build_head", lambda self, dm: builds.append(dm.class_names) or build(self, dm))
    model = ClipClassifier()
    first = with_head(model, task()).head
    with_head(model, SimpleNamespace(class_names=["dot", "line"], templates=["a {}"]))
    again = with_head(model, task()).head
    other_process = with_head(ClipClassifier(), task()).head
    assert builds == [NAMES, ["dot", "line"]]
    assert torch.equal(first, again)
    assert torch.equal(first, other_process)


def test_the_default_recipe_is_the_papers():
    model = with_head(ClipClassifier(), task())
    model._trainer.estimated_stepping_batches = 2000
    optimizer = model.configure_optimizers()
    (group,) = optimizer["optimizer"].param_groups
    assert isinstance(optimizer["optimizer"], torch.optim.AdamW)
    assert (group["initial_lr"], group["weight_decay"]) == (1e-5, 0.1)
    assert ImageTask("builtin:digits").batch_size == 128
    rates = []
    for _ in range(2000):
        rates.append(optimizer["optimizer"].param_groups[0]["lr"])
        optimizer["optimizer"].step()
        optimizer["lr_scheduler"]["scheduler"].step()
    assert rates[0] == pytest.approx(1e-5 / 200)
    assert rates[199] == pytest.approx(1e-5)
    assert rates[1100] == pytest.approx(0.5e-5 * (1 + math.cos(math.pi * 900 / 1800)))
    assert rates[-1] < 1e-10
    assert optimizer["lr_scheduler"]["interval"] == "step"


def test_weights_start_the_encoder_and_leave_the_head():
    edited = {name: value * 1.5 for name, value in ClipClassifier().state_dict().items()}
    save_weights(edited, "edited.safetensors")
    model = with_head(ClipClassifier(weights="edited.safetensors"), task())
    assert fingerprint(model.state_dict()) == fingerprint(edited)
    assert torch.equal(model.head, with_head(ClipClassifier(), task()).head)


def test_a_local_config_with_local_weights():
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    Path("small.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path("small.json"))
    torch.save(open_clip.create_model("small").state_dict(), "small.pt")
    model = with_head(ClipClassifier("small.json", "small.pt"), task())
    assert model.head.shape == (3, 8)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match="needs weights: pass pretrained="):
        ClipClassifier("small.json")
    with pytest.raises(ValueError, match="could not be loaded"):
        ClipClassifier("small.json", "no-such-tag")


# --- mistakes


def test_unknown_or_untrained_models_are_refused():
    with pytest.raises(ValueError, match=r"no architecture 'ViT-Z-99'.*tva-tiny"):
        ClipClassifier("ViT-Z-99")
    with pytest.raises(ValueError, match=r"ViT-B-32-quickgelu needs weights.*openai"):
        ClipClassifier("ViT-B-32-quickgelu")
    with pytest.raises(FileNotFoundError, match="model config was expected"):
        ClipClassifier("none.json")
    Path("odd.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks embed_dim, vision_cfg, text_cfg"):
        ClipClassifier("odd.json")


def test_data_modules_must_name_their_classes_and_templates_must_have_a_place():
    with pytest.raises(TypeError, match="SimpleNamespace has none"):
        with_head(ClipClassifier(), SimpleNamespace())
    with pytest.raises(ValueError, match=r"must hold {}.*'a picture'"):
        with_head(ClipClassifier(), SimpleNamespace(class_names=NAMES, templates=["a picture"]))


# --- trained for real, a little


@pytest.mark.slow
def test_fine_tuning_beats_zero_shot_on_real_handwriting():
    model, data = ClipClassifier(learning_rate=5e-4, warmup_steps=5), ImageTask("builtin:digits")
    trainer = quiet_trainer(max_steps=40)
    (before,) = trainer.test(model, data, verbose=False)
    trainer.fit(model, data)
    (after,) = trainer.test(model, data, verbose=False)
    assert after["test/digits/accuracy"] > before["test/digits/accuracy"] + 0.15
    assert before["test/digits/accuracy"] > 0.3  # chance is 0.1


@pytest.mark.parametrize(("monitor", "expected"), [(None, [0, 2, 5, 7]), ("train/digits/loss", list(range(8)))])
def test_training_metrics_are_logged_only_when_something_reads_them(monitor, expected):
    told = []

    class Noted(ClipClassifier):
        def log(self, name, *args, **options):
            if name == "train/digits/loss":
                told.append(self.trainer.global_step)
            super().log(name, *args, **options)

    checkpoint = ModelCheckpoint(dirpath=".", monitor=monitor, every_n_train_steps=4)
    trainer = quiet_trainer(checkpoint, max_epochs=1, log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(Noted(), datamodule=ImageTask("builtin:digits", batch_size=8, limit_train=64))
    assert told == expected
    assert "train/digits/loss" in trainer.callback_metrics
