"""Whatever a config.json holds, it is read or refused with a message that names a field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden import GOLDEN_DIR
from vdiff_kserve.models import CheckpointError
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.registry import CAUSAL_FORMATS, find_by_architecture, find_family

FAMILIES = ("llada", "dream", "sdar", "fast_dllm_v2", "llada_moe", "llada2")
VALUES: tuple[Any, ...] = (
    None, "x", "", -1, 0, 0.5, True, [], [None], {}, {"rope_type": 5}, float("nan"), float("inf"),
)  # fmt: skip


def read(family: str, changes: dict[str, Any]) -> None:
    path = GOLDEN_DIR / family / "config.json"
    config = CheckpointConfig(path, json.loads(path.read_text(encoding="utf-8")) | changes)
    if family == "apd":
        find_by_architecture(config, CAUSAL_FORMATS).read_decoder(config)
    else:
        find_family(config).read_spec(config)


@pytest.mark.parametrize("family", [*FAMILIES, "apd"])
def test_no_value_of_any_field_of_a_golden_config_is_a_traceback(family: str) -> None:
    fields = json.loads((GOLDEN_DIR / family / "config.json").read_text(encoding="utf-8"))
    told = []
    for field in fields:
        for value in VALUES:
            try:
                read(family, {field: value})
            except CheckpointError as error:
                told.append(str(error))
    assert len(told) > 50
    assert [message for message in told if "config.json: field `" not in message] == []


@pytest.mark.parametrize("theta", ["x", None, -1, True, float("nan")])
def test_a_rotary_base_inside_rope_parameters_is_checked_too(theta: object) -> None:
    parameters = {"rope_type": "default", "rope_theta": theta}
    with pytest.raises(CheckpointError, match="field `rope_theta`"):
        read("dream", {"rope_theta": None, "rope_parameters": parameters})


def test_a_count_beyond_the_layers_is_all_of_them() -> None:
    read("llada2", {"first_k_dense_replace": 10**18})
