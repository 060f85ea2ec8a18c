"""Tiny transformers models with random weights, and texts that a little training can tell apart."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "food", "the", "a", "is", "was", "and", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]


def make_tokenizer(words=WORDS, kind="bert"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    shape, tokens = {
        "bert": ("[CLS] $A [SEP]", ["[CLS]", "[SEP]"]),
        "causal": ("<s> $A", ["<s>"]),
        "seq2seq": ("$A </s>", ["</s>"]),
    }[kind]
    tokenizer.post_processor = processors.TemplateProcessing(shape, special_tokens=[(t, ids[t]) for t in tokens])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def write_model(folder: Path, kind="bert", words=WORDS, seed=0, tokenizer=True, **options) -> str:
    """Write a tiny model of a kind with its tokenizer, and give the folder."""
    import transformers

    torch.manual_seed(seed)
    size = {"vocab_size": len(SPECIAL) + len(words)}
    if kind == "bert":
        config = transformers.BertConfig(
            **size | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
            max_position_embeddings=256,
            initializer_range=0.3,
            **options,
        )
        model = transformers.BertModel(config)
    elif kind == "causal":
        config = transformers.LlamaConfig(
            **size | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
            max_position_embeddings=256,
            **{"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 6} | options,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(
            **size | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
            **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 6} | options,
        )
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(words, kind).save_pretrained(folder)
    return str(folder)


def write_classifier(
    folder: Path, kind="sequence", moved=0.0, seed=1, labels=("negative", "positive"), **options
) -> str:
    """Write a tiny BERT with a trained head, its weights moved at random, with its tokenizer; return the folder."""
    import transformers

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=64,
        initializer_range=0.3,
        **size,
        **names,
        **options,
    )
    auto = {"sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}[kind]
    model = getattr(transformers, auto)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def reviews(count: int, seed=0) -> dict[str, list]:
    """Make short reviews whose class is that of their adjective."""
    random = np.random.default_rng(seed)
    labels = [index % 2 for index in range(count)]
    texts = []
    for label in labels:
        adjective = random.choice(WORDS[3:6] if label == 0 else WORDS[:3])
        rest = random.choice(["the film is", "the food was", "it is", "it was a"])
        texts.append(" ".join([rest, *(["and"] * int(random.integers(0, 4))), adjective]))
    return {"text": texts, "label": labels}


def write_reviews(folder: Path = Path(), names=("negative", "positive"), test=24, **columns) -> str:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    for split, count, seed in (("train", 60, 0), ("test", test, 1)):
        table = datasets.Dataset.from_dict(reviews(count, seed), features=features)
        for column, values in columns.items():
            table = table.add_column(column, (values * count)[:count])
        table.to_parquet(folder / f"reviews-{split}.parquet")
    return str(folder / "reviews-{split}.parquet")


def write_running_text(folder: Path = Path(), sentences=400) -> str:
    for split, count, seed in (("train", sentences, 2), ("test", sentences // 4, 3)):
        (folder / f"prose-{split}.txt").write_text("\n".join(reviews(count, seed)["text"]))
    return str(folder / "prose-{split}.txt")


def real_data() -> Path:
    """Return the folder of real data and models, or skip the test."""
    folder = Path(os.environ.get("TVA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "text").is_dir():
        pytest.skip(f"real texts and models were expected in {folder}, and are not there")
    return folder


def real_models(folder: Path) -> Path:
    """Unpack the real models into a folder."""
    import subprocess
    import sys

    subprocess.run([sys.executable, real_data() / "unpack.py", folder / "models"], check=True)
    return folder / "models"


def make_trainer(**options):
    """Make a quiet Trainer on the CPU."""
    import lightning as L

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)
