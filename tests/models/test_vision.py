"""Tests of VisionClassifier: small timm networks with random weights in local files, and one run on real data."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from small_models import quiet_trainer
from small_networks import SIZE, write_images, write_network
from torch.nn import functional as F

from tva import open_weights
from tva.checkpoints import save_weights
from tva.data import ImageTask
from tva.evaluation.evaluate import evaluate
from tva.models import VisionClassifier
from tva.models.vision import load_encoder


@pytest.fixture(autouse=True)
def own_heads(monkeypatch):
    monkeypatch.setenv("TVA_CACHE", "cache")


@pytest.fixture
def network():
    return write_network(Path())


@pytest.fixture
def task():
    path = write_images(Path(), [0, 1, 2] * 10)
    return lambda **options: ImageTask(path, class_names=["red", "green", "blue"], batch_size=8, **options)


def make_model(network: str, **options) -> VisionClassifier:
    options = {"learning_rate": 1e-2, "warmup_steps": 0} | options
    return VisionClassifier("test_efficientnet", network, image_size=SIZE, **options)


def statistics_of(model: VisionClassifier) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "running_" in name or "tracked" in name}


def reference_head(network: str, task: ImageTask) -> torch.Tensor:
    """Class means in float64, from the network with its BatchNorm in place."""
    encoder = load_encoder("test_efficientnet", network, SIZE, "freeze")[0].double()
    images, labels = (torch.cat(parts) for parts in zip(*task.prototype_dataloader(), strict=True))
    with torch.no_grad():
        features = F.normalize(encoder(images.double()), dim=-1)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(3)])
    return 20 * F.normalize(means, dim=-1)


# --- folding


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "resnet10t"])
def test_folding_changes_no_feature_and_leaves_no_statistics(name):
    path = write_network(Path(), name)
    folded, _ = load_encoder(name, path, 64, "fold")
    kept, _ = load_encoder(name, path, 64, "freeze")
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), kept(images), rtol=1e-4, atol=1e-4)
    assert any("running_mean" in key for key in kept.state_dict())
    assert not any("running" in key or "tracked" in key for key in folded.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in folded.state_dict().values())


def test_a_network_without_batch_norm_stays_as_it_is_when_folded():
    path = write_network(Path(), "test_vit")
    folded, kept = (load_encoder("test_vit", path, None, rule)[0].state_dict() for rule in ("fold", "train"))
    assert all(torch.equal(folded[name], kept[name]) for name in kept)


def test_batch_norm_that_no_convolution_feeds_is_not_folded():
    path = write_network(Path(), "densenet121")  # BatchNorm comes first there
    with pytest.raises(ValueError, match=r"convolution right before every BatchNorm.*Use batch_norm='freeze'"):
        load_encoder("densenet121", path, SIZE, "fold")


# --- statistics in training


@pytest.mark.parametrize("batch_norm", ["freeze", "train"])
def test_statistics_stay_the_bases_when_frozen_and_move_when_trained(network, task, batch_norm):
    model = make_model(network, batch_norm=batch_norm)
    before, weights = statistics_of(model), model.encoder.conv_stem.weight.detach().clone()
    # a validation in the middle of the epoch must not set them in motion
    quiet_trainer(max_steps=3, val_check_interval=1).fit(model, datamodule=task())
    after = statistics_of(model)
    assert not torch.equal(model.encoder.conv_stem.weight, weights)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ([] if batch_norm == "freeze" else list(before))


def test_frozen_statistics_can_be_estimated_again(network, task):
    model = make_model(network, batch_norm="freeze")
    data = task()
    quiet_trainer(max_steps=1).fit(model, datamodule=data)
    before = statistics_of(model)
    torch.optim.swa_utils.update_bn((images for images, _ in data.train_dataloader()), model)
    after = statistics_of(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


# --- the head


@pytest.mark.parametrize("batch_norm", ["fold", "freeze", "train"])
def test_the_head_is_the_normalized_class_means_of_the_base(network, task, batch_norm):
    model, data = make_model(network, batch_norm=batch_norm), task()
    evaluate(quiet_trainer(), model, data, "val")
    torch.testing.assert_close(model.head.double(), reference_head(network, data), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head.norm(dim=-1), torch.full((3,), 20.0))


@pytest.mark.parametrize("cached", [False, True])
def test_the_head_does_not_depend_on_the_present_weights(network, task, cached, monkeypatch):
    trainer, data = quiet_trainer(), task()
    fresh = make_model(network)
    evaluate(trainer, fresh, data, "val")
    edited = make_model(network)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.mul_(-3)
    if not cached:
        monkeypatch.setenv("TVA_CACHE", "empty")
    evaluate(trainer, edited, task(), "val")
    assert torch.equal(edited.head, fresh.head)
    assert not any(name.startswith("head") for name in edited.state_dict())


def test_training_is_the_same_whether_the_head_was_cached_or_not(network, task, monkeypatch):
    monkeypatch.setenv("TVA_CACHE", "empty")
    ends = []
    for _ in ("built", "cached"):
        L.seed_everything(0)
        model = make_model(network)
        quiet_trainer(max_steps=2, num_sanity_val_steps=0).fit(model, datamodule=task())
        ends.append(model.encoder.conv_stem.weight.detach())
    assert torch.equal(*ends)


def test_the_heads_key_follows_base_images_size_labels_and_names(network, task):
    def key(model: VisionClassifier, data: ImageTask) -> str:
        evaluate(quiet_trainer(), model, data, "val")
        return json.dumps(model.head_key(data))

    first = key(make_model(network), task())
    assert key(make_model(network), task()) == first
    others = [
        key(make_model(network, batch_norm="train"), task()),
        key(VisionClassifier("test_efficientnet", network, image_size=48), task()),
        key(make_model(network, logit_scale=10), task()),
        key(make_model(network), task(limit_train=20)),
        key(make_model(network), task(seed=1)),
    ]
    data = task()
    data.class_names = ["rot", "green", "blue"]
    others.append(key(make_model(network), data))
    write_images(Path(), [1, 2, 0] * 10)  # the same file, other labels and images
    others.append(key(make_model(network), task()))
    assert len({first, *others}) == 1 + len(others)


def test_the_order_of_the_examples_does_not_change_the_heads_key(network, task):
    class Shuffled(L.LightningDataModule):  # has no prototype_dataloader, so that the head is made of shuffled batches
        class_names = ("red", "green", "blue")

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def setup(self, stage=None):
            self.inner.trainer = self.trainer
            self.inner.setup(stage)

        def train_dataloader(self):
            return self.inner.train_dataloader()

        def val_dataloader(self):
            return self.inner.val_dataloader()

    keys = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, data = make_model(network), Shuffled(task())
        evaluate(quiet_trainer(), model, data, "val")
        keys.append(model.head_key(data))
    assert keys[0] == keys[1]


def test_a_class_without_examples_is_named(network, task):
    data = task(where={"label": ["red", "blue"]})
    with pytest.raises(ValueError, match=r"colors: .*each of the 3 classes.*'green'.*prototype_where"):
        evaluate(quiet_trainer(), make_model(network), data, "val")
    data = task(where={"label": ["red", "blue"]}, prototype_where={})
    assert evaluate(quiet_trainer(), make_model(network), data, "val").num_examples == 2


def test_a_base_that_changed_on_disk_is_refused(network, task):
    model = make_model(network)
    save_weights({name: tensor + 1 for name, tensor in open_weights(network).items()}, network)
    with pytest.raises(ValueError, match=r"needs the base .* now holds"):
        evaluate(quiet_trainer(), model, task(), "val")


# --- weights and errors


def test_edited_weights_are_loaded_and_the_file_may_stand_in_an_environment_variable(network, monkeypatch):
    monkeypatch.setenv("NETWORKS", str(Path(network).parent))
    model = make_model("$NETWORKS/test_efficientnet.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save_weights(model.state_dict(), "edited.safetensors")
    again = make_model(network, weights="edited.safetensors")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_images_are_scaled_whole_to_minus_one_and_one(network):
    from PIL import Image

    transform = make_model(network).image_transform
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, -1] = 255  # a border that cropping would lose
    config = timm.data.resolve_model_data_config(timm.create_model("test_efficientnet"))
    out = transform(Image.fromarray(image))  # (3, height, width)
    assert out.shape == (3, SIZE, SIZE)
    low, high = (((v - torch.tensor(config["mean"])) / torch.tensor(config["std"])) for v in (0.0, 1.0))
    torch.testing.assert_close(out[:, 8, 0], low, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out[:, 8, -1], high, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("pretrained", [None, False, ""])
def test_a_network_without_weights_is_refused(pretrained):
    with pytest.raises(ValueError, match=r"test_efficientnet needs weights.*Pass pretrained="):
        VisionClassifier("test_efficientnet", pretrained)


def test_an_unknown_network_is_refused_with_those_that_are_near():
    with pytest.raises(ValueError, match=r"has no network 'tf_eficientnet_lite0'.*'tf_efficientnet_lite0'"):
        VisionClassifier("tf_eficientnet_lite0", "x.safetensors")


def test_timms_own_weights_that_cannot_be_had_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"could not make test_efficientnet.* Pass pretrained= a local file"):
        VisionClassifier("test_efficientnet", pretrained=True)


def test_a_file_of_another_network_is_refused():
    path = write_network(Path(), "test_resnet")
    with pytest.raises(ValueError, match=r"network test_efficientnet and the file .*test_resnet.* lacks"):
        VisionClassifier("test_efficientnet", path)


def test_a_missing_file_is_an_error_that_names_it():
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        VisionClassifier("test_efficientnet", "nothing.safetensors")


def test_a_fixed_image_size_is_kept():
    path = write_network(Path(), "test_vit")
    with pytest.raises(ValueError, match=r"test_vit takes images of 160 pixels only, not 64"):
        VisionClassifier("test_vit", path, image_size=64)
