"""Tensors over the bytes of a safetensors file equal those that safetensors loads, and copy nothing."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from ctxcomp_rag.index.stored_tensors import stored_tensors

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor([1, -2], dtype=torch.int8),
           "c": torch.randn(3, 1, 2).to(torch.bfloat16), "d": torch.tensor(5), "e": torch.empty(0, 4),
           "f": torch.randn(4).to(torch.float8_e4m3fn), "g": torch.tensor([True, False])}


@pytest.mark.parametrize("shift", range(5))
def test_they_equal_those_of_safetensors_wherever_the_bytes_lie(shift: int) -> None:
    data = safetensors.torch.save(TENSORS, metadata={"about": "x"})
    within = memoryview(bytes(shift) + data)[shift:]
    expected, (got, metadata) = safetensors.torch.load(data), stored_tensors(within)
    assert metadata == {"about": "x"}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name].double(), tensor.double())


def test_nothing_is_copied() -> None:
    data = bytearray(safetensors.torch.save({"a": torch.zeros(4)}))
    tensor = stored_tensors(data)[0]["a"]
    data[-4:] = torch.ones(1).numpy().tobytes()
    assert tensor.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_a_cut_file_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=r"expected a safetensors file|expected a header|does not lie at"):
        stored_tensors(safetensors.torch.save(TENSORS)[:cut])
