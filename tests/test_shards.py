"""Weights files written tensor by tensor: the bytes of `save_pretrained`, whatever the order and the interruptions."""

import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import ALL, FAMILIES, each_family
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from optimum_pgsvd import CheckpointError
from optimum_pgsvd.streaming import shards
from optimum_pgsvd.streaming.shards import ShardWriter


INDEX = "model.safetensors.index.json"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def state_on_disk(model) -> dict[str, torch.Tensor]:
    """What `save_pretrained` has left of a state dict when it splits it."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def meta_model(family):
    with torch.device("meta"):
        return family.model_class(family.config())


def weights(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if "safetensors" in path.name}


def shuffled(names, seed: int = 0) -> list[str]:
    return random.Random(seed).sample(list(names), len(names))


def fill(writer: ShardWriter, values: dict[str, torch.Tensor]) -> None:
    for name in shuffled(values):
        writer.write(name, values[name])


def save_at_once(folder, tensors: dict[str, torch.Tensor], max_shard_size: int | str = "50GB") -> None:
    """The oracle: the libraries' own split of real tensors and their own files."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, Path(folder, file), metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_parameters": 7, **split.metadata}, "weight_map": split.tensor_to_filename}
        Path(folder, INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    """Three shards at 200 bytes: a; b and c; d."""
    source = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 8), "b": (6, 4), "c": (10,), "d": (3, 9)}
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


@pytest.fixture
def writer(tmp_path, values) -> ShardWriter:
    made = ShardWriter(tmp_path, like(values), 200)
    made.allocate()
    return made


# The bytes of save_pretrained


@each_family
@pytest.mark.parametrize("max_shard_size", [3000, "20KB", "100KB", "1MB"])
def test_a_model_written_in_any_order_is_the_one_save_pretrained_writes(tmp_path, family, max_shard_size):
    model, meta = family.build(), meta_model(family)
    model.save_pretrained(tmp_path / "stock", max_shard_size=max_shard_size)
    writer = ShardWriter(tmp_path / "ours", state_on_disk(meta), max_shard_size)
    writer.allocate()
    fill(writer, state_on_disk(model))
    writer.write_index(meta.num_parameters())
    assert weights(tmp_path / "ours") == weights(tmp_path / "stock")


def test_the_families_are_split_into_one_file_and_into_many():
    counts = {len(ShardWriter("", state_on_disk(meta_model(family)), "20KB").shards) for family in ALL}
    assert max(counts) > 10
    assert len(ShardWriter("", state_on_disk(meta_model(FAMILIES["llama"])), "1MB").shards) == 1


def test_views_of_one_storage_come_into_one_file_on_the_meta_device_too():
    """transformers splits a layer's experts from one tensor when it saves, and huggingface_hub keeps them together."""
    state = state_on_disk(meta_model(FAMILIES["mixtral"]))
    experts = [name for name in state if ".layers.0." in name and name.endswith("w1.weight")]
    writer = ShardWriter("", state, "5KB")
    assert len(experts) == 4
    assert len({writer.file_of[name] for name in experts}) == 1
    assert len({writer.file_of[name] for name in ShardWriter("", like(state), "5KB").file_of}) > 4


