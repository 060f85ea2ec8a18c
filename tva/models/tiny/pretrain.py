"""Pre-train ``tva-tiny`` from nothing: ``python -m tva.models.tiny.pretrain --output DIR``.

A CLIP learns which caption belongs to which picture. Here pictures are drawn from the marks of ``tva.data.builtin`` in
the plain look, and captions name them. A batch holds every noun exactly once, so that no caption of a batch fits
another picture of it.
"""

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP, ClipLoss
from open_clip.tokenizer import bytes_to_unicode
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from tva.data.builtin import BUILTIN_SETS, MARKS, load_builtin
from tva.data.drawing import COLORS, PLAIN, draw
from tva.models.tiny import WEIGHTS, create, load, pack

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 0, "width": 64, "heads": 2, "layers": 2},
}
NOUNS = {
    BUILTIN_SETS[name].templates[0].removeprefix("a ").format(class_name): mark
    for name, marks in MARKS.items()
    for class_name, mark in marks.items()
}
TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")
COLOR_TEMPLATES = tuple(template.replace("{}", "{} {}") for template in TEMPLATES)
LOOKS = {"": PLAIN, "outlined ": replace(PLAIN, outline=True)}
OUTLINED_SHARE = 0.2  # of the pictures


def merges(words: set[str]) -> list[tuple[str, str]]:
    """Train byte-pair encoding on words until each of them is a single token.

    Args:
        words: Lower-case words of letters a to z.

    Returns:
        The pairs to join, in the order in which they are joined, in the notation of open_clip's ``SimpleTokenizer``.
    """
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in sorted(words)}
    found = []
    while counts := Counter(pair for parts in pieces.values() for pair in pairwise(parts)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        found.append(best)
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return found


def write_architecture(folder: Path) -> None:
    """Write the vocabulary and the model's configuration that fits it."""
    texts = [*NOUNS, *TEMPLATES, *COLORS, *LOOKS]
    words = {word for text in texts for word in text.lower().replace("{}", "").split()}
    pairs = merges(words)
    # No newline at the end: SimpleTokenizer would read an empty last line as one more token.
    text = "\n".join(["#version: tva-tiny", *(" ".join(pair) for pair in pairs)])
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    vocab_size = 2 * len(bytes_to_unicode()) + len(pairs) + 2  # bytes, bytes that end a word, merges, start and end
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": vocab_size}}
    (folder / "tva-tiny.json").write_text(json.dumps(config, indent=4) + "\n")


def draw_pool(num_pictures: int, rng: np.random.Generator) -> tuple[Tensor, list[list[list[str]]]]:
    """Draw the pre-training pictures and write their captions.

    Args:
        num_pictures: Number of pictures of each noun.
        rng: Source of all randomness.

    Returns:
        Pictures, uint8 of shape (nouns, num_pictures, 3, 32, 32), and for each of them the captions that fit.
    """
    pictures, captions = [], []
    for noun, mark in tqdm(NOUNS.items(), desc="drawing", disable=None):
        captions.append([])
        for _ in range(num_pictures):
            style = "outlined " if rng.random() < OUTLINED_SHARE and "texture" not in noun else ""
            picture, color = draw(mark, LOOKS[style], rng)
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
            captions[-1].append(
                [template.format(noun) for template in TEMPLATES]
                + [template.format(style + color, noun) for template in COLOR_TEMPLATES]
            )
    return torch.stack(pictures).unflatten(0, (len(NOUNS), num_pictures)), captions


def pretrain(folder: Path, steps: int, num_pictures: int, seed: int) -> None:
    """Train the model and write it to a folder, with its vocabulary and configuration.

    Args:
        folder: Existing folder to write to.
        steps: Number of batches; each holds one picture of every noun.
        num_pictures: Number of pictures drawn of each noun.
        seed: Seed of the pictures, the batches and the initial weights.
    """
    write_architecture(folder)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, preprocess, tokenizer = create(folder)
    normalize = preprocess.transforms[-1]
    pictures, captions = draw_pool(num_pictures, rng)
    token_ids = {text: tokenizer(text)[0] for noun in captions for texts in noun for text in texts}

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.05)
    loss_function = ClipLoss()
    progress = tqdm(range(steps), desc="training", disable=None)
    for _ in progress:
        choice = rng.integers(num_pictures, size=len(NOUNS))
        images = normalize(pictures[torch.arange(len(NOUNS)), torch.from_numpy(choice)].float() / 255)
        texts = [captions[noun][i][rng.integers(len(captions[noun][i]))] for noun, i in enumerate(choice)]
        image_features, text_features, logit_scale = model(images, torch.stack([token_ids[text] for text in texts]))
        loss = loss_function(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))  # as CLIP does
        progress.set_postfix(loss=f"{loss.item():.3f}")
    state = {name: parameter.half().contiguous() for name, parameter in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(pack(save(state)))


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, preprocess: Callable, tokenizer: Callable, name: str) -> float:
    """Return the accuracy on the test split of a built-in set, in [0, 1]."""
    test = load_builtin(name)["test"]
    prompts = [[t.format(c) for t in BUILTIN_SETS[name].templates] for c in test.features["label"].names]
    head = torch.stack([model.encode_text(tokenizer(texts), normalize=True).mean(0) for texts in prompts])
    images = torch.stack([preprocess(image) for image in test["image"]])
    logits = model.encode_image(images, normalize=True) @ functional.normalize(head, dim=-1).T  # (images, classes)
    return (logits.argmax(1) == torch.tensor(test["label"])).float().mean().item()


def main() -> None:
    """Read the command line, pre-train, and print the zero-shot accuracies of the model read back from its file."""
    parser = argparse.ArgumentParser(prog="python -m tva.models.tiny.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; made if missing")
    parser.add_argument("--steps", type=int, default=9000, help="number of batches")
    parser.add_argument("--pictures", type=int, default=1000, help="number of pictures drawn of each noun")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, batches and initial weights")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pretrain(args.output, args.steps, args.pictures, args.seed)
    model = load(args.output)
    for name in BUILTIN_SETS:
        print(f"{name:10} zero-shot accuracy {zero_shot_accuracy(*model, name):.3f}")


if __name__ == "__main__":
    main()
