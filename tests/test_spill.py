"""Activations in files: the same values, the files' slots used again, and memory given back."""

import os
from pathlib import Path

import pytest
import torch
from models import generator
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from optimum_pgsvd.streaming import spill as module
from optimum_pgsvd.streaming.spill import Spill, address


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
MIB = 2**20


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def mapped():
    """Bytes of mapped files in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def lies_in_file(tensor):
    """Whether a tensor's memory is that of a mapped file without a name."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= place < stop:
            return "(deleted)" in line
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_put_into_a_file_keeps_values_shape_and_dtype(dtype, tmp_path):
    spill = Spill(tmp_path, 0)
    tensor = drawn(3, 50, 70, dtype=dtype)
    moved = spill.put(tensor)
    assert lies_in_file(moved)
    assert not lies_in_file(tensor)
    assert moved.dtype == dtype
    assert torch.equal(moved, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        drawn(40, 50).T,
        drawn(4, 5, 6, 7).permute(2, 0, 3, 1),
        drawn(6, 10, 20)[2:4],
        drawn(1, 30)[:, :1],
        drawn(()),
    ],
    ids=["transposed", "permuted", "rows", "one element", "scalar"],
)
def test_strides_are_kept(tensor, tmp_path):
    moved = Spill(tmp_path, 0).put(tensor)
    assert lies_in_file(moved)
    assert moved.stride() == tensor.stride()
    assert torch.equal(moved, tensor)


def test_a_tensor_with_gaps_stays_where_it_is(tmp_path):
    tensor = drawn(8, 10)[:, ::2]
    assert Spill(tmp_path, 0).put(tensor) is tensor


def test_the_first_stay_in_memory(tmp_path):
    spill = Spill(tmp_path, 2 * 4000)
    tensors = [drawn(1000, seed=seed) for seed in range(3)]
    kept = [spill.put(tensor) for tensor in tensors]
    assert kept[0] is tensors[0]
    assert kept[1] is tensors[1]
    assert lies_in_file(kept[2])
    assert (spill.held, spill.spilled) == (8000, 4096)
    del tensors[0], kept[0]
    assert spill.held == 4000
    again = drawn(1000, seed=3)
    assert spill.put(again) is again


def test_what_is_kept_already_is_not_moved_again(tmp_path):
    spill = Spill(tmp_path, 4000)
    held, moved = spill.put(drawn(1000)), spill.put(drawn(1000, seed=1))
    for kept in (held, moved):
        assert spill.put(kept) is kept
        view = kept.view(10, 100)
        assert spill.put(view) is view
    assert (spill.held, spill.spilled) == (4000, 4096)


def test_a_tensor_in_the_place_of_one_that_is_gone_is_a_new_one(tmp_path):
    spill = Spill(tmp_path, 4000)
    for seed in range(3):  # memory that was freed is handed out again at the same address
        held = spill.put(drawn(1000, seed=seed))
        moved = spill.put(drawn(1000, seed=seed))
        assert (spill.held, spill.spilled) == (4000, 4096)
        assert spill._kept == {address(held), address(moved)}
        del held, moved
        assert (spill.held, spill.spilled, spill._kept) == (0, 0, set())


def test_a_view_takes_what_it_keeps_alive(tmp_path):
    spill = Spill(tmp_path, 4000)
    assert lies_in_file(spill.put(drawn(2000)[:10]))
    kept = spill.put(drawn(1000)[:10])
    assert not lies_in_file(kept)
    assert spill.held == 4000


def test_a_slot_is_used_again_once_all_views_are_gone(tmp_path):
    spill = Spill(tmp_path, 0)
    moved = spill.put(drawn(1000))
    place, view = moved.data_ptr(), moved[500:]
    del moved
    assert spill.spilled == 4096
    other = spill.put(drawn(1000, seed=1))
    assert other.data_ptr() != place
    assert torch.equal(view, drawn(1000)[500:])
    del view
    third = spill.put(drawn(1000, seed=2))
    assert third.data_ptr() == place
    assert torch.equal(third, drawn(1000, seed=2))
    assert torch.equal(other, drawn(1000, seed=1))


