"""Reading the golden cases: tiny checkpoints with logits and generations of the references."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("VDIFF_GOLDEN_DIR", Path(__file__).parent / "data" / "golden"))


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run of a reference implementation."""

    family: str
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        return self.fields["name"]

    @property
    def params(self) -> dict[str, Any]:
        return self.fields["params"]

    @property
    def nfe(self) -> int:
        return self.fields["nfe"]

    @property
    def folder(self) -> Path:
        return GOLDEN_DIR / self.family

    def tensor(self, name: str) -> Tensor:
        return _tensors(self.family)[self.fields["tensors"][name]]

    def has(self, name: str) -> bool:
        return name in self.fields["tensors"]

    def prompts(self) -> list[list[int]]:
        """Prompt ids row by row, left padding removed where the case has an attention mask."""
        rows = self.tensor("prompt_ids")
        if not self.has("attention_mask"):
            return rows.tolist()
        visible = self.tensor("attention_mask")[:, : rows.shape[1]].bool()
        return [row[mask].tolist() for row, mask in zip(rows, visible, strict=True)]

    def answers(self) -> list[list[int]]:
        """Generated ids row by row, without the prompt."""
        prompt_length = self.tensor("prompt_ids").shape[1]
        return self.tensor("output_ids")[:, prompt_length:].tolist()


@cache
def _tensors(family: str) -> dict[str, Tensor]:
    return load_file(GOLDEN_DIR / family / "cases.safetensors")


def golden_cases(family: str, kind: str, prefix: str = "") -> list[GoldenCase]:
    """The family's cases of `kind` (`logits` or `generate`) whose name starts with `prefix`."""
    records = json.loads((GOLDEN_DIR / family / "cases.json").read_text(encoding="utf-8"))
    chosen = [r for r in records if r["kind"] == kind and r["name"].startswith(prefix)]
    return [GoldenCase(family, record) for record in chosen]
