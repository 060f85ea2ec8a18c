"""Composing on disk: the bytes of the in-memory path whatever the chunks, whole files or none, and its account."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from small_memory import assert_within
from small_states import plain_state

import tva.compose.engine
from tva import MismatchError, NoEffectError, TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import open_finetuned, read_metadata
from tva.compose.apply import compose
from tva.compose.recipe import Recipe
from tva.sizes import anonymous_memory, parse_bytes

OUT, BASE = "out.safetensors", "base.safetensors"

RECIPES = [
    "a",
    "-0.3 * a",
    "0.5 * (a + b - 2 * c)",
    "analogy(a, b, c)",
    "mean(a, b, c)",
    "ties(a, b, c, density=0.3)",
    'ties(a, b, c, density=0.3, trim="tensor", combine="sum")',
    "dare(a, drop=0.5, seed=3) + magnitude(b, density=0.4)",
    '0.4 * ties(dare(a, drop=0.5), magnitude(b, density=0.5), c, trim="tensor")',
    "ties(ties(a, b), c)",
    'ties(a, b, -c / 3, elect="unweighted", weights=(1, 0.5, 2), trim="tensor")',
    'ties(a, b, c, undecided="positive") + breadcrumbs(a)',
    "consensus(dare(a), 2 * b, c) - emr(a, b + c)",
    "lines(breadcrumbs(b, top=0.1, bottom=0.6), first=0.3, last=1.7)",
]


def state(seed, dtype=torch.float32):
    return {**plain_state(seed, dtype), "still": torch.ones(4, dtype=dtype)}


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16", "float16"])
def files(request):
    """A base, two fine-tuned checkpoints of two formats and one task vector file."""
    base = state(0, request.param)
    save_weights(base, BASE)
    torch.save({"state_dict": state(1, request.param)}, "a.ckpt")
    save_weights(state(2, request.param), "b.safetensors")
    TaskVector.between(base, state(3, request.param)).save("c.tv.safetensors")
    vectors = {"a": "a.ckpt", "b": "b.safetensors", "c": "c.tv.safetensors"}
    return BASE, vectors


def in_memory(base, vectors, recipe, coef):
    weights = open_weights(base)
    loaded = {
        name: TaskVector.load(path) if "tv" in path else TaskVector.between(weights, open_weights(path))
        for name, path in vectors.items()
    }
    return Recipe(recipe, loaded).evaluate(loaded).apply_to(weights, coef)


CHUNKS = [(dtype, chunk) for dtype in DTYPES for chunk in (19, 100, 2**18) if chunk != 100 or dtype == torch.float32]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("files", "chunk"), CHUNKS, indirect=["files"], ids=str)
def test_the_bytes_are_those_of_the_in_memory_path_whatever_the_chunks(files, monkeypatch, recipe, chunk):
    monkeypatch.setattr(tva.compose.engine, "CHUNK", chunk)
    base, vectors = files
    report = compose(base, vectors, recipe, OUT, scaling_coef=0.7)
    expected = fingerprint(in_memory(base, vectors, recipe, 0.7))
    assert fingerprint(open_weights(OUT)) == expected == report.edited
    assert report.base == fingerprint(open_weights(base))


def test_coefficient_zero_writes_the_base(files):
    base, vectors = files
    compose(base, vectors, "ties(a, b)", OUT, scaling_coef=0)
    assert fingerprint(open_weights(OUT)) == fingerprint(open_weights(base))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_output_dtype_rounds_once_and_leaves_integers(files, dtype):
    base, vectors = files
    compose(base, vectors, "0.5 * a + 0.25 * b", OUT, dtype=dtype)
    edited, weights = open_weights(OUT), open_weights(base)
    a, b = open_weights(vectors["a"]), open_weights(vectors["b"])
    wanted = getattr(torch, dtype)
    for name in ("l.0.w", "scalar", "bias"):
        start = weights[name].float()
        delta = 0.5 * (a[name].float() - start) + 0.25 * (b[name].float() - start)
        assert torch.equal(edited[name], (start + delta).to(wanted)), name
    assert edited["steps"].dtype == torch.int64
    assert torch.equal(edited["bn.running_mean"], weights["bn.running_mean"].to(wanted))


def test_prefixes_are_matched_and_said_and_the_rest_is_mapped(files):
    base, vectors = files
    wrapped = {f"model.{name}": tensor for name, tensor in open_weights(vectors["b"]).items()}
    save_weights(wrapped, "wrapped.safetensors")
    renamed = {name.replace("l.0", "first"): tensor for name, tensor in open_weights(vectors["b"]).items()}
    save_weights(renamed, "renamed.safetensors")
    plain = compose(base, {"b": vectors["b"]}, "b", "plain.safetensors")
    same = compose(base, {"b": "wrapped.safetensors"}, "b", "same.safetensors")
    assert same.edited == plain.edited
    assert "stripped 'model.' from 8 of 8 names" in same.notes[0]
    odd = {"b": "renamed.safetensors"}
    with pytest.raises(MismatchError, match="Map the rest by key_map"):
        compose(base, odd, "b", "odd.safetensors")
    mapped = compose(base, odd, "b", "mapped.safetensors", key_map={"^first": "l.0"})
    assert mapped.edited == plain.edited


def write_adapter(factors, alpha):
    named = {
        f"base_model.model.{name}.lora_{part}.weight": pair[part == "B"]
        for name, pair in factors.items()
        for part in "AB"
    }
    save_weights(named, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": [*factors]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))


def test_a_lora_adapter_is_a_vector_like_any_other():
    base = {"q.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "q.bias": torch.zeros(6)}
    save_weights(base, BASE)
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    write_adapter({"q": (a, b)}, alpha=8)
    arguments = (BASE, {"v": "adapter"}, "-0.5 * v")
    compose(*arguments, OUT)
    expected = base["q.weight"].double() - 0.5 * 4 * b.double() @ a.double()
    edited = open_weights(OUT)
    torch.testing.assert_close(edited["q.weight"].double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(edited["q.bias"], base["q.bias"])


def test_the_account_counts_what_rounding_swallowed():
    base = {"x.a.w": torch.ones(100, dtype=torch.bfloat16), "x.b.w": torch.ones(50, dtype=torch.bfloat16)}
    delta = {"x.a.w": torch.cat([torch.full((40,), 1e-4), torch.zeros(30), torch.full((30,), 0.5)])}
    save_weights(base, BASE)
    vector = TaskVector(delta, untouched={"x.b.w": "frozen"})
    vector.save("v.tv.safetensors")
    arguments = (BASE, {"v": "v.tv.safetensors"})
    report = compose(*arguments, "v", OUT)
    (effect,) = report.effects.values()
    assert (effect.tensors, effect.changed, effect.elements, effect.vanished) == (1, 1, 70, 40)
    assert effect.relative_change == pytest.approx((30 * 0.25 / 100) ** 0.5)
    with pytest.raises(NoEffectError, match="vanishes in rounding to the output.s dtype"):
        compose(*arguments, "v", "none.safetensors", scaling_coef=1e-6)
    assert not Path("none.safetensors").exists()


@pytest.mark.parametrize("damage", ["nan", "missing", "shape", "base"])
def test_what_does_not_fit_is_refused_and_leaves_no_file(files, damage):
    base, vectors = files
    other = dict(open_weights(vectors["b"]))
    if damage == "nan":
        other["bias"] = torch.full_like(other["bias"], float("nan"))
        message, error = "'bias' would hold NaN or infinity: .*other.safetensors, the vector b", ValueError
    elif damage == "missing":
        del other["bias"]
        message, error = "1 of the base's 8 names are not there: 'bias'", MismatchError
    elif damage == "shape":
        other["bias"] = other["bias"][:-1]
        message, error = "shapes differ: 'bias", MismatchError
    save_weights(other, "other.safetensors")
    if damage == "base":
        message, error = "was taken from the base .*, and in the base given '.*' is another", MismatchError
        with pytest.raises(error, match=message):
            compose(vectors["b"], {"c": vectors["c"]}, "c", OUT)
        compose(vectors["b"], {"c": vectors["c"]}, "c", "allowed.safetensors", allow_other_base=True)
    else:
        with pytest.raises(error, match=message):
            compose(base, {"b": "other.safetensors"}, "b", OUT)
    assert not [file.name for file in Path().iterdir() if file.name.startswith((".", "out"))]


def test_a_full_disk_is_one_error_and_the_run_can_go_on(files, monkeypatch):
    base, vectors = files
    arguments = (base, vectors, "ties(a, b, c)", OUT)
    whole = compose(*arguments[:3], "whole.safetensors")
    written = []

    def full(file, data, offset, write=os.pwrite):
        written.append(len(data))
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device; the completed part is kept in .*run again with resume"):
        compose(*arguments)
    assert not Path(OUT).exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'tva.scaling_coef' differ.*leave out resume"):
        compose(*arguments, scaling_coef=0.5, resume=True)
    report = compose(*arguments, resume=True)
    assert report.resumed > 0
    assert (report.base, report.edited, report.effects) == (whole.base, whole.edited, whole.effects)
    assert fingerprint(open_weights(OUT)) == whole.edited
    assert not [file.name for file in Path().iterdir() if file.name.startswith(".")]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="are free on its disk. Make room"):
        compose(*arguments)
    assert not [file.name for file in Path().iterdir() if file.name.startswith(".")]


def test_sizes_are_read_and_too_little_memory_is_refused(files):
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    for text in ("much", "-1GB", "5 XB"):
        with pytest.raises(ValueError, match="a size must be such as"):
            parse_bytes(text)
    base, vectors = files
    with pytest.raises(ValueError, match="max_memory must be .*MiB or more.*; found 1."):
        compose(base, vectors, "a", OUT, max_memory="1")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, or name a folder"):
        compose(base, vectors, "a", "out.bin")
    with pytest.raises(ValueError, match="dtype must be one of"):
        compose(base, vectors, "a", OUT, dtype="int8")


def test_coefficients_by_group_of_tensors_are_those_of_the_in_memory_path(files):
    base, vectors = files
    coefs = {"s": {"layer": [0.2, 0.6], "bias|scalar": -1, ".*": 0.5}}
    weights = open_weights(base)
    loaded = {"a": TaskVector.between(weights, open_weights(vectors["a"]))}
    expected = Recipe("s * a", loaded, coefs).evaluate(loaded).apply_to(weights)
    compose(base, vectors, "s * a", OUT, coefs=coefs)
    edited = open_weights(OUT)
    assert fingerprint(edited) == fingerprint(expected)
    for name, coef in {"l.0.w": 0.2, "l.1.w": 0.6, "bias": -1, "empty": 0.5}.items():
        delta = loaded["a"].deltas[name] if name in loaded["a"].deltas else torch.zeros(0, 3)
        assert torch.equal(edited[name], (delta * coef + weights[name].float()).to(weights[name].dtype)), name


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"layer": 0.5}, "6 tensors are in none of them: 'bias'.*Add a last group"),
        ({".*": 0.5, "bias": 0.1}, "no tensor is in, or only such as earlier groups took: 'bias'"),
        ({".*": [0.1, 0.2]}, "which needs two numbers or more and tensors with a layer's number"),
        ({"layer": [0.1], ".*": 1}, "which needs two numbers or more"),
        ({"(": 0.5}, "coefs.s holds .*not a regular expression"),
    ],
)
def test_groups_that_do_not_fit_are_refused(files, groups, message):
    base, vectors = files
    with pytest.raises(ValueError, match=message):
        compose(base, vectors, "s * a", OUT, coefs={"s": groups})
    with pytest.raises(ValueError, match="must be the same in all tensors.*this coefficient is given by group"):
        compose(base, vectors, "ties(a, density=s)", OUT, coefs={"s": {".*": 0.5}})


def test_a_plan_is_made_from_headers_and_writes_nothing():
    """Files of holes: a terabyte that takes no room, and that nobody could read in a test."""
    layers, width = 80, 25_000
    names = ["embed.w", *(f"h.{i}.mlp.w" for i in range(layers)), "head.running_mean"]
    for folder in ("base", "a"):
        Path(folder).mkdir()
        weight_map = {}
        for i, name in enumerate(names):
            shard = f"model-{i:05}.safetensors"
            shape = [width, width * 8] if "w" in name else [4]
            size = 2 * torch.Size(shape).numel()
            header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
            with Path(f"{folder}/{shard}").open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + size)
            weight_map[name] = shard
        Path(f"{folder}/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arguments = ("base", {"a": "a"}, "-s * a", "out")
    plan = compose(*arguments, coefs={"s": {"layer": [0, 1], ".*": 2}}, scaling_coef=0.5, plan=True)
    elements = width * width * 8 * (layers + 1) + 4
    assert (plan.num_elements, plan.passes) == (elements, 1)
    assert (plan.write_bytes, plan.read_bytes) == (2 * elements, 4 * elements)
    found = {row.label: len(row.names) for row in plan.rows}
    assert [*found.items()] == [("embed.w", 1), ("h.*.mlp.w", 80), ("head.running_mean", 1)]
    assert plan.rows[0].coefs == [{"a": -1.0}]
    assert [row["a"] for row in plan.rows[1].coefs] == pytest.approx([-0.5 * i / 79 for i in range(80)])
    assert plan.rows[2].coefs == [{}]  # statistics are kept
    assert plan.memory_bytes < anonymous_memory() + 2**28  # of which this process holds what tests before it left
    whole = compose(*arguments[:2], "tsv(a)", arguments[3], plan=True)
    assert whole.largest == "embed.w"
    assert whole.memory_bytes > 4 * width * width * 8
    with pytest.raises(ValueError, match=r"max_memory must be \d+MiB or more for this recipe"):
        compose(*arguments[:2], "tsv(a)", arguments[3])
    assert sorted(path.name for path in Path().iterdir()) == ["a", "base"]


def test_a_folder_gets_shards_an_index_and_the_files_beside_the_base(files):
    base, vectors = files
    folder = Path("base")
    folder.mkdir()
    os.link(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    arguments = (str(folder), vectors, "0.5 * (a + c)", "out")
    report = compose(*arguments, dtype="float64", max_shard_size="10KB")
    written = sorted(path.name for path in Path("out").iterdir())
    shards = [name for name in written if name.endswith(".safetensors")]
    assert written == sorted([*shards, "config.json", "model.safetensors.index.json", "tokenizer.json"])
    assert len(shards) == 2
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float64"
    assert fingerprint(open_weights("out")) == report.edited
    metadata = read_metadata(f"out/{shards[1]}")
    assert metadata["tva.edited_fingerprint"] == report.edited.digest
    assert metadata["tva.base_fingerprint"] == report.base.digest
    with pytest.raises(ValueError, match="must end in .safetensors, or be a new or empty folder; .* is neither"):
        compose(*arguments)


def test_transformers_loads_what_is_written():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
    compose("base", {"a": "a"}, "a", "out", max_shard_size="4KB")
    edited = transformers.LlamaForCausalLM.from_pretrained("out").state_dict()
    for name, tensor in transformers.LlamaForCausalLM.from_pretrained("a").state_dict().items():
        torch.testing.assert_close(edited[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("untied", [False, True])
def test_tied_weights_are_stored_once_while_every_vector_moves_them_alike(untied):
    base = {"emb.weight": torch.randn(30, 8), "w": torch.randn(5)}
    finetuned = {name: tensor + 0.5 for name, tensor in base.items()}
    torch.save({**base, "head.weight": base["emb.weight"]}, "base.bin")
    head = finetuned["emb.weight"] + (1.0 if untied else 0.0)
    torch.save({**finetuned, "head.weight": head if untied else finetuned["emb.weight"]}, "a.bin")
    save_weights(finetuned, "b.safetensors")  # as transformers writes it: without the alias
    vectors = {"a": "a.bin", "b": "b.safetensors"}
    report = compose("base.bin", vectors, "a + b", OUT)
    with safe_open(OUT, "pt") as file:
        assert ("head.weight" in file.keys()) == untied  # noqa: SIM118
    edited = open_weights(OUT)
    assert fingerprint(edited) == report.edited
    expected = base["emb.weight"] + (head - base["emb.weight"]) + (finetuned["emb.weight"] - base["emb.weight"])
    torch.testing.assert_close(edited["head.weight"], expected)
    # and again: what was written is a base like the one that it came from
    again = compose(OUT, {"a": vectors["a"]}, "a", "again.safetensors")
    assert set(again.edited.tensors) == {"emb.weight", "head.weight", "w"}


@pytest.mark.slow
@pytest.mark.parametrize("files", [torch.bfloat16], ids=["bfloat16"], indirect=True)
def test_a_killed_run_leaves_no_file_and_goes_on_to_the_same_bytes(files):
    base, vectors = files
    out = Path(OUT)
    whole = compose(base, vectors, "dare(a) + ties(b, c)", "whole.safetensors")
    code = f"""