@st.composite
def layouts(draw) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Names, and for each a storage with its dtype and shape; names that draw the same storage get views of it."""
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    names = draw(st.lists(text, unique=True, max_size=12))
    shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    storages = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shape), min_size=1, max_size=8))
    owners = [draw(st.integers(0, len(storages) - 1)) for _ in names]
    return [(name, *storages[owner], owner) for name, owner in zip(names, owners, strict=True)]


def build(layout, device: str) -> dict[str, torch.Tensor]:
    """Tensors of a layout, those of odd storages strided; real ones hold any bits their dtype may have."""
    tensors, source = {}, torch.Generator().manual_seed(0)
    for owner in {owner for *_, owner in layout}:
        names = [name for name, *_, of in layout if of == owner]
        dtype, shape = next((dtype, shape) for _, dtype, shape, of in layout if of == owner)
        whole = (*shape, len(names)) if owner % 2 else (len(names), *shape)
        size = torch.Size(whole).numel() * dtype.itemsize
        bits = torch.randint(2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=source)
        base = bits.to(device).view(dtype).reshape(whole)
        tensors |= dict(zip(names, base.movedim(-1, 0) if owner % 2 else base, strict=True))
    return {name: tensors[name] for name, *_ in layout}


@settings(deadline=None, max_examples=200)
@given(layouts(), st.integers(1, 300) | st.just("50GB"), st.sampled_from([16, shards.PIECE]))
@example([(str(dtype), dtype, (2,), owner) for owner, dtype in enumerate(DTYPES)], "50GB", 16)
@example([(name, torch.float32, (3 * (name in "bc"),), owner) for owner, name in enumerate("abcd")], 12, 16)
@example([(f"layer.{number}", torch.float16, (7,), number // 3) for number in (0, 3, 1, 4, 2, 5)], 40, 16)
def test_any_tensors_come_out_as_the_libraries_write_them(layout, max_shard_size, piece):
    with (
        tempfile.TemporaryDirectory() as stock,
        tempfile.TemporaryDirectory() as ours,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setattr(shards, "PIECE", piece)
        values = build(layout, "cpu")
        save_at_once(stock, values, max_shard_size)
        writer = ShardWriter(ours, build(layout, "meta"), max_shard_size)
        writer.allocate()
        fill(writer, values)
        writer.write_index(7)
        assert weights(ours) == weights(stock)


def test_names_and_dtypes_decide_the_order_of_a_file_and_the_mapping_does_not(tmp_path, values):
    values |= {'é\n"\\/\x7f': torch.ones(1, dtype=torch.bool), "Z": torch.ones(3, dtype=torch.int64)}
    save_at_once(tmp_path, values)
    stock = Path(tmp_path, "model.safetensors").read_bytes()
    for seed in range(3):
        order = {name: values[name] for name in shuffled(values, seed)}
        assert stock.startswith(ShardWriter("", like(order)).shards["model.safetensors"].header)


def test_without_tensors_there_is_no_file(tmp_path):
    writer = ShardWriter(tmp_path, {})
    writer.allocate()
    writer.write_index(0)
    writer.sync()
    assert os.listdir(tmp_path) == []


# Values


@pytest.mark.parametrize("piece", [1, 4, 16, 100, 10**6])
def test_strided_tensors_are_written_piece_by_piece(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(shards, "PIECE", piece)
    base = torch.arange(2 * 3 * 5 * 7, dtype=torch.float32).reshape(2, 3, 5, 7)
    values = {
        "transposed": base.permute(3, 1, 0, 2),
        "sliced": base[:, 1:, ::2],
        "one row": base[:1].transpose(1, 3),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 9),
        "scalar": base[1, 2, 3, 4],
        "one element": torch.arange(6).reshape(2, 3).t()[1:2, :1],
        "reversed vector": base.flatten()[::11],
        "parameter": torch.nn.Parameter(base[0].transpose(0, 1)),
    }
    writer = ShardWriter(tmp_path, like(values))
    writer.allocate()
    fill(writer, values)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], values[name]) for name in values)


def test_copies_are_no_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 64)
    for strided in (torch.ones(40, 30).t(), torch.ones(1, 7, 33).transpose(1, 2), torch.ones(300)[::2]):
        sizes = [piece.nbytes for piece in shards.pieces(strided)]
        assert max(sizes) <= 64
        assert sum(sizes) == strided.nbytes
    whole = torch.ones(40, 30)
    assert [piece.nbytes for piece in shards.pieces(whole)] == [whole.nbytes]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("make", ["torch.ones(4096, 4096)", "torch.ones(4096, 4096).t()"])
def test_writing_takes_no_memory_of_the_tensors_size(tmp_path, make):
    code = f"""
        import resource, torch
        from optimum_pgsvd.streaming.shards import ShardWriter
        tensors = {{name: torch.empty(4096, 4096, device="meta") for name in "abc"}}
        writer = ShardWriter({str(tmp_path)!r}, tensors)
        writer.allocate()
        tensor = {make}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer.write("b", tensor)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 40, f"{result.stdout} MB more for a tensor of 64 MB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(tmp_path, monkeypatch, values, writer):
    monkeypatch.setattr(shards, "PIECE", 64)
    fill(writer, {name: value.t().cuda().t() if value.dim() == 2 else value.cuda() for name, value in values.items()})
    for file, shard in writer.shards.items():
        written = load_file(tmp_path / file)
        assert all(torch.equal(written[name], values[name]) for name in shard.starts)


# Interruptions


def test_a_second_run_takes_up_the_files_of_the_first(tmp_path, values, writer):
    stock = tmp_path / "stock"
    stock.mkdir()
    save_at_once(stock, values, 200)
    writer.write("a", values["a"])
    writer.write("c", torch.zeros(10))
    again = ShardWriter(tmp_path, like(values), 200)
    again.allocate()
    for name in ("d", "c", "b", "c"):
        again.write(name, values[name])
    again.write_index(7)
    again.allocate()
    assert weights(tmp_path) == weights(stock)


def test_files_are_allocated_whole_or_not_at_all(tmp_path, values, writer, monkeypatch):
    folder, complete, replace = tmp_path / "interrupted", weights(tmp_path), os.replace

    def interrupted(source, target):
        if "00002" in target:
            raise KeyboardInterrupt
        replace(source, target)

    again = ShardWriter(folder, like(values), 200)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.allocate()
    assert [file for file in os.listdir(folder) if file.endswith(".safetensors")] == [
        "model-00001-of-00003.safetensors"
    ]
    again.allocate()
    assert weights(folder) == complete


