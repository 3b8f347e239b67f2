"""Int8Linear as a module, and the conversion of layers by hand."""

import copy

import pytest
import torch
from bigint8_kernels import reference
from torch import nn
from transformers.pytorch_utils import Conv1D

from bigint8 import Int8Config, Int8Linear, make_int8_linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_a_converted_layer_computes_what_the_definition_says(kind, dtype):
    torch.manual_seed(0)
    layer = (Conv1D(24, 40) if kind == "conv1d" else nn.Linear(40, 24, bias=kind == "linear")).to(dtype)
    int8 = make_int8_linear(layer, threshold=6.0)
    weight = layer.weight.detach().T if kind == "conv1d" else layer.weight.detach()
    q, scale = reference.quantize_rows(weight)
    assert torch.equal(int8.weight, q) and torch.equal(int8.scale, scale)
    assert int8.weight.dtype == torch.int8 and int8.weight.shape == (24, 40)
    x = torch.randn(2, 3, 40).to(dtype)
    expected = reference.int8_linear(x.view(6, 40), q, scale, layer.bias, 6.0, "auto", torch.float64).view(2, 3, 24)
    y = int8(x)
    assert y.shape == (2, 3, 24) and y.dtype == dtype
    assert (y.double() - expected).abs().max() <= 0.01 * expected.abs().max()
    with torch.no_grad():
        assert (y.float() - layer(x).float()).abs().max() <= 0.02 * layer(x).float().abs().max()


def test_scales_stay_float32_when_the_model_changes_dtype():
    model = nn.Sequential(make_int8_linear(nn.Linear(8, 4))).half()
    assert model[0].scale.dtype == torch.float32
    assert model[0].weight.dtype == torch.int8
    assert model[0].bias.dtype == torch.float16
    assert model(torch.randn(2, 8).half()).dtype == torch.float16


def test_a_layer_survives_copies_and_state_dicts():
    int8 = make_int8_linear(nn.Linear(8, 4))
    other = Int8Linear(8, 4)
    other.load_state_dict(int8.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(int8(x), other(x)) and torch.equal(int8(x), copy.deepcopy(int8)(x))


def test_a_gradient_is_refused():
    int8 = make_int8_linear(nn.Linear(8, 4))
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference"):
        int8(x)
    with torch.no_grad():
        assert int8(x).shape == (2, 4)


def test_other_modules_and_damaged_weights_are_refused():
    with pytest.raises(TypeError, match="Embedding"):
        make_int8_linear(nn.Embedding(3, 4))
    layer = nn.Linear(8, 4)
    layer.weight.data[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        make_int8_linear(layer)


def test_the_repr_says_how_the_layer_multiplies():
    text = repr(make_int8_linear(nn.Linear(8, 4), threshold=3.5))
    assert "in_features=8" in text and "threshold=3.5" in text


def test_a_config_round_trips_and_reads_well():
    config = Int8Config(threshold=4.0, skip_modules=["lm_head", "model.layers.0"], dtype="bfloat16")
    assert Int8Config.from_dict(config.to_dict()) == config
    assert Int8Config.from_dict({}) == Int8Config()
    assert "threshold=4.0" in repr(config) and "lm_head" in repr(config)


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": -1},
        {"threshold": float("nan")},
        {"dtype": "float64"},
        {"activations": "int4"},
        {"skip_modules": [""]},
        {"treshold": 6.0},
    ],
)
def test_a_wrong_config_is_refused_by_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Int8Config(**values)


def test_skipped_modules_are_found_by_name_prefix_and_last_component():
    assert Int8Config().skips("lm_head", head="lm_head")
    assert not Int8Config().skips("model.layers.0.mlp.up_proj", head="lm_head")
    config = Int8Config(skip_modules=["model.layers.1", "up_proj"])
    assert not config.skips("lm_head", head="lm_head")
    assert config.skips("model.layers.1.mlp.gate_proj", None)
    assert not config.skips("model.layers.10.mlp.gate_proj", None)
    assert config.skips("model.layers.10.mlp.up_proj", None)
