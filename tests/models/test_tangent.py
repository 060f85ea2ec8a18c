"""Linearized networks: the formula, open_clip, timm and transformers encoders, and the kind of their vectors."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import Blobs, LinearizedNet, LinearNet, quiet_trainer
from torch import nn
from torch.func import functional_call
from tva.callbacks import TaskVectorCallback

from tva import MismatchError, TaskVector, open_weights, save_weights
from tva.cli.main import main
from tva.compose.apply import compose
from tva.models import ClipClassifier
from tva.models.clip import load_clip
from tva.models.tangent import linearize
from tva.vectors.extract import extract
from tva.vectors.header import Origin


def bert(**options):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **options
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False)


def image_net(name):
    torch.manual_seed(0)
    if name == "open_clip":
        return load_clip("tva-tiny")[0].visual
    return timm.create_model(name, num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


# transformers 5 renames it
BERT_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(transformers.BertModel, name)
)


def networks():
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.arange(15).reshape(3, 5)
    yield "open_clip", image_net("open_clip"), lambda net: net(images)
    yield "timm", image_net("vit_tiny_patch16_224"), lambda net: net(images)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    yield "bert eager", bert(attn_implementation="eager"), lambda net: net(tokens, attention_mask=mask)[0]
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    yield "llama", transformers.LlamaForCausalLM(config), lambda net: net(tokens, attention_mask=mask).logits
    yield "bert", bert(), lambda net: net(input_ids=tokens, attention_mask=mask).last_hidden_state


NETWORKS = {name: (net.double().eval(), call) for name, net, call in networks()}


def move(network, scale, seed):
    """Move all parameters by random amounts; give these amounts."""
    generator = torch.Generator().manual_seed(seed)
    moves = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            moves[name] = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(moves[name])
    return moves


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_network_and_its_directional_derivative_in_float64(name):
    network, call = copy.deepcopy(NETWORKS[name][0]), NETWORKS[name][1]
    linear = copy.deepcopy(network)
    linearize(linear)
    with torch.no_grad():
        torch.testing.assert_close(call(linear), call(network), rtol=1e-12, atol=1e-12)
    moves = move(linear, 0.05, seed=2)
    error = 1e-3 if name == "llama" else 1e-6  # its normalization is computed in float32, whatever the weights are
    with torch.no_grad():
        base = dict(network.named_parameters())

        def at(step):
            return call(lambda *a, **k: functional_call(network, {n: base[n] + step * moves[n] for n in base}, a, k))

        step = 1e-4
        slope = (at(step) - at(-step)) / (2 * step)
        torch.testing.assert_close(call(linear), at(0) + slope, rtol=error, atol=error)
        assert (at(1) - call(linear)).abs().max() > 3 * error  # the network itself is not linear
    with torch.inference_mode():  # as Lightning evaluates
        torch.testing.assert_close(call(linear), at(0) + slope, rtol=error, atol=error)


def test_at_its_base_it_is_the_network_bit_for_bit_on_the_same_kernels():
    network, call = bert(attn_implementation="eager").eval(), NETWORKS["bert eager"][1]
    linear = copy.deepcopy(network)
    linearize(linear)
    with torch.no_grad():
        assert torch.equal(call(linear), call(network))
    assert list(linear.state_dict()) == list(network.state_dict())
    assert torch.backends.mha.get_fastpath_enabled()


def test_it_is_linear_in_the_task_vectors():
    network, call = copy.deepcopy(NETWORKS["open_clip"][0]), NETWORKS["open_clip"][1]
    linearize(network)
    base = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    @torch.no_grad()
    def at(vectors):
        for name, parameter in network.named_parameters():
            parameter.copy_(base[name] + sum(coef * vector[name] for coef, vector in vectors))
        return call(network)

    one, two = ({n: torch.randn_like(p) for n, p in base.items()} for _ in range(2))
    zero = at([])
    both = at([(0.3, one), (-1.7, two)]) - zero
    torch.testing.assert_close(
        both, 0.3 * (at([(1, one)]) - zero) - 1.7 * (at([(1, two)]) - zero), rtol=1e-9, atol=1e-9
    )


def test_a_step_moves_only_the_tangent_part_and_reaches_every_parameter():
    network, call = copy.deepcopy(NETWORKS["timm"][0]).train(), NETWORKS["timm"][1]
    linearize(network)
    with torch.no_grad():
        before = call(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    (call(network) ** 2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    at_base = {name: tensor.clone() for name, tensor in network.forward._base.items()}
    optimizer.step()
    assert all(torch.equal(tensor, at_base[name]) for name, tensor in network.forward._base.items())
    change = 0.1 * sum((gradient**2).sum() for gradient in gradients.values())
    with torch.no_grad():
        after = call(network)
        # the loss is quadratic in the output, which is linear: its first-order change is exact to second order
        drop = 2 * (before * (before - after)).mean()
    torch.testing.assert_close(drop, change, rtol=1e-9, atol=0)


def test_a_copy_and_a_pickle_are_linearized_by_themselves():
    import pickle

    network, call = copy.deepcopy(NETWORKS["open_clip"][0]), NETWORKS["open_clip"][1]
    linearize(network)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        move(other, 0.1, seed=3)
        with torch.no_grad():
            assert not torch.equal(call(other), call(network))
    with pytest.raises(ValueError, match="linearized already"):
        linearize(network)


def test_moving_statistics_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    linearize(network)
    with pytest.raises(ValueError, match=r"statistics move, as those of '1' would. Use batch_norm='fold' or 'freeze'"):
        network(torch.randn(2, 3, 8, 8))
    assert network.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


def test_a_loss_inside_the_network_is_refused():
    network = copy.deepcopy(NETWORKS["llama"][0])
    linearize(network)
    tokens = torch.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match="Compute it from the logits, without passing labels"):
        network(tokens, labels=tokens)


def test_gradient_checkpointing_is_refused():
    for network, call, enable in (
        (*NETWORKS["open_clip"], lambda net: net.set_grad_checkpointing(True)),
        (*NETWORKS["bert"], lambda net: getattr(net, BERT_CHECKPOINTING)()),
    ):
        network = copy.deepcopy(network).train()
        linearize(network)
        enable(network)
        with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
            call(network)


def test_mixed_precision_is_near_float32():
    network, images = image_net("open_clip").eval(), torch.randn(3, 3, 32, 32)
    linearize(network)
    move(network, 0.02, seed=4)
    exact = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images)
        (rounded**2).mean().backward()
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- kinds of vectors


def vectors_of_two_kinds():
    base = {"w": torch.zeros(3), "v": torch.ones(2)}
    tuned = {"w": torch.arange(3.0), "v": torch.ones(2)}
    return base, TaskVector.between(base, tuned), TaskVector.between(base, tuned, origin=Origin(kind="tangent"))


def test_a_vector_keeps_its_kind_and_is_combined_only_with_its_own_kind():
    base, ordinary, tangent = vectors_of_two_kinds()
    tangent.save("t.tv.safetensors")
    ordinary.save("o.tv.safetensors")
    assert open_weights("t.tv.safetensors").metadata["tva.kind"] == "tangent"
    assert "tva.kind" not in open_weights("o.tv.safetensors").metadata
    tangent = TaskVector.load("t.tv.safetensors")
    for made in (tangent + tangent, -2 * tangent, tangent / 3, sum([tangent, tangent]), tangent.random_like(0)):
        assert made.origin.kind == "tangent"
    for mixed in (lambda: tangent + ordinary, lambda: ordinary - tangent):
        with pytest.raises(MismatchError, match=r"several: (tangent|ordinary): the left; .*the right\. .*as_kind"):
            mixed()
    assert (tangent.as_kind(None) + ordinary).origin.kind is None
    assert torch.equal((tangent.as_kind(None) + ordinary).apply_to(base)["w"], 2 * torch.arange(3.0))


def test_compose_refuses_a_mixture_and_marks_what_it_writes():
    base, ordinary, tangent = vectors_of_two_kinds()
    save_weights(base, "base.safetensors")
    paths = {}
    for name, vector in {"o": ordinary, "t": tangent}.items():
        paths[name] = f"{name}.tv.safetensors"
        vector.save(paths[name])
    arguments = ["base.safetensors", paths, "o + t", "out.safetensors"]
    with pytest.raises(MismatchError, match=r"several: ordinary: o; tangent: t\..*allow_other_kind"):
        compose(*arguments)
    compose(*arguments, allow_other_kind=True, max_memory="8GiB")
    assert "tva.kind" not in open_weights(arguments[3]).metadata
    for output in ("t.safetensors", "folder"):
        compose(arguments[0], {"t": paths["t"]}, "2 * t", output, max_memory="8GiB")
        assert open_weights(output).metadata["tva.kind"] == "tangent"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tangent")
    for name, tangent in (("tangent", True), ("ordinary", False)):
        trainer = quiet_trainer(TaskVectorCallback(), ModelCheckpoint(folder / name, filename="last"), max_epochs=2)
        trainer.fit(LinearizedNet(tangent), Blobs(seed=1))
    return folder


def edit_config(folder, vector, tmp_path, tangent=True, **options):
    config = {
        "model": {
            "class_path": "small_models.LinearizedNet",
            "init_args": {"tangent": tangent, **options.pop("model", {})},
        },
        "trainer": {"accelerator": "cpu"},
        "vectors": {"a": str(folder / vector)},
        "recipe": "a",
        "scaling_coef": 0.7,
        "targets": {"a": {"class_path": "small_models.Blobs", "init_args": {"seed": 1}}},
        "output": str(tmp_path / "out"),
        **options,
    }
    path = tmp_path / "edit.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["edit", "--config", str(path)]


def test_the_callback_marks_vectors_of_a_linearized_model(fitted):
    vector = TaskVector.load(fitted / "tangent/last.tv.safetensors")
    assert vector.origin.kind == "tangent"
    assert vector.names == set(LinearNet().net.state_dict())
    assert open_weights(fitted / "tangent/last.ckpt").metadata == {"tva.kind": "tangent"}
    assert TaskVector.load(fitted / "ordinary/last.tv.safetensors").origin.kind is None
    for kind in ("tangent", "ordinary"):
        base = str(next((fitted / kind).glob("base-*")))
        extract(base, str(fitted / kind / "last.ckpt"), str(fitted / f"{kind}.tv.safetensors"))
        extracted = TaskVector.load(fitted / f"{kind}.tv.safetensors")
        assert extracted.origin.kind == TaskVector.load(fitted / kind / "last.tv.safetensors").origin.kind


def accuracy_by_hand(vector, scaling_coef):
    network = LinearNet().net.double()
    base = {name: parameter.detach() for name, parameter in network.named_parameters()}
    moves = {name: scaling_coef * vector.deltas[name].double() for name in base}
    right = []
    for inputs, labels in Blobs(seed=1).test_dataloader():
        zero, plus, minus = (
            functional_call(network, {n: base[n] + step * moves[n] for n in base}, (inputs.double(),))
            for step in (0, 1e-4, -1e-4)
        )
        logits = zero + (plus - minus) / 2e-4
        right.append((logits.argmax(-1) == labels).double())
    return float(torch.cat(right).mean())


def test_an_edit_of_a_linearized_model_is_evaluated_in_it(fitted):
    vector = TaskVector.load(fitted / "tangent/last.tv.safetensors")
    for coef in (0.3, -0.5):
        main([*edit_config(fitted, "tangent/last.tv.safetensors", Path(), scaling_coef=coef)])
        report = json.loads(Path("out/edit.json").read_text())
        assert report["tasks"]["a"]["edited"]["value"] == pytest.approx(accuracy_by_hand(vector, coef), abs=1e-6)
    assert report["kind"] == "tangent"
    edited = open_weights("out/edited.safetensors")
    assert edited.metadata["tva.kind"] == "tangent"
    base = LinearNet().state_dict()
    torch.testing.assert_close(edited["net.0.weight"], base["net.0.weight"] - 0.5 * vector.deltas["0.weight"])


@pytest.mark.parametrize(
    ("kind", "tangent", "ending"), [("tangent", False, "tv.safetensors"), ("ordinary", True, "ckpt")]
)
def test_an_edit_refuses_the_other_kind_of_model_unless_allowed(fitted, capsys, kind, tangent, ending):
    config = edit_config(fitted, f"{kind}/last.{ending}", Path(), tangent)
    with pytest.raises(SystemExit):
        main(config)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{kind}: the vector a" in said
    assert "the model LinearizedNet" in said
    assert "allow_other_kind" in said
    main([*config, "--allow_other_kind", "true"])


def test_an_edit_of_a_linearized_model_starts_where_it_is_linear(fitted, capsys):
    with pytest.raises(SystemExit):
        main(edit_config(fitted, "tangent/last.tv.safetensors", Path(), model={"shift": 0.5}))
    assert "its base differs from them in '0.bias'" in " ".join(capsys.readouterr().err.split())


def test_weights_of_a_linearized_model_are_refused_by_an_ordinary_one():
    state = ClipClassifier().state_dict()
    edited = {name: value * 1.01 for name, value in state.items()}
    save_weights(edited, "edited.safetensors", {"tva.kind": "tangent"})
    with pytest.raises(ValueError, match=r"edited.safetensors' are those of a linearized model.*Set tangent: true"):
        ClipClassifier(weights="edited.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        linear = ClipClassifier(weights="edited.safetensors", tangent=True).encoder(images)
        expected = ClipClassifier(tangent=True)
        expected.load_state_dict(edited)
        assert torch.equal(linear, expected.encoder(images))
        assert not torch.allclose(linear, ClipClassifier().encoder(images), atol=1e-3)
