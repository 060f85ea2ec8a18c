"""The networks and tasks that `benchmarks.methods` merges: a base, vectors of its last layers, accuracies of an edit.

Layers below those that are fine-tuned are the same in every candidate, so that their outputs are computed once, for all
seeds; all that is trained, merged and evaluated is the network above them. A seed decides the order of training and
which examples are held out; the test examples are the same in every seed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tva import TaskVector, save_weights
from tva.merge.model_statistics import measure_information

NUM_INFORMATION = 100  # training examples for the statistics files
SCALE = 20.0  # of logits of unit vectors


class Examples(NamedTuple):
    """Inputs of the layers that are fine-tuned, with labels.

    Attributes:
        inputs: Shape (examples, ...); of texts (examples, tokens, features).
        labels: Shape (examples,).
        lengths: Tokens of each text, shape (examples,); None for images.
    """

    inputs: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def take(self, chosen: Tensor) -> Examples:
        """Return some examples; texts without the padding that all of these have."""
        inputs, labels = self.inputs[chosen], self.labels[chosen]
        if self.lengths is None:
            return Examples(inputs, labels)
        lengths = self.lengths[chosen]
        return Examples(inputs[:, : int(lengths.max())], labels, lengths)


class Model(ABC):
    """A base, its tasks, and what is kept of them under one folder.

    Args:
        data: Folder with ``images``, ``text``, ``models`` or ``unpack.py``; empty for what ships with tva.
        output: Where everything is kept.
        num_tasks: How many of the tasks are merged.
    """

    name: str
    title: str  # of a column
    all_tasks: tuple[str, ...]
    num_train, num_val, num_test = 600, 80, 250
    epochs, rate, batch = 2, 1e-4, 32
    matrix = ""  # option of methods on matrices
    timed = False  # whether the time and memory of merges are measured
    no_gram = ""  # option of regmean, whose other matrices are averaged

    def __init__(self, data: str, output: Path, num_tasks: int) -> None:
        self.data, self.output, self.tasks = Path(data), output / self.name, self.all_tasks[:num_tasks]

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the base, and return the layers that are fine-tuned."""

    @abstractmethod
    def prepare(self, task: str) -> tuple[dict[str, Examples], Tensor]:
        """Return the examples of a task, ``train`` and ``test``, and the frozen head (classes, features)."""

    @abstractmethod
    def features(self, examples: Examples) -> Tensor:
        """Return what the head classifies, shape (examples, features), with the module as it is."""

    # --- what all models share

    def open(self, seed: int) -> None:
        """Load the base and the examples, fine-tune on every task whose vector is not there, and read the vectors."""
        self.module = self.load().eval().requires_grad_(True)
        self.base = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.heads, self.train = {}, {}
        self.whole: dict[tuple[str, str], Examples] = {}
        self.batches: dict[tuple[str, str], list[Examples]] = {}
        for task in self.tasks:
            found, self.heads[task] = self._prepared(task)
            order = torch.randperm(len(found["train"].labels), generator=torch.Generator().manual_seed(seed))
            val, train = order[: self.num_val], order[self.num_val :]
            self.train[task] = found["train"].take(train)
            for split, examples in (("val", found["train"].take(val)), ("test", found["test"])):
                self.whole[task, split], self.batches[task, split] = examples, _by_length(examples)
        self.folder = self.output / f"seed={seed}"
        self.vectors = {task: self._fit(task, seed) for task in self.tasks}
        self.weights = dict(self.module.state_dict(keep_vars=False))

    def _prepared(self, task: str) -> tuple[dict[str, Examples], Tensor]:
        path = self.output / "inputs" / f"{task}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                examples, head = self.prepare(task)
            torch.save(({split: tuple(found) for split, found in examples.items()}, head), path)
        examples, head = torch.load(path)
        return {split: Examples(*found) for split, found in examples.items()}, head

    def _fit(self, task: str, seed: int) -> TaskVector:
        path = self.folder / f"{task}.tv.safetensors"
        if not path.exists():
            started = time.monotonic()
            torch.manual_seed(seed)
            self.module.load_state_dict(self.base)
            examples = self.train[task]
            steps = self.epochs * -(-len(examples.labels) // self.batch)
            optimizer = torch.optim.AdamW(self.module.parameters(), lr=self.rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(examples.labels)).split(self.batch):
                    optimizer.zero_grad()
                    self.loss(task, examples.take(chosen)).backward()
                    nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
            self.module.zero_grad()
            path.parent.mkdir(parents=True, exist_ok=True)
            TaskVector.between(self.base, self.module.state_dict()).save(path)
            print(f"{self.name} {seed}: {task} fine-tuned, {time.monotonic() - started:.1f} s", flush=True)
        return TaskVector.load(path)

    def logits(self, task: str, examples: Examples) -> Tensor:
        """Classify examples of a task with the module as it is."""
        return self.features(examples) @ self.heads[task].T

    def loss(self, task: str, examples: Examples) -> Tensor:
        """Return the mean cross-entropy of examples of a task."""
        return F.cross_entropy(self.logits(task, examples), examples.labels)

    @torch.inference_mode()
    def right(self, vector: TaskVector, coef: float, task: str, split: str) -> int:
        """Count the examples of a split that an edit classifies rightly."""
        self.module.load_state_dict(self.base)
        vector.write_into(self.weights, self.base, coef)
        return sum(int((self.logits(task, e).argmax(dim=-1) == e.labels).sum()) for e in self.batches[task, split])

    def count(self, task: str, split: str) -> int:
        """Count the examples of a split."""
        return sum(len(examples.labels) for examples in self.batches[task, split])

    def information(self, kind: str) -> tuple[str, ...]:
        """Return the statistics files of all tasks, in their order, made where they are missing."""
        paths = []
        for task in self.tasks:
            path = self.folder / f"{task}.{kind}.safetensors"
            if not path.exists():
                self.module.load_state_dict(self.base)
                self.vectors[task].write_into(self.weights, self.base, 1.0)
                few = min(NUM_INFORMATION, len(self.train[task].labels))
                found = measure_information(
                    self.module,
                    (self.train[task].take(torch.tensor([place])) for place in range(few)),
                    lambda examples, task=task: self.loss(task, examples),
                    few,
                    conv=bool(self.matrix),
                )
                save_weights(found.fisher, self.folder / f"{task}.fisher.safetensors")
                save_weights(found.grams, self.folder / f"{task}.gram.safetensors")
            paths.append(str(path))
        return tuple(paths)

    def chosen(self, num_train: int, num_test: int) -> tuple[list[int], list[int]]:
        """Draw the places of the examples that are used, the same for every seed."""
        draw = torch.Generator().manual_seed(0)
        used = torch.randperm(num_train, generator=draw)[: self.num_train + self.num_val]
        return used.tolist(), torch.randperm(num_test, generator=draw)[: self.num_test].tolist()


def _by_length(examples: Examples, size: int = 50) -> list[Examples]:
    """Return batches; texts of like length together, for less padding."""
    places = torch.arange(len(examples.labels)) if examples.lengths is None else examples.lengths.argsort(stable=True)
    return [examples.take(chosen) for chosen in places.split(size)]


# --- images, under class means of the base's features


class _Images(Model):
    transform: Any

    @abstractmethod
    def below(self, images: Tensor) -> Tensor:
        """Compute the inputs of the layers that are fine-tuned."""

    def features(self, examples: Examples) -> Tensor:
        return F.normalize(self.module(examples.inputs), dim=-1)

    def prepare(self, task: str) -> tuple[dict[str, Examples], Tensor]:
        tables = self.tables(task)
        places = self.chosen(len(tables["train"]), len(tables["test"]))
        found = {}
        for split, rows in zip(("train", "test"), places, strict=True):
            table = tables[split].select(rows)
            images = torch.stack([self.transform(image.convert("RGB")) for image in table["image"]])
            inputs = torch.cat([self.below(images) for images in images.split(50)])
            found[split] = Examples(inputs, torch.tensor(list(table["label"])))
        self.module.load_state_dict(self.base)
        features, labels = self.features(found["train"]), found["train"].labels
        sums = torch.zeros(int(labels.max()) + 1, features.shape[1], dtype=torch.float64)
        return found, F.normalize(sums.index_add_(0, labels, features.double()), dim=-1).float() * SCALE

    def tables(self, task: str) -> Mapping[str, Any]:
        """Return the data of a task, a Hugging Face data set a split."""
        import datasets

        signs = task.startswith("gtsrb")
        file = str(self.data / "images" / ("gtsrb" if signs else task))
        found = datasets.load_dataset("parquet", data_files={s: f"{file}-{s}.parquet" for s in ("train", "test")})
        if not signs:
            return found
        # The ten most frequent of the 43 traffic signs, or all others, numbered anew.
        ten = (1, 2, 3, 4, 5, 11, 12, 13, 25, 38)
        kept = ten if task == "gtsrb10" else tuple(label for label in range(43) if label not in ten)
        chosen = found.filter(lambda label: label in kept, input_columns="label")
        for split in chosen:
            labels = [kept.index(label) for label in chosen[split]["label"]]
            chosen[split] = chosen[split].remove_columns("label").add_column("label", labels)
        return chosen


class Tiny(_Images):
    """The CLIP that ships with tva, all of its image encoder."""

    name, title = "tiny", "tva-tiny"
    all_tasks = ("digits", "letters", "shapes", "textures", "mnist", "gtsrb10", "rsscn7", "cifar10")
    num_val, num_test, rate = 200, 400, 6e-4
    no_gram = ', exclude="embed|attn|^proj$"'  # nn.MultiheadAttention does not call its layers

    def load(self) -> nn.Module:
        from tva.models import ClipClassifier

        model = ClipClassifier()
        self.transform = model.image_transform
        return model.encoder

    def below(self, images: Tensor) -> Tensor:
        return images

    def tables(self, task: str) -> Mapping[str, Any]:
        from tva.data.builtin import load_builtin

        return super().tables(task) if task in Images.all_tasks else load_builtin(task)


class Images(_Images):
    """EfficientNet-Lite0 with BatchNorm folded, 64 pixels; its last three stages."""

    name, title = "images", "EfficientNet-Lite0"
    all_tasks = ("mnist", "gtsrb10", "rsscn7", "cifar10", "usps", "dtd10", "pacs", "gtsrb33")
    epochs, rate = 3, 2e-4
    matrix = ', conv="matrix"'  # most of its weights are convolutions of 1 × 1
    no_gram = ', exclude="conv_dw"'

    def load(self) -> nn.Module:
        from tva.models.vision import load_encoder

        weights = unpacked(self.data, self.output.parent) / "efficientnet-lite0.safetensors"
        encoder, self.transform = load_encoder("tf_efficientnet_lite0", str(weights), 64, "fold")
        self.lower = nn.Sequential(encoder.conv_stem, encoder.bn1, *encoder.blocks[:4])
        upper = nn.Module()
        upper.blocks, upper.conv_head, upper.bn2 = encoder.blocks[4:], encoder.conv_head, encoder.bn2
        upper.global_pool = encoder.global_pool
        upper.forward = lambda x: upper.global_pool(upper.bn2(upper.conv_head(upper.blocks(x))))
        probe = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(upper(self.lower(probe)), encoder(probe))
        return upper

    def below(self, images: Tensor) -> Tensor:
        return self.lower(images)


def unpacked(data: Path, output: Path) -> Path:
    """Return the folder of models, unpacked under the output folder."""
    folder = output / "models"
    if not folder.exists():
        subprocess.run([sys.executable, str(data / "unpack.py"), str(folder)], check=True)
    return folder


# --- texts


class _Texts(Model):
    all_tasks = (
        "sentence_polarity",
        "ag_news",
        "subjectivity",
        "trec6",
        "sms_spam",
        "toxicity",
        "reviews_kitchen",
        "sentiment_yelp",
    )
    max_length = 32
    tokenizer: Any

    @abstractmethod
    def tokens(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""

    @abstractmethod
    def below(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Compute the inputs of the layers that are fine-tuned."""

    @abstractmethod
    def head(self, task: str, names: Sequence[str]) -> Tensor:
        """Make the frozen head of a task."""

    def prepare(self, task: str) -> tuple[dict[str, Examples], Tensor]:
        import datasets

        file = str(self.data / "text" / task)
        tables = datasets.load_dataset("parquet", data_files={s: f"{file}-{s}.parquet" for s in ("train", "test")})
        places = self.chosen(len(tables["train"]), len(tables["test"]))
        found = {}
        for split, rows in zip(("train", "test"), places, strict=True):
            table = tables[split].select(rows)
            found[split] = self.encoded(self.tokens(task, list(table["text"])), torch.tensor(list(table["label"])))
        return found, self.head(task, tables["train"].features["label"].names)

    def encoded(self, tokens: Sequence[Sequence[int]], labels: Tensor) -> Examples:
        """Run the layers below over texts."""
        lengths = torch.tensor([len(ids) for ids in tokens])
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
        inputs: Tensor | None = None
        for chosen in lengths.argsort(stable=True).split(25):
            longest = int(lengths[chosen].max())
            made = self.below(ids[chosen, :longest], lengths[chosen])
            inputs = torch.zeros(*ids.shape, made.shape[-1]) if inputs is None else inputs
            inputs[chosen, :longest] = made
        assert inputs is not None
        return Examples(inputs, labels, lengths)


def _within(length: int, lengths: Tensor) -> Tensor:
    """Return which places are tokens rather than padding, shape (examples, length)."""
    return torch.arange(length) < lengths[:, None]


class Texts(_Texts):
    """MiniLM with mean pooling, its last two of six layers, under the base's embeddings of class descriptions."""

    name, title = "texts", "MiniLM"
    num_train, num_test = 400, 250
    batch, rate = 16, 2e-4
    descriptions: Mapping[str, Sequence[str]] = {
        "sentence_polarity": ("a negative movie review", "a positive movie review"),
        "ag_news": (
            "news about world politics",
            "news about sports",
            "news about business and the economy",
            "news about science and technology",
        ),
        "subjectivity": ("the plot summary of a movie", "a critic's opinion of a movie"),
        "trec6": (
            "a question about an abbreviation",
            "a question about a thing, an animal or a product",
            "a question about a definition, a reason or a description",
            "a question about a person or a group of people",
            "a question about a place, a city or a country",
            "a question about a number, a date or an amount",
        ),
        "sms_spam": ("a personal message to a friend", "an advertisement or a prize to claim"),
        "toxicity": ("hatred of a group of people", "rude and insulting language", "an ordinary and harmless message"),
        "reviews_kitchen": ("a disappointed customer's review of a product", "a happy customer's review of a product"),
        "sentiment_yelp": ("a disappointed guest's review", "a happy guest's review"),
    }

    def load(self) -> nn.Module:
        from transformers import AutoTokenizer, BertModel

        folder = unpacked(self.data, self.output.parent) / "minilm-l6"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.full = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        upper = nn.Module()
        upper.layer = self.full.encoder.layer[4:]
        return upper

    def tokens(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def below(self, ids: Tensor, lengths: Tensor) -> Tensor:
        hidden, mask = self.full.embeddings(input_ids=ids), _additive(ids.shape[1], lengths)
        for layer in self.full.encoder.layer[:4]:
            hidden = layer(hidden, mask)
        return hidden

    def features(self, examples: Examples) -> Tensor:
        hidden, length = examples.inputs, examples.inputs.shape[1]
        mask = _additive(length, examples.lengths)
        for layer in self.module.layer:
            hidden = layer(hidden, mask)
        kept = _within(length, examples.lengths)[..., None].float()
        return F.normalize((hidden * kept).sum(dim=1), dim=-1)  # the mean's direction

    def head(self, task: str, names: Sequence[str]) -> Tensor:
        self.module.load_state_dict(self.base)
        tokens = self.tokens(task, self.descriptions[task])
        examples = self.encoded(tokens, torch.zeros(len(tokens), dtype=torch.long))
        padded = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        whole = self.full(**padded).last_hidden_state * padded["attention_mask"][..., None]
        features = self.features(examples)
        torch.testing.assert_close(features, F.normalize(whole.sum(dim=1), dim=-1))  # the layers below are the base's
        return features * SCALE


def _additive(length: int, lengths: Tensor) -> Tensor:
    """Return what is added to attention's scores, shape (examples, 1, 1, length)."""
    return torch.where(_within(length, lengths), 0.0, torch.finfo(torch.float32).min)[:, None, None]


class LM(_Texts):
    """SmolLM2-135M, its last two of thirty layers; the next token of a prompt, of the label words only."""

    name, title = "lm", "SmolLM2"
    num_train, num_val, num_test = 240, 60, 200
    epochs, batch, rate, timed = 3, 16, 2e-4, True
    prompts: Mapping[str, tuple[str, Sequence[str]]] = {
        "sentence_polarity": ("sentiment", ("negative", "positive")),
        "ag_news": ("kind of news", ("world", "sports", "business", "science")),
        "subjectivity": ("kind of text", ("plot", "opinion")),
        "trec6": ("kind of answer", ("abbreviation", "thing", "description", "person", "place", "number")),
        "sms_spam": ("kind of message", ("private", "spam")),
        "toxicity": ("kind of language", ("hate", "offensive", "ordinary")),
        "reviews_kitchen": ("sentiment", ("negative", "positive")),
        "sentiment_yelp": ("sentiment", ("negative", "positive")),
    }

    def load(self) -> nn.Module:
        from transformers import AutoTokenizer, LlamaForCausalLM

        folder = self.data / "models" / "smollm2-135m"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.full = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        upper = nn.Module()
        upper.layers, upper.norm = self.full.model.layers[-2:], self.full.model.norm
        return upper

    def tokens(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        asked = self.tokenizer(f"\n{self.prompts[task][0]}:")["input_ids"]
        found = self.tokenizer(list(texts), truncation=True, max_length=self.max_length - len(asked))["input_ids"]
        return [ids + asked for ids in found]

    def below(self, ids: Tensor, lengths: Tensor) -> Tensor:
        model = self.full.model
        hidden = model.embed_tokens(ids)
        places = model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        for layer in model.layers[:-2]:
            hidden = layer(hidden, position_embeddings=places)  # padding comes after what is read, so needs no mask
        return hidden

    def features(self, examples: Examples) -> Tensor:
        hidden, length = examples.inputs, examples.inputs.shape[1]
        places = self.full.model.rotary_emb(hidden, torch.arange(length)[None])
        first, last = self.module.layers
        hidden = first(hidden, position_embeddings=places)
        return self.module.norm(_at_end(last, hidden, examples.lengths, *places))

    def head(self, task: str, names: Sequence[str]) -> Tensor:
        words = self.prompts[task][1]
        assert len(words) == len(names), (words, names)
        ids = [self.tokenizer(f" {word}")["input_ids"][0] for word in words]
        assert len(set(ids)) == len(ids), words
        self.module.load_state_dict(self.base)
        tokens = self.tokens(task, ["a text", "another text, which is longer"])
        features = self.features(self.encoded(tokens, torch.zeros(2, dtype=torch.long)))
        head = self.full.lm_head.weight[ids].clone()
        for found, text in zip(features @ head.T, tokens, strict=True):
            whole = self.full(torch.tensor([text])).logits[0, -1, ids]
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)  # the layers below are the base's
        return head


def _at_end(layer: Any, hidden: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute a layer's output at the last token of each text only, shape (examples, features)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, rows = layer.self_attn, torch.arange(len(hidden))
    normed, ends = layer.input_layernorm(hidden), lengths - 1

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed[rows, ends][:, None]))  # (examples, heads, 1, features)
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    query, _ = apply_rotary_pos_emb(query, query, cos[0, ends][:, None], sin[0, ends][:, None])
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    seen = _within(hidden.shape[1], lengths)[:, None, None]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    found = hidden[rows, ends] + attention.o_proj(mixed.transpose(1, 2).flatten(1))
    return found + layer.mlp(layer.post_attention_layernorm(found))


MODELS: dict[str, type[Model]] = {model.name: model for model in (Tiny, Images, Texts, LM)}