def test_files_are_as_many_as_they_must_be(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 4 * 4096)
    spill = Spill(tmp_path, 0)
    for _ in range(5):  # more than fit a file, but never at once
        kept = [spill.put(drawn(1000, seed=seed)) for seed in range(6)]
        assert all(torch.equal(tensor, drawn(1000, seed=seed)) for seed, tensor in enumerate(kept))
        del kept
    assert [segment.size for segment in spill._segments] == [4 * 4096, 4 * 4096]
    large = spill.put(drawn(10000))
    assert torch.equal(large, drawn(10000))
    assert spill._segments[-1].size == 10 * 4096


def test_values_may_be_changed_in_place(tmp_path):
    moved = Spill(tmp_path, 0).put(drawn(1000))
    moved += 1
    assert torch.equal(moved, drawn(1000) + 1)


def test_nothing_is_left_in_the_folder(tmp_path):
    spill = Spill(tmp_path, 0)
    moved = spill.put(drawn(1000))
    assert os.listdir(tmp_path) == []
    del spill
    assert torch.equal(moved, drawn(1000))


def test_memory_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLACK", 8 * MIB)
    spill, before = Spill(tmp_path, 0), mapped()
    kept = [spill.put(torch.full((MIB,), float(number))) for number in range(10)]
    assert spill.spilled == 40 * MIB
    assert mapped() - before < 2 * MIB  # written around the mapping
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(kept))
    assert mapped() - before >= 40 * MIB  # reading brought it in
    kept += [spill.put(torch.zeros(MIB)) for _ in range(3)]
    assert mapped() - before < 2 * MIB  # out again, after some more has moved
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(kept[:10]))
    del kept
    assert mapped() - before < 2 * MIB
    assert spill.spilled == 0


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    spill = Spill(tmp_path, 0)
    spill.put(drawn(1000))

    class Full:
        def seek(self, start):
            pass

        def write(self, values):
            raise OSError(28, "No space left on device")

    spill._segments[0]._file = Full()
    with pytest.raises(OSError, match="No space left"):
        spill.put(drawn(1000))


def test_a_write_that_takes_less_goes_on(tmp_path):
    spill = Spill(tmp_path, 0)
    spill.put(drawn(10))
    whole = spill._segments[0]._file

    class Slow:
        seek = whole.seek

        def write(self, values):
            return whole.write(values[:1000])

    spill._segments[0]._file = Slow()
    assert torch.equal(spill.put(drawn(1000)), drawn(1000))


# As a hook


class Layer(nn.Module):
    """Gives whatever it is told to."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """Runs a function as a module whose outputs are kept, and says what there was and what came out."""
    monkeypatch.setattr(module, "SMALLEST", 4000)
    spill = Spill(tmp_path, 0)

    def run(function, *args):
        layer = Layer(function)
        layer.register_forward_hook(spill.keep)
        return layer(*args)

    return run


def test_new_large_outputs_are_moved_and_nothing_else(keeping):
    large, small, given = drawn(1000), drawn(999), drawn(1000, seed=1)
    weight, meta = nn.Parameter(drawn(1000)), torch.empty(1000, device="meta")
    outputs = keeping(lambda x: (large, [small, x, x.view(10, 100), weight, meta], {"n": 3, "none": None}), given)
    assert lies_in_file(outputs[0])
    assert torch.equal(outputs[0], large)
    for output, expected in zip(outputs[1], [small, given, None, weight, meta], strict=True):
        assert expected is None or output is expected
    assert outputs[1][2].data_ptr() == given.data_ptr()
    assert outputs[2] == {"n": 3, "none": None}


def test_outputs_of_transformers_models_keep_their_class(keeping):
    states = drawn(4, 500)
    outputs = keeping(lambda: BaseModelOutput(last_hidden_state=states))
    assert type(outputs) is BaseModelOutput
    assert lies_in_file(outputs.last_hidden_state)
    assert torch.equal(outputs[0], states)


def test_the_outputs_of_a_module_are_not_moved_again_by_the_one_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 0)
    spill = Spill(tmp_path, 0)
    layers = nn.Sequential(Layer(lambda x: x + 1), nn.Dropout(), nn.Identity()).eval()
    for layer in layers.modules():
        layer.register_forward_hook(spill.keep)
    outputs = layers(drawn(1000))
    assert torch.equal(outputs, drawn(1000) + 1)
    assert spill._segments[0].used == 4096
