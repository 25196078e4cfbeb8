"""Run by the Python that has AdapterHub's `adapters`, not by ours: loads what tunesmith exported and runs it there.

    python adapterhub_side.py FOLDER...

Each folder holds `base/` (a model of transformers), `adapter/` (what was exported), `inputs.safetensors` and
`expected.safetensors` (outputs of the base and of the adapted model). Prints one JSON object: folder -> the largest
differences.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

warnings.filterwarnings("ignore")


def base_of(folder: Path, kind: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = {"decoder": AutoModelForCausalLM, "encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM}[kind]
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def check(folder: Path) -> dict[str, Any]:
    import adapters
    from adapters import AdapterModelInterface

    adapter = str(folder / "adapter")
    kind = json.loads((folder / "case.json").read_text())["kind"]
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    found: dict[str, Any] = {}
    model = base_of(folder / "base", kind)
    found["base"] = float((outputs(model, inputs) - expected["base"]).abs().max())
    interface = None
    if (path := folder / "adapter" / "adapter_interface.json").is_file():
        interface = AdapterModelInterface(**json.loads(path.read_text())["interface"])
    adapters.init(model, interface=interface)
    loading: dict[str, Any] = {}
    model.load_adapter(adapter, use_safetensors=True, set_active=True, loading_info=loading)
    assert not loading["missing_keys"], loading["missing_keys"]
    assert not loading["unexpected_keys"], loading["unexpected_keys"]
    model.eval()  # adapters are added in training mode
    found["adapter"] = float((outputs(model, inputs) - expected["adapter"]).abs().max())
    if "logits" in expected:
        headed = adapters.AutoAdapterModel.from_pretrained(folder / "base", dtype=torch.float32)
        headed.load_adapter(adapter, use_safetensors=True, set_active=True)
        found["head"] = float((outputs(headed.eval(), inputs) - expected["logits"]).abs().max())
    return found


if __name__ == "__main__":
    print(json.dumps({name: check(Path(name)) for name in sys.argv[1:]}))
