"""Finished edits of tiny models in folders of their own, as `tva edit` leaves them: of texts, prompts and images."""

import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from small_text import write_classifier, write_model, write_reviews, write_running_text

from tva import open_weights, save_weights
from tva.cli.main import main


def moved(folder, by=0.1):
    """Copy a model's folder and move its weights at random."""
    other = Path(f"{folder}-moved")
    shutil.copytree(folder, other)
    generator = torch.Generator().manual_seed(0)
    weights = dict(open_weights(folder))
    save_weights(
        {name: tensor + by * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    return str(other)


def named(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def edit(folder, model, vector, tasks, **options):
    """Run `tva edit` at a given coefficient; return the folder of the run."""
    config = {
        "trainer": {"accelerator": "cpu"},
        "model": model,
        "vectors": {"v": vector},
        "recipe": "v",
        "scaling_coef": 0.5,
        "targets": tasks,
        "output": str(folder / "out"),
        **options,
    }
    (folder / "edit.yaml").write_text(yaml.safe_dump(config))
    main(["edit", "--config", str(folder / "edit.yaml")])
    return folder / "out"


def text_run(folder):
    """An encoder of texts, under two heads of class descriptions."""
    name = write_model(folder / "bert", "bert")
    path = write_reviews(folder)
    described = {"reviews": {"negative": "bad", "positive": "good"}, "things": {"negative": "food", "positive": "film"}}
    tasks = {
        task: named("tva.data.TextTask", path=path, name=task, class_descriptions=texts)
        for task, texts in described.items()
    }
    return edit(folder, named("tva.models.TextClassifier", name=name), moved(name), tasks)


def classifier_run(folder, **options):
    """A network of transformers with its own head of classes."""
    name = write_classifier(folder / "classifier")
    task = named("tva.data.TableTask", path=write_reviews(folder), text_column="text", label_column="label")
    return edit(folder, named("tva.models.TransformersModel", path=name), moved(name), {"reviews": task}, **options)


def language_run(folder):
    """A causal language model."""
    name = write_model(folder / "lm", "causal")
    task = named("tva.data.LanguageTask", path=write_running_text(folder, 60), block_length=16)
    return edit(folder, named("tva.models.CausalLM", name=name), moved(name, 0.3), {"prose": task})


def image_run(folder):
    """A network of transformers with its own head of classes, of images in files."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "dark", 1: "bright"}, "label2id": {"dark": 0, "bright": 1}}
    config = transformers.ViTConfig(image_size=8, patch_size=4, initializer_range=0.5, **labels, **sizes)
    name = folder / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(name)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(name)
    random, rows = np.random.default_rng(0), ["image,label,split"]
    for row in range(24):
        pixels = random.integers(0, 128, (8, 8, 3)) + 127 * (row % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{row}.png")
        rows.append(f"{row}.png,{('dark', 'bright')[row % 2]},{('train', 'val', 'test')[row // 2 % 3]}")
    (folder / "images.csv").write_text("\n".join(rows))
    task = named(
        "tva.data.TableTask",
        path=str(folder / "images.csv"),
        image_column="image",
        label_column="label",
        split_column="split",
    )
    return edit(folder, named("tva.models.TransformersModel", path=str(name)), moved(name), {"images": task})
