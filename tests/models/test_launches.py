"""How many kernels a GPU is given for a layer: in a cached pass of few rows, each costs some two
microseconds beside weights that take a hundred."""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device import pack
from tests.engine.tiny import tiny_decoder
from tests.models.plain_kernels import use_plain_kernels
from tests.models.rounded import in_fp8
from tests.models.test_attention import plain_kernel, store_for
from vdiff_kserve.models import RowSpan, fp8
from vdiff_kserve.models import attention as packed_attention
from vdiff_kserve.models import decoder as decoder_module


class Launches(TorchDispatchMode):
    """Counts operations by name, but for those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, _: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def as_one(launches: Launches, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, counted as one operation, whatever it is made of here."""

    @wraps(kernel)
    def launch(*args: Any) -> Any:
        before = launches.counts.copy()
        result = kernel(*args)
        launches.counts = before + Counter({kernel.__name__: 1})
        return result

    return launch


def launches_of_a_pass(
    layers: int, monkeypatch: pytest.MonkeyPatch, is_in_fp8: bool = False
) -> Counter[str]:
    """Over a block of each of two rows, the rest of them in the cache."""
    decoder = tiny_decoder(num_layers=layers).to(torch.bfloat16)
    if is_in_fp8:
        in_fp8(decoder)
    decoder.join_layers()
    store = store_for(decoder, 60)
    store.keys.data, store.values.data = (t.bfloat16() for t in (store.keys, store.values))
    spans = [RowSpan(8, 8, 24, 8, 8, cache_offset=24 * row) for row in range(2)]
    batch = pack([torch.arange(24)] * 2, spans, store)
    launches = Launches()
    monkeypatch.setattr(decoder_module, "has_kernel", lambda *_: True)
    use_plain_kernels(monkeypatch, wrap=partial(as_one, launches))
    monkeypatch.setattr(packed_attention, "run_kernel", as_one(launches, plain_kernel))
    monkeypatch.setattr(fp8, "_multiply_plainly", as_one(launches, fp8._multiply_plainly))
    with torch.inference_mode(), launches:
        states: Tensor = decoder(batch)
    assert states.shape == (16, 32)
    return launches.counts


def test_a_layer_of_a_cached_pass_is_ten_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is two where keys are split, and the second joins the parts."""
    layer = launches_of_a_pass(3, monkeypatch) - launches_of_a_pass(2, monkeypatch)
    products = sum(layer.pop(name, 0) for name in ("linear", "mm", "addmm"))
    assert products == 4, "of queries, keys and values; of attention's output; two of the MLP"
    assert layer == {"add_rms_norm": 2, "heads": 1, "plain_kernel": 1, "silu_product": 1}


def test_a_layer_in_fp8_has_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's output is rounded by itself; what else is multiplied, by the kernel before."""
    passes = [launches_of_a_pass(layers, monkeypatch, is_in_fp8=True) for layers in (2, 3)]
    assert passes[1] - passes[0] == {
        "_multiply_plainly": 4,
        "round_norm": 2,
        "heads": 1,
        "plain_kernel": 1,
        "round_rows": 1,
        "round_product": 1,
    }
