"""Layers of one input as one product: the same numbers, in the memory that they took apart."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.device import TEST_DEVICE
from tests.engine.tiny import tiny_decoder
from tests.models.folders import CONFIG, tensors_of, write_single
from vdiff_kserve.models import Decoder, load_decoder, loader
from vdiff_kserve.models.joined_linear import JoinedLinear, gains_from_joining
from vdiff_kserve.models.moe import MoEConfig


def joinable_modules(decoder: Decoder) -> list[JoinedLinear]:
    return [module for module in decoder.modules() if isinstance(module, JoinedLinear)]


def bytes_of(decoder: Decoder) -> int:
    """Memory of all parameters, each piece once."""
    storages = [parameter.untyped_storage() for parameter in decoder.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_a_product_has_what_the_layers_give(qkv_bias: bool) -> None:
    experts = MoEConfig(num_experts=4, experts_per_token=2, expert_size=16, shared_size=24)
    decoder = tiny_decoder(qkv_bias=qkv_bias, moe=experts, dense_layers=frozenset({0}))
    before = copy.deepcopy(decoder.state_dict())
    decoder.join_layers()
    after = decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    modules = joinable_modules(decoder)
    assert len(modules) == 4, "attention, MLP, attention, and the shared expert"
    x = torch.randn(3, 32, device=TEST_DEVICE)
    for module in modules:
        layers = [module.get_submodule(name) for name in module.joinable]
        assert module.is_joined
        apart = torch.cat([layer(x) for layer in layers], dim=-1)
        torch.testing.assert_close(module.multiply_joined(x), apart)


def test_joined_layers_are_parts_of_the_product() -> None:
    """A weight that changes changes both."""
    decoder = tiny_decoder()
    plain = bytes_of(decoder)
    decoder.join_layers()
    assert bytes_of(decoder) == plain
    mlp = decoder.layers[0].mlp
    with torch.inference_mode():
        mlp.up_proj.weight.zero_()
        gate, up = mlp.multiply_joined(torch.ones(1, 32, device=TEST_DEVICE)).chunk(2, dim=-1)
    assert gate.all()
    assert not up.any()


def test_layers_that_move_are_not_joined() -> None:
    """Their weights would not be those of the product."""
    decoder = tiny_decoder()
    decoder.join_layers()
    assert not any(module.is_joined for module in joinable_modules(decoder.double()))


def test_a_checkpoint_is_read_into_joined_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_single(tmp_path, CONFIG, tensors_of(CONFIG))
    monkeypatch.setattr(loader, "can_pack", lambda *_: False)
    plain, _ = load_decoder(folder)
    monkeypatch.setattr(loader, "gains_from_joining", lambda _: True)
    decoder, _ = load_decoder(folder)
    assert all(module.is_joined for module in joinable_modules(decoder))
    assert bytes_of(decoder) == bytes_of(plain)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_layers_on_a_cpu_stay_apart(tmp_path: Path) -> None:
    assert gains_from_joining(torch.device("cuda"))
    decoder, _ = load_decoder(write_single(tmp_path, CONFIG, tensors_of(CONFIG)))
    assert not any(module.is_joined for module in joinable_modules(decoder))
    assert not isinstance(decoder.layers[0].mlp.up_proj, nn.Linear), "they are packed"
