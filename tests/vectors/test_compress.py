"""Compressed task vectors: each encoding against its formula, read by chunks, in every command, by budget, damaged."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MixedNet, fit
from tva.callbacks import TaskVectorCallback

import tva.compose.engine
import tva.vectors.encoder
from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import compressed as encoded
from tva.checkpoints import read_metadata
from tva.checkpoints.fingerprint import CONTENT, HEADER, sealed
from tva.checkpoints.lazy import InMemory
from tva.cli.main import main
from tva.compose.apply import compose
from tva.vectors.compress import compress
from tva.vectors.encoder import Encoder
from tva.vectors.encoding import Encoding

DENSE, SMALL, OTHER = "v.tv.safetensors", "c.tv.safetensors", "d.tv.safetensors"
ENCODINGS = ["bf16", "fp16", "int8", "sign", "top_k(density=0.1)", "top_k(density=1)", "low_rank(rank=5)"]


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def deltas():
    return {
        "conv": noise(0, 40, 3, 3, 3),
        "matrix": noise(1, 60, 50),
        "long": noise(2, 3, 30_000),  # several blocks of top_k
        "row": noise(3, 1, 400),
        "bias": noise(4, 60),
        "scalar": torch.tensor(0.25),
        "empty": torch.zeros(0, 3),
        "zero": torch.zeros(20, 20),
        "one row of zeros": torch.cat([torch.zeros(1, 64), noise(5, 9, 64)]),
        "bn.running_mean": noise(6, 5),
    }


@pytest.fixture
def files(tmp_path):
    """A base, and the task vector file of a model fine-tuned from it."""
    base = {name: torch.ones_like(delta) for name, delta in deltas().items()} | {"steps": torch.tensor(3)}
    tuned = {name: base[name] + delta for name, delta in deltas().items()} | {"steps": torch.tensor(4)}
    save_weights(base, "base.safetensors")
    vector = TaskVector.between(base, tuned)
    for name in ("zero", "empty"):  # as a sum of vectors may hold them
        del vector.untouched[name]
        vector.deltas[name] = deltas()[name]
    vector.save(DENSE)
    return tmp_path


def error(vector, other):
    return math.sqrt(sum(float((vector[n].double() - other[n].double()).square().sum()) for n in other)) / math.sqrt(
        sum(float(other[n].double().square().sum()) for n in other)
    )


def coded(delta, text):
    """Encode one tensor and give what is read back."""
    done = Encoder("w", delta).encode(Encoding.parse(text))
    listed = json.dumps({"w": [done.encoding.name, list(delta.shape), "0"]})
    stored = {name: InMemory(tensor) for name, tensor in done.tensors.items()}
    return done, encoded.decoded("memory", stored, listed)["w"].read()


def pack(output=SMALL, **options):
    return compress(DENSE, output, **options)


# --- each encoding is its formula


def test_int8_is_the_nearest_of_255_levels_of_each_row():
    delta = deltas()["matrix"].double()
    _, read = coded(delta.float(), "int8")
    step = delta.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(read.double(), (delta / step).round() * step, rtol=1e-6, atol=0)
    conv = deltas()["conv"].double()
    step = conv.abs().amax((1, 2, 3), keepdim=True) / 127
    _, read = coded(conv.float(), "int8")
    torch.testing.assert_close(read.double(), (conv / step).round() * step, rtol=1e-6, atol=0)


def test_sign_has_the_scale_of_smallest_error():
    delta = deltas()["matrix"].double()
    done, read = coded(delta.float(), "sign")
    torch.testing.assert_close(read.double(), delta.sign() * delta.abs().mean(1, keepdim=True), rtol=1e-6, atol=0)
    for factor in (0.98, 1.02):
        assert float((factor * read.double() - delta).square().sum()) > done.squared_error


def test_top_k_keeps_exactly_the_largest_and_of_equal_ones_the_first():
    delta = deltas()["long"]
    done, read = coded(delta, "top_k(density=0.02)")
    kept = delta.reshape(-1).abs().argsort(descending=True, stable=True)[:1800].sort().values
    assert torch.equal(read.reshape(-1).nonzero().reshape(-1), kept)
    torch.testing.assert_close(read.reshape(-1)[kept], delta.reshape(-1)[kept], rtol=2**-11, atol=0)
    assert done.tensors["w#top_k.index"].shape == (1800,)
    tied = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.5, -2.0, 0.0, 0.0]])
    assert coded(tied, "top_k(density=0.375)")[1].tolist() == [[0, -2, 2, 2, 0, 0, 0, 0]]


def test_low_rank_is_the_truncated_singular_value_decomposition():
    delta = deltas()["matrix"].double()
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    best = (left[:, :5] * values[:5]) @ right[:5]
    _, read = coded(delta.float(), "low_rank(rank=5)")
    assert error({"w": read}, {"w": best}) < 1e-3  # float16 factors
    exact = noise(7, 30, 2) @ noise(8, 2, 40)
    assert coded(exact, "low_rank(rank=2)")[0].error < 1e-3
    assert coded(exact, "low_rank(rank=9)")[0].error < 1e-3


def test_random_projections_come_near_the_decomposition_and_are_the_same_each_time(monkeypatch):
    spectrum = torch.diag(1.0 / torch.arange(1, 301))
    delta = torch.linalg.qr(noise(1, 300, 300)).Q @ spectrum @ torch.linalg.qr(noise(2, 300, 300)).Q
    best = float((1.0 / torch.arange(1, 301).double())[20:].square().sum())
    monkeypatch.setattr(tva.vectors.encoder, "LARGE", 10)
    monkeypatch.setattr(tva.vectors.encoder, "RANKS", (20,))
    (first, read), (again, _) = (coded(delta, "low_rank(rank=20)") for _ in range(2))
    assert best < first.squared_error <= 1.001 * best
    assert torch.equal(first.tensors["w#low_rank.left"], again.tensors["w#low_rank.left"])
    monkeypatch.setattr(tva.vectors.encoder, "LARGE", 1000)
    assert not torch.equal(coded(delta, "low_rank(rank=20)")[1], read)  # so the first was not the exact one


@pytest.mark.parametrize("text", ENCODINGS)
def test_the_error_reported_is_that_of_what_is_read(files, text):
    report = pack(encoding=text)
    before, after = open_weights(DENSE), open_weights(SMALL)
    assert report.whole.error == pytest.approx(error(after, before), rel=1e-9)
    stored = json.loads(after.metadata["tva.encoded"])
    assert float(after.metadata["tva.encoding_error"]) == pytest.approx(report.whole.error, rel=1e-6)
    for name in before:
        own = error({name: after[name]}, {name: before[name]}) if before[name].any() else 0
        assert float(stored[name][2]) == pytest.approx(own, rel=1e-6), name
    assert report.num_bytes == Path(SMALL).stat().st_size
    assert report.whole.num_bytes == sum(t.nbytes for t in load_file(SMALL).values())


def test_small_tensors_and_those_without_gain_are_in_bf16(files):
    for rank, matrix in ((2, "low_rank"), (28, "bf16")):  # 28 · (60 + 50) numbers are more than 60 · 50
        pack(encoding=f"low_rank({rank})")
        stored = {name: how for name, (how, _, _) in listed(Path(SMALL)).items()}
        assert stored["matrix"] == matrix
        assert stored["bias"] == stored["scalar"] == stored["empty"] == stored["bn.running_mean"] == "bf16"
    assert stored["long"] == "bf16"  # three rows: not of smaller rank


def listed(path):
    return json.loads(read_metadata(path)["tva.encoded"])


# --- what is read does not depend on chunks, and every command reads it


@pytest.mark.parametrize("text", ENCODINGS)
def test_a_chunk_is_the_same_bytes_whatever_the_chunk(files, monkeypatch, text):
    monkeypatch.setattr(encoded, "BLOCK", 512)
    monkeypatch.setattr(tva.vectors.encoder, "BLOCK", 512)
    pack(encoding=text)
    weights = open_weights(SMALL)
    for name, whole in weights.items():
        assert weights.spec(name) == (whole.dtype, whole.shape)
        flat, count = whole.reshape(-1), whole.numel()
        for step in (1 if count < 1000 else 997, 7 if count < 5000 else 4099, max(1, count)):
            chunks = [weights.slice(name, start, min(start + step, count)) for start in range(0, count, step)]
            assert torch.equal(torch.cat([flat[:0], *chunks]), flat), (name, step)
        assert weights.slice(name, count // 2, count // 2).shape == (0,)


@pytest.mark.parametrize("recipe", ["0.5 * (v + w)", "ties(v, w, density=0.3)", "dare(v, drop=0.5) - w"])
@pytest.mark.parametrize("chunk", [1000, 2**18])
def test_compose_takes_compressed_vectors_and_gives_the_bytes_of_the_in_memory_path(files, monkeypatch, recipe, chunk):
    monkeypatch.setattr(tva.compose.engine, "CHUNK", chunk)
    paths = {}
    for name, text in (("v", "int8"), ("w", "low_rank(rank=2)")):
        paths[name] = f"{name}.c.tv.safetensors"
        pack(paths[name], encoding=text)
    base = open_weights("base.safetensors")
    report = compose(str(base.path), paths, recipe, "out.safetensors", scaling_coef=0.7)
    loaded = {name: TaskVector.load(path) for name, path in paths.items()}
    from tva.compose.recipe import Recipe

    expected = Recipe(recipe, loaded).evaluate(loaded).apply_to(base, 0.7)
    assert report.edited == fingerprint(expected)


def test_the_vector_keeps_all_that_its_header_says(files):
    pack(encoding="sign")
    dense, small = TaskVector.load(DENSE), TaskVector.load(SMALL)
    assert small.origin == dense.origin
    assert (list(small.deltas), list(small.buffers)) == (list(dense.deltas), list(dense.buffers))
    assert small.untouched == dense.untouched
    before, after = read_metadata(DENSE), read_metadata(SMALL)
    changed = {"tva.encoding", "tva.norm", CONTENT, HEADER}
    assert {k: after[k] for k in before if k not in changed} == {k: before[k] for k in before if k not in changed}
    assert float(after["tva.norm"]) == pytest.approx(small.norm(), rel=1e-6)
    with pytest.raises(tva.MismatchError, match="was taken from the base"):
        small.apply_to({n: t + 1 for n, t in open_weights("base.safetensors").items()})


@pytest.mark.parametrize("text", ENCODINGS)
def test_saving_with_an_encoding_and_compressing_the_file_give_the_same_tensors(files, text):
    vector = TaskVector.load(DENSE)
    vector.save("saved.tv.safetensors", encoding=text)
    pack(encoding=text)
    saved, compressed = open_weights("saved.tv.safetensors"), open_weights(SMALL)
    assert fingerprint(saved) == fingerprint(compressed)
    assert listed(Path("saved.tv.safetensors")) == listed(Path(SMALL))


def test_any_safetensors_reader_sees_the_parts_as_documented(files):
    pack(encoding="int8")
    parts, whole = load_file(SMALL), open_weights(SMALL)
    by_hand = parts["conv#int8.values"].float() * parts["conv#int8.scale"][:, None, None, None]
    assert torch.equal(by_hand, whole["conv"])
    assert torch.equal(parts["bias"].float(), whole["bias"].float())


def test_low_rank_counts_its_factors_against_max_memory(monkeypatch):
    monkeypatch.setattr(tva.compose.engine, "anonymous_memory", lambda: 0)
    save_weights({"w": torch.ones(8, 1_000_000)}, "base.safetensors")
    vector = TaskVector({"w": torch.ones(8, 1) @ noise(0, 1, 1_000_000)})
    vector.save(DENSE, encoding="low_rank(rank=2)")
    paths = "base.safetensors", {"v": DENSE}
    plan = compose(*paths, "v", "out.safetensors", plan=True)
    assert plan.read_bytes == 8 * 4_000_000 + 2 * (2 * 8 + 2 * 1_000_000 + 2 * 2)  # the base, and what is stored
    vector.save(DENSE, encoding="bf16")
    assert plan.memory_bytes - compose(*paths, "v", "out.safetensors", plan=True).memory_bytes > 2**24


# --- budgets


@pytest.mark.parametrize("max_error", [0.0, 0.001, 0.01, 0.3, 0.9])
def test_max_error_holds_for_each_tensor_and_smaller_files_have_larger_errors(files, max_error):
    report = pack(max_error=max_error)
    before, after = open_weights(DENSE), open_weights(SMALL)
    for name in before:
        if before[name].any():
            assert error({name: after[name]}, {name: before[name]}) <= max_error, name
    assert report.largest_error[0] <= max_error
    parts = load_file(SMALL)
    for name in before:  # no encoding that takes less would do
        taken = sum(tensor.nbytes for part, tensor in parts.items() if part.split("#")[0] == name)
        encoder = Encoder(name, before[name])
        smaller = [how for how in encoder.candidates() if how.num_bytes(encoder.spec) < taken]
        assert all(encoder.encode(how).error > max_error for how in smaller), name


def test_a_low_rank_or_sparse_vector_gets_the_encoding_that_fits_it():
    sparse = torch.zeros(100, 100)
    sparse[::10, ::10] = noise(0, 10, 10)
    vector = TaskVector({"sparse": sparse, "lora": noise(1, 200, 4) @ noise(2, 4, 300), "dense": noise(3, 100, 100)})
    vector.save(DENSE)
    report = pack(max_error=0.01)
    assert set(report.shares) == {"top_k(density=0.01)", "low_rank(rank=4)", "int8"}


@pytest.mark.parametrize("max_size", ["6%", "20%", "60%", "200%", "60 kB"])
def test_max_size_holds_for_the_file_and_more_room_means_less_error(files, max_size):
    report = pack(max_size=max_size)
    limit = 60_000 if "kB" in max_size else float(max_size[:-1]) / 100 * report.float32_bytes
    assert Path(SMALL).stat().st_size <= limit
    if max_size == "200%":
        assert report.whole.error == 0
        return
    more = pack(OTHER, max_size=f"{int(limit * 4)}")
    assert more.whole.error < report.whole.error


def test_all_is_kept_exactly_as_soon_as_the_file_has_room_for_it(files):
    pack(encoding="exact")
    whole = Path(SMALL).stat().st_size  # the header holds what was asked for, here longer by some letters
    room = whole + len("max_size=") + len(str(whole)) - len("exact") + 7
    report = pack(max_size=str(room))
    assert report.whole.error == 0
    assert {*report.shares} - {"exact"}  # what takes fewer bytes without any error, such as a tensor of zeros
    assert pack(max_size=str(whole - 9000)).whole.error > 0


@pytest.mark.parametrize("name", ["matrix", "conv", "long", "zero", "one row of zeros"])
def test_no_bound_is_above_what_is_read_back(name):
    encoder = Encoder(name, deltas()[name])
    for how in encoder.candidates():
        assert encoder.least_error(how) <= encoder.encode(how).squared_error, how


def test_low_rank_of_full_rank_is_no_rival_of_exact():
    vector = TaskVector({"w": noise(1, 3, 30_000)})  # of rank 3, where the singular values leave no error at all
    vector.save(DENSE)
    report = pack(max_size="101%")
    assert report.whole.error == 0
    report = pack(max_size="99%")
    read = TaskVector.load(SMALL)
    assert report.whole.error == pytest.approx(error(read.deltas, vector.deltas), rel=1e-6)
    encoder = Encoder("w", vector.deltas["w"])
    fits = [how for how in encoder.candidates() if how.num_bytes(encoder.spec) < 0.98 * report.float32_bytes]
    assert report.whole.squared_error <= (1 + 1e-6) * min(encoder.encode(how).squared_error for how in fits)


def test_the_greedy_choice_is_near_the_best_of_all_choices():
    vector = TaskVector({"a": noise(0, 30, 30), "b": 10 * noise(1, 40, 20), "c": 3 * noise(2, 25, 4) @ noise(3, 4, 25)})
    vector.save(DENSE)
    report = pack(max_size="50%")
    options = []
    for name, delta in vector.deltas.items():
        encoder = Encoder(name, delta)
        options.append([(c.num_bytes(encoder.spec), encoder.encode(c).squared_error) for c in encoder.candidates()])
    best = min(
        x[1] + y[1] + z[1]
        for x in options[0]
        for y in options[1]
        for z in options[2]
        if x[0] + y[0] + z[0] <= report.whole.num_bytes
    )
    assert report.whole.squared_error <= 1.5 * best


# --- mistakes


def test_mistakes_in_the_command_are_named(files):
    for options, message in (
        ({"encoding": "int9"}, "no encoding 'int9'; encodings are exact, bf16.*Did you mean 'int8'"),
        ({"encoding": "int8(rank=3)"}, "int8 takes no parameter"),
        ({"encoding": "top_k(rank=3)"}, "top_k takes only density, as in top_k\\(density=0.1\\)"),
        ({"encoding": "top_k(density=2)"}, "density is the fraction of elements to keep"),
        ({"encoding": "low_rank(rank=0)"}, "rank must be 1 or more"),
        ({"encoding": "low_rank(rank=few)"}, "rank must be a number, as in low_rank\\(rank=16\\)"),
        ({"max_error": 1.5}, "max_error is a relative error, from 0 .* found 1.5"),
        ({"max_size": "big"}, "max_size must read like '5%' .* found 'big'"),
        ({"max_size": "1%"}, "the smallest file that can be written takes [\\d,]+ \\([\\d.]+%\\)"),
        ({}, "Give one of encoding, max_error and max_size; found none"),
        ({"encoding": "int8", "max_error": 0.1}, "found 'encoding', 'max_error'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(**options)
    with pytest.raises(ValueError, match=r"output must end in \.safetensors"):
        pack("folder", encoding="int8")
    with pytest.raises(ValueError, match="is what is given as vector, .*, and would replace it"):
        pack(DENSE, encoding="int8")
    with pytest.raises(ValueError, match="is a checkpoint, not a task vector file"):
        compress("base.safetensors", SMALL, encoding="int8")
    with pytest.raises(ValueError, match="Give dtype or encoding, not both"):
        TaskVector.load(DENSE).save(SMALL, dtype=torch.bfloat16, encoding="int8")
    assert not Path(SMALL).exists()


def test_a_compressed_vector_is_not_compressed_again(files):
    pack(encoding="int8")
    with pytest.raises(ValueError, match=r"compressed already \(int8\).*Compress the vector that it was made from"):
        compress(SMALL, OTHER, encoding="sign")
    header = {key: text for key, text in read_metadata(SMALL).items() if key != "tva.encoding"}
    header = sealed(header, header[CONTENT])
    save_file(load_file(SMALL), "e.tv.safetensors", header)
    with pytest.raises(ValueError, match="e.tv.safetensors is compressed already .unknown"):
        compress("e.tv.safetensors", OTHER, encoding="sign")
    TaskVector.load(SMALL).save("dense.tv.safetensors")  # the way the message names
    compress("dense.tv.safetensors", OTHER, encoding="sign")


@pytest.mark.parametrize("options", [{"encoding": "int8"}, {"max_error": 0.1}, {"max_size": "20%"}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_is_refused_and_nothing_is_written(options, value):
    bad = noise(0, 30, 30)
    bad[3, 4] = value
    save_weights({"w": bad}, DENSE, {"tva.format": "task_vector/1", "tva.encoding": "dense"})
    with pytest.raises(ValueError, match="must be finite, but the delta of 'w'"):
        pack(**options)
    with pytest.raises(ValueError, match="must be finite, but the delta of 'w'"):
        TaskVector({"w": bad}).save(SMALL, encoding="int8")
    assert [file.name for file in Path().iterdir()] == [DENSE]


def test_a_delta_too_large_for_an_encoding_is_refused():
    vector = TaskVector({"w": torch.full((40, 40), 1e6)})
    with pytest.raises(ValueError, match="'w' does not fit fp16: its largest element is 1e"):
        vector.save(SMALL, encoding="fp16")
    vector.save(DENSE)
    report = pack(max_size="200%")
    assert report.whole.error < 1e-6
    huge = TaskVector({"w": torch.full((40, 40), 1e300, dtype=torch.float64)})
    with pytest.raises(ValueError, match="does not fit int8"):
        huge.save(SMALL, encoding="int8")


def unsealed(path):
    """Return a header without the fingerprints that would notice any change."""
    return {key: text for key, text in read_metadata(path).items() if key not in (CONTENT, HEADER)}


@pytest.mark.parametrize("text", ["int8", "sign", "top_k", "low_rank(rank=2)", "bf16"])
def test_a_part_that_lacks_or_is_of_another_form_is_named(files, text):
    pack(encoding=text)
    parts, metadata = load_file(SMALL), unsealed(Path(SMALL))
    of_matrix = [name for name in parts if name.split("#")[0] == "matrix"]
    for name in of_matrix:
        save_file({n: t for n, t in parts.items() if n != name}, OTHER, metadata)
        with pytest.raises(ValueError, match=f"damaged or incomplete: '{name}' is not there"):
            open_weights(OTHER)
        changed = {**parts, name: torch.zeros(7, 7, 7, dtype=torch.int16)}
        save_file(changed, OTHER, metadata)
        with pytest.raises(ValueError, match=f"'{name}' is torch.int16 \\[7, 7, 7\\], not"):
            TaskVector.load(OTHER)
    save_file({**parts, "stray": torch.zeros(1)}, OTHER, metadata)
    with pytest.raises(ValueError, match="'stray' is listed nowhere"):
        open_weights(OTHER)


def test_damaged_places_of_top_k_and_headers_are_errors(files):
    pack(encoding="top_k")
    parts, metadata = load_file(SMALL), unsealed(Path(SMALL))
    for name, value, message in (
        ("matrix#top_k.start", torch.tensor([0, 10**6]), "'matrix' in .* is damaged: top_k.start"),
        ("matrix#top_k.index", torch.full((300,), 65_000, dtype=torch.uint16), "leads to element 65000 of 3000"),
    ):
        save_file({**parts, name: value}, OTHER, metadata)
        with pytest.raises(ValueError, match=message):
            TaskVector.load(OTHER)
    for change, message in (
        ({"tva.encoded": "{"}, "tva.encoded is not valid JSON"),
        ({"tva.encoded": metadata["tva.encoded"].replace('"top_k"', '"top_q"')}, "encoded as 'top_q'.*Update tva"),
    ):
        save_file(parts, OTHER, {**metadata, **change})
        with pytest.raises(ValueError, match=message):
            TaskVector.load(OTHER)


def test_names_that_would_collide_are_refused():
    vector = TaskVector({"w": noise(0, 20, 20), "w#int8.scale": noise(1, 20)})
    with pytest.raises(ValueError, match="would be stored as 'w#int8.scale'"):
        vector.save(SMALL, encoding="int8")
    vector.save(DENSE)
    with pytest.raises(ValueError, match="would be stored as 'w#int8.scale'"):
        pack(encoding="int8")


# --- the command, and the callback


def test_the_command_prints_its_table_and_compose_takes_what_it_wrote(files, capsys):
    main(["compress", DENSE, "--output", SMALL, "--max_error", "0.01"])
    out = capsys.readouterr().out
    assert "encoding" in out
    assert "whole" in out
    assert "% of the float32 size" in out
    main(["compose", "--base", "base.safetensors", "--vectors.v", SMALL,
          "--recipe=-v", "--output", "out.safetensors"])  # fmt: skip
    with pytest.raises(SystemExit):
        main(["compress", DENSE, "--output", SMALL])
    assert "Give one of encoding, max_error and max_size" in capsys.readouterr().err


def test_the_callback_writes_compressed_vectors():
    fit(folder="dense")
    fit(TaskVectorCallback(encoding="int8"), folder="small")
    file = "epoch=1-step=8.tv.safetensors"
    dense, small = (TaskVector.load(f"{folder}/{file}") for folder in ("dense", "small"))
    assert read_metadata(f"small/{file}")["tva.encoding"] == "int8"
    assert small.origin.finetuned == dense.origin.finetuned
    assert 0 < error(small.deltas, dense.deltas) < 0.01
    assert not list(Path("small").glob(".*"))
    assert MixedNet().state_dict().keys() == small.names
    with pytest.raises(ValueError, match="leave out dtype and lora"):
        TaskVectorCallback(encoding="int8", dtype="bfloat16")
    with pytest.raises(ValueError, match="Did you mean 'low_rank'"):
        TaskVectorCallback(encoding="lowrank")


@pytest.mark.parametrize("encoding", ["exact", "bf16", "int8", "sign"])
def test_within_a_limit_of_memory_blocks_of_rows_give_the_same_file(monkeypatch, encoding):
    large = {"matrix": noise(1, 999, 101), "conv": noise(2, 60, 3, 3, 3), "bias": noise(3, 60)}
    base = {name: torch.zeros_like(delta) for name, delta in large.items()}
    TaskVector.between(base, large).save("a.tv.safetensors")
    compress("a.tv.safetensors", "whole.tv.safetensors", encoding)
    blocks = []
    made = Encoder.__init__
    monkeypatch.setattr(
        Encoder, "__init__", lambda self, name, delta: (blocks.append(delta.numel()), made(self, name, delta))[1]
    )
    monkeypatch.setattr("tva.vectors.blockwise.anonymous_memory", lambda: 2**28)  # whatever this process takes
    monkeypatch.setattr("tva.sizes.anonymous_memory", lambda: 2**28)
    compress("a.tv.safetensors", "blocks.tv.safetensors", encoding, max_memory=f"{2**28 + 2**24 + 2**20}")
    assert max(blocks) * 64 <= 2**20
    assert sum(blocks) == sum(delta.numel() for delta in large.values())
    whole, made_of_blocks = load_file("whole.tv.safetensors"), load_file("blocks.tv.safetensors")
    assert whole.keys() == made_of_blocks.keys()
    assert all(torch.equal(whole[name], made_of_blocks[name]) for name in whole)
    assert main(["verify", "blocks.tv.safetensors"]) is None
    least = f"{2**28 + 2**24 + 2**14}"
    with pytest.raises(ValueError, match=r"max_memory must be \d+MiB or more: encoding '(matrix|conv)' as .* found"):
        compress("a.tv.safetensors", "never.tv.safetensors", encoding, max_memory=least)
    with pytest.raises(ValueError, match="max_memory must be .*: encoding '(matrix|conv)' as low_rank"):
        compress("a.tv.safetensors", "never.tv.safetensors", "low_rank(rank=4)", max_memory=f"{2**28 + 2**24 + 2**20}")
    with pytest.raises(ValueError, match="max_memory must be .*: max_error of the largest tensor, 'matrix'"):
        compress("a.tv.safetensors", "never.tv.safetensors", max_error=0.1, max_memory=f"{2**28 + 2**24 + 2**20}")
    assert not Path("never.tv.safetensors").exists()