import os, time
import tva.checkpoints.sharded_writer as output
from tva.compose import compose
output.SYNC_BYTES = 0
write = output.Output.write
def slow(self, name, start, chunk):
    if name == "bias":
        time.sleep(60)
    write(self, name, start, chunk)
output.Output.write = slow
compose({base!r}, {vectors!r}, "dare(a) + ties(b, c)", {str(out)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    journal = Path(".out.safetensors.journal")
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(ValueError, match="Another run is writing"):
        compose(base, vectors, "dare(a) + ties(b, c)", str(out), resume=True)
    process.kill()
    process.wait()
    assert not out.exists()
    partial = Path(".out.safetensors.partial")
    spoiled = bytearray(partial.read_bytes())
    spoiled[-1] ^= 1  # of a tensor that is done: read back, it is not what the journal says
    partial.write_bytes(spoiled)
    report = compose(base, vectors, "dare(a) + ties(b, c)", str(out), resume=True)
    assert 0 < report.resumed < len(whole.edited.tensors)
    assert out.read_bytes() == Path("whole.safetensors").read_bytes()
    assert not partial.exists()
    assert not journal.exists()


@pytest.mark.parametrize("chunk", [1000, 2**17])
def test_matrix_methods_and_adapters_stream_to_the_in_memory_bytes(files, monkeypatch, chunk):
    monkeypatch.setattr(tva.compose.engine, "CHUNK", chunk)
    base, vectors = files
    factors = {"l.0": (torch.randn(2, 30), torch.randn(40, 2)), "l.1": (torch.randn(2, 40), torch.randn(25, 2))}
    write_adapter(factors, alpha=4)
    weights = open_weights(base)
    renamed = {n.replace("l.0.w", "l.0.weight").replace("l.1.w", "l.1.weight"): t for n, t in weights.items()}
    save_weights(renamed, "named.safetensors")
    base, vectors = ("named.safetensors", {"v": "adapter", "w": "adapter"})
    loaded = {
        name: TaskVector.between(open_weights(base), open_finetuned(path, open_weights(base)))
        for name, path in vectors.items()
    }
    for recipe in ("v", "tsv(v, w)", "iso_c(v, w) + 0.5 * w"):
        expected = fingerprint(Recipe(recipe, loaded).evaluate(loaded).apply_to(open_weights(base)))
        Path(OUT).unlink(missing_ok=True)
        assert compose(base, vectors, recipe, OUT).edited == expected, recipe


def test_raw_or_averaged_weights_are_taken_as_asked_and_recorded():
    base, raw, averaged = ({"w": torch.full((3,), value)} for value in (0.0, 1.0, 2.0))
    save_weights(base, BASE)
    stored = {"state_dict": averaged, "current_model_state": raw, "averaging_state": {"n_averaged": torch.tensor(3)}}
    torch.save(stored, "a.ckpt")
    arguments = (BASE, {"a": "a.ckpt"}, "a")
    for which, expected, taken in (("checkpoint", 2, "averaged"), ("averaged", 2, "averaged"), ("raw", 1, "raw")):
        out = Path(f"{which}.safetensors")
        report = compose(*arguments, str(out), which=which)
        assert open_weights(out)["w"].tolist() == [expected] * 3
        assert f"{taken} weights" in report.notes[0]
        assert json.loads(read_metadata(out)["tva.options"])["which"] == {"a": taken}
    save_weights(raw, "b.safetensors")
    with pytest.raises(ValueError, match="no vector holds both raw and averaged weights"):
        compose(arguments[0], {"a": "b.safetensors"}, "a", "no.safetensors", which="raw")


@pytest.mark.slow
def test_the_memory_measured_stays_within_the_memory_stated():
    generator = torch.Generator().manual_seed(0)
    base = {f"h.{i}.w": torch.randn(3000, 5000, generator=generator) for i in range(3)}
    save_weights(base, BASE)
    for name in "ab":
        moved = {key: tensor + 0.01 * torch.randn(3000, 5000, generator=generator) for key, tensor in base.items()}
        save_weights(moved, f"{name}.safetensors")
    vectors = {name: f"{name}.safetensors" for name in "ab"}
    recipes = ("a - b", 'ties(a, b, trim="tensor")', "ties(a, b)")
    call = f"compose('base.safetensors', {vectors}, %r, 'out.safetensors', max_memory=memory)"
    assert_within(Path(), 40, *(call % recipe for recipe in recipes))
    many = f"ties({', '.join('ab' * 6)}, density=0.5)"  # whose counts take more than all else
    assert_within(Path(), 50, call % many)