def test_room_for_tensors_takes_no_disk_until_they_are_written(tmp_path):
    writer = ShardWriter(tmp_path, {"large": torch.empty(2**33, dtype=torch.bfloat16, device="meta")})
    writer.allocate()
    found = os.stat(tmp_path / "model.safetensors")
    assert found.st_size == writer.shards["model.safetensors"].size > 2**34
    assert found.st_blocks * 512 < 2**20


def test_the_files_written_since_the_last_time_are_synced(tmp_path, values, writer, monkeypatch):
    synced, fsync = [], os.fsync
    names = {os.stat(tmp_path / file).st_ino: file for file in (*os.listdir(tmp_path), "")}
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(names[os.fstat(descriptor).st_ino]), fsync(descriptor))
    )
    writer.sync()
    assert set(synced) == {"", *writer.shards}
    for written in (["b", "c"], ["d", "a"], []):
        synced.clear()
        for name in written:
            writer.write(name, values[name])
        writer.sync()
        assert sorted(synced) == sorted({writer.file_of[name] for name in written})


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the name of a descriptor")
def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, writer, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_replace(source, target):
        events.append(("replace", source, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    writer.write_index(7)
    index = str(tmp_path / INDEX)
    assert events == [("fsync", f"{index}.part"), ("replace", f"{index}.part", index), ("fsync", str(tmp_path))]


def test_what_could_not_be_synced_is_synced_the_next_time(values, writer, monkeypatch):
    calls = []

    def failing(descriptor):
        calls.append(descriptor)
        raise OSError("no space left on device")

    writer.sync()
    writer.write("a", values["a"])
    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            writer.sync()
    assert len(calls) == 2


# Mistakes


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("e", torch.zeros(5, 8), "there is no tensor e among the 4 to be written"),
        (
            "a",
            torch.zeros(8, 5),
            r"a was to be torch.float32 of shape \(5, 8\), it is torch.float32 of shape \(8, 5\)",
        ),
        ("a", torch.zeros(40), r"it is torch.float32 of shape \(40,\)"),
        ("a", torch.zeros(5, 8, dtype=torch.int32), r"it is torch.int32 of shape \(5, 8\)"),
        ("a", torch.zeros(5, 8, dtype=torch.bfloat16), "it is torch.bfloat16"),
        ("a", torch.empty(5, 8, device="meta"), "a is on the meta device and has no values"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, values, writer, name, tensor, message):
    fill(writer, values)
    before = weights(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        writer.write(name, tensor)
    assert weights(tmp_path) == before


def test_writing_before_allocating_names_the_file(tmp_path, values):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        ShardWriter(tmp_path, like(values)).write("a", values["a"])


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "size", "garbage", "empty"])
def test_a_file_of_other_tensors_is_refused_and_kept(tmp_path, values, change):
    other = dict(values)
    if change == "name":
        other["e"] = other.pop("c")
    elif change == "dtype":
        other["c"] = other["c"].int()
    elif change == "shape":
        other["c"] = other["c"].reshape(5, 2)
    ShardWriter(tmp_path, like(other), 200).allocate()
    first, second, third = sorted(tmp_path.iterdir())
    first.unlink()
    if change == "size":
        os.truncate(second, second.stat().st_size - 1)
    elif change in ("garbage", "empty"):
        second.write_bytes(b"garbage" * 50 if change == "garbage" else b"")
    before = weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is there already.*remove it"):
        ShardWriter(tmp_path, like(values), 200).allocate()
    assert weights(tmp_path) == before


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (200, "50GB", "model-00001-of-00003.safetensors"),
        ("50GB", 200, "model.safetensors"),
        (100, 200, "model-00001-of-00004.safetensors"),
        (None, "50GB", INDEX),
    ],
)
def test_weights_that_are_split_in_another_way_are_refused(tmp_path, values, before, after, named):
    if before is None:
        (tmp_path / INDEX).write_text("{}")
    else:
        ShardWriter(tmp_path, like(values), before).allocate()
    present = weights(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds {named}, .* another max_shard_size"):
        ShardWriter(tmp_path, like(values), after).allocate()
    assert weights(tmp_path) == present


def test_files_that_are_no_weights_of_the_model_do_not_matter(tmp_path, values):
    for file in ("config.json", "adapter_model.safetensors", "model.safetensors.part", "report.json"):
        (tmp_path / file).write_text("{}")
    ShardWriter(tmp_path, like(values)).allocate()
    assert (tmp_path / "model.safetensors").stat().st_size > sum(value.nbytes for value in values.values())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float4_e2m1fn_x2])
def test_dtypes_that_cannot_be_written_are_refused_at_the_start(values, dtype):
    with pytest.raises(CheckpointError, match=str(dtype)):
        ShardWriter("", like(values) | {"e": torch.empty(4, dtype=dtype, device="meta")})
