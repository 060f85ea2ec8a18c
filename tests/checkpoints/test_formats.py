"""Folders that trainers write (torch.distributed.checkpoint, DeepSpeed ZeRO) and repositories on the hub."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from small_models import free_port
from small_states import save_distributed
from small_zero import FULL, save_zero
from torch import nn

from tva import fingerprint, open_weights, save_weights

STATE = {
    "a.w": torch.arange(15.0).reshape(5, 3),
    "a.b": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 2),
}


def same(weights, state):
    assert fingerprint(weights) == fingerprint(state)
    for name, tensor in state.items():
        assert weights.spec(name) == (tensor.dtype, tensor.shape)
        flat = tensor.reshape(-1)
        for start in range(len(flat)):
            stop = len(flat) - (len(flat) - start) // 3
            assert torch.equal(weights.slice(name, start, stop), flat[start:stop])


# --- torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("section", ["model", "state_dict", None])
def test_distributed_folders_give_their_weights_without_the_section_in_front(section):
    optimizer = {"state": {"a.w": torch.ones(2)}, "lr": 0.1}
    content = {section: STATE, "optimizer_0": optimizer, "epoch": 3} if section else STATE
    weights = open_weights(save_distributed(content, "."))
    same(weights, STATE)
    assert weights.info.format == "torch.distributed checkpoint"
    said = f"the weights are those under {section!r}, of {section!r}, 'optimizer_0'"
    assert weights.info.notes == ((said,) if section else ())


def save_sharded(rank, folder, port):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    mesh = init_device_mesh("cpu", (2,))
    columns = distribute_tensor(torch.arange(12.0).reshape(3, 4), mesh, [Shard(1)])
    if rank == 0:
        torch.save({**net.state_dict(), "columns": torch.arange(12.0).reshape(3, 4)}, folder / "full.pt")
    fully_shard(net, mesh=mesh)
    dcp.save({"state_dict": {**net.state_dict(), "columns": columns}, "epoch": 3}, checkpoint_id=folder / "sharded")
    dist.destroy_process_group()


def test_fsdp2_shards_of_two_ranks_are_put_together(tmp_path):
    mp.start_processes(save_sharded, (tmp_path, free_port()), nprocs=2, start_method="fork")
    weights = open_weights("sharded")
    assert len(weights.entry("0.weight").chunks) == 2
    same(weights, torch.load("full.pt", weights_only=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_damage_to_a_distributed_folder_is_named():
    folder = save_distributed({"model": STATE}, Path("whole"))
    (shard,) = folder.glob("*.distcp")
    for size in range(0, shard.stat().st_size, 997):
        copy = shutil.copytree(folder, Path(f"cut-{size}"))
        os.truncate(copy / shard.name, size)
        weights = open_weights(copy)
        with pytest.raises(ValueError, match="is damaged at bytes|ended at byte"):
            fingerprint(weights)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names the shard '{shard.name}', which is not in"):
        open_weights(folder)
    (folder / ".metadata").write_bytes(b"hello")
    with pytest.raises(ValueError, match="is damaged, or not written by torch.distributed.checkpoint"):
        open_weights(folder)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_distributed_metadata_is_never_executed():
    Path(".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil(Path("executed"))}))
    with pytest.raises(ValueError, match="is refused: .*mkdir'.*which is not part of such a checkpoint"):
        open_weights(".")
    assert not Path("executed").exists()


# --- DeepSpeed: the layout that zero_to_fp32.py of DeepSpeed 0.19.8 reads; real folders gave the same bytes as it


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_partitions_are_put_together_in_full_precision(stage, world):
    folder = save_zero(Path(), stage, world)
    for path in (folder, folder / "global_step3"):
        weights = open_weights(path)
        same(weights, FULL)
        assert weights.info.format == f"DeepSpeed checkpoint, ZeRO stage {stage}"


def test_a_deepspeed_folder_that_cannot_be_read_exactly_is_refused_with_the_command():
    folder = save_zero(Path("split"), 2)
    (folder / "global_step3" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ValueError, match=r"tensor, pipeline or expert ranks.*\n?.*zero_to_fp32.py .* OUTPUT"):
        open_weights(folder)
    folder = save_zero(Path("lacking"), 2)
    (folder / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"written by 2 ranks, and 1 '…_optim_states.pt' are there"):
        open_weights(folder)
    folder = save_zero(Path("gap"), 2)
    (folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the '…_optim_states.pt' of 1 of 2 ranks, the first of them 0"):
        open_weights(folder)
    folder = save_zero(Path("other"), 3)
    path = folder / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.ones(3)]}
    torch.save({"optimizer_state_dict": state}, path)
    with pytest.raises(ValueError, match=r"parameters of 16 elements a rank are stored as 3, 16"):
        open_weights(folder)
    (folder / "latest").write_text("global_step9")
    with pytest.raises(FileNotFoundError, match="names 'global_step9', which is not a folder"):
        open_weights(folder)


# --- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: a folder of repositories, from which files are copied into a cache one by one."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = Path(f"cache/snapshots/{commit}")
    asked = []

    def download(repository, name, *, revision=None, local_files_only=False):
        asked.append((name, revision))
        source = Path(f"hub/{repository}")
        if not source.exists() or (source / f"{name}.unreachable").exists():
            if not local_files_only:
                asked.append("the network")
            raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")
        if not (source / name).exists():
            raise EntryNotFoundError(f"no {name}")
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(source / name, cache / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = Path("hub/owner/net")
    folder.mkdir(parents=True)
    return folder, cache, asked, commit


def test_only_the_weights_of_hub_repositories_are_downloaded(hub):
    folder, cache, asked, _ = hub
    save_weights(STATE, folder / "model.safetensors")
    torch.save(STATE, folder / "pytorch_model.bin")
    (folder / "README.md").touch()
    for path in ("hf://owner/net@main", Path("hf://owner/net@main")):
        same(open_weights(path), STATE)
    assert [file.name for file in cache.iterdir()] == ["model.safetensors"]
    assert set(asked) == {("model.safetensors", "main")}
    same(open_weights("hf://owner/net/pytorch_model.bin"), STATE)


def test_hub_shards_are_of_one_commit(hub):
    folder, _, asked, commit = hub
    save_weights({"a.w": STATE["a.w"]}, folder / "model-1.safetensors")
    save_weights({n: t for n, t in STATE.items() if n != "a.w"}, folder / "model-2.safetensors")
    shards = {name: "model-1.safetensors" if name == "a.w" else "model-2.safetensors" for name in STATE}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    same(open_weights("hf://owner/net"), STATE)
    assert asked[-2:] == [("model-1.safetensors", commit), ("model-2.safetensors", commit)]

    (folder / "model-2.safetensors.unreachable").touch()  # then no other format may take the place of this one
    torch.save(STATE, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model-2.safetensors is not in the local cache"):
        open_weights("hf://owner/net")


def test_a_hub_out_of_reach_is_asked_once(hub):
    _, _, asked, _ = hub
    with pytest.raises(FileNotFoundError, match="repository owner/other cannot be reached"):
        open_weights("hf://owner/other")
    assert asked.count("the network") == 1


def test_hub_adapters_need_their_base(hub):
    folder, cache, *_ = hub
    (folder / "adapter_config.json").write_text("{}")
    save_weights(STATE, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        open_weights("hf://owner/net")
    assert (cache / "adapter_model.safetensors").exists()


def test_what_the_hub_does_not_have_is_said(hub):
    folder, *_ = hub
    with pytest.raises(FileNotFoundError, match=r"repository owner/net holds none of .*hf://owner/net/FILE"):
        open_weights("hf://owner/net")
    with pytest.raises(FileNotFoundError, match="repository owner/net at v2 holds no file x.bin"):
        open_weights("hf://owner/net@v2/x.bin")
    with pytest.raises(FileNotFoundError, match="repository owner/other cannot be reached, .*hf download owner/other"):
        open_weights("hf://owner/other")
    with pytest.raises(FileNotFoundError, match=r"x.bin is not in the local .*hf download owner/other --revision v2$"):
        open_weights("hf://owner/other@v2/x.bin")
    with pytest.raises(ValueError, match="is not a path on the hub; write hf://owner/name@revision/file"):
        open_weights("hf://net")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no file adapter_model.bin"):
        open_weights("hf://owner/net/adapter_config.json")


def test_tensors_of_a_zero_folder_that_are_named_by_numbers_are_refused():
    folder = save_zero(Path("zero"), 2)
    file = folder / "global_step3/mp_rank_00_model_states.pt"
    model = torch.load(file, weights_only=True)
    model["module"][5] = model["module"].pop("bn.n")
    model["buffer_names"] = ["bn.mean", 5]
    torch.save(model, file)
    with pytest.raises(ValueError, match=r"zero is a DeepSpeed checkpoint that cannot be read: .*'int'"):
        open_weights(folder)
