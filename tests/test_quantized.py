"""Factors are plain linears: what acts on a linear acts on them."""

import pytest
import torch
from models import FAMILIES

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.modeling_pgsvd import low_rank_layers


each_storage = pytest.mark.parametrize("storage", ["factors", "pivoted"])


@each_storage
def test_torchao_quantizes_both_factors_of_every_layer(storage):
    quantization = pytest.importorskip("torchao.quantization")
    family = FAMILIES["llama"]
    model, batch = family.build(), family.batches(1)[0]
    config = PGSVDConfig(parameter_reduction=0.3, dataset=family.batches(4), storage=storage)
    PGSVDCompressor(config).compress(model)
    with torch.no_grad():
        before = model(**batch).logits
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        after = model(**batch).logits
    for layer in low_rank_layers(model).values():
        assert all(type(inner.weight.data).__name__ == "Int8Tensor" for inner in layer.linears().values())
        assert len(layer.linears()) == 2
    # Eight bits a weight: a rounding of at most 1/254 of the largest entry of each row, over two blocks.
    assert 0 < (after - before).norm() / before.norm() < 0.1


@each_storage
def test_torchao_in_four_bits_takes_ranks_that_are_multiples_of_its_group(storage):
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    scheme = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(8))
    family = FAMILIES["llama"]
    batch, config = family.batches(1)[0], {"solver": "svd", "storage": storage}
    odd, fit = (family.build() for _ in range(2))
    PGSVDCompressor(PGSVDConfig(ranks={"*": 9}, **config)).compress(odd)
    with pytest.raises(AssertionError, match="divisible"):
        quantization.quantize_(odd, scheme)
    PGSVDCompressor(PGSVDConfig(0.3, rank_multiple=8, **config)).compress(fit)
    with torch.no_grad():
        before = fit(**batch).logits
        quantization.quantize_(fit, scheme)
        after = fit(**batch).logits
    for layer in low_rank_layers(fit).values():
        assert all(hasattr(inner.weight, "qdata") for inner in layer.linears().values())
    # Four bits a weight: a rounding of at most 1/14 of the largest entry of each group, over two blocks.
    assert 0 < (after - before).norm() / before.norm() < 0.5


@each_storage
def test_dtype_moves_act_on_both_factors(storage):
    family = FAMILIES["llama"]
    model = family.build()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, solver="svd", storage=storage)).compress(model)
    model.to(torch.bfloat16)
    for layer in low_rank_layers(model).values():
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
        assert layer.weight.dtype == torch.bfloat16
        assert {buffer.dtype for buffer in layer.buffers()} <= {torch.int32}
