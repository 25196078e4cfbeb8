"""Bottleneck adapters in AdapterHub's own library: what is exported loads there, with the same outputs.

Its `adapters` 1.3.0 pins transformers 4.57, so it lives in an environment of its own: `make adapterhub` makes it in
`.cache/adapterhub`, or TUNESMITH_ADAPTERHUB names the Python of another one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kinds import FAMILIES, LABELS, policy_of
from tunesmith.methods.bottleneck import Bottleneck

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("TUNESMITH_ADAPTERHUB", HERE.parents[1] / ".cache/adapterhub/bin/python"))
SERVED = tuple(family for family in FAMILIES if family not in ("falcon", "gpt_neox"))
OPTIONS: dict[str, dict[str, Any]] = {
    "pfeiffer": {},
    "houlsby": {"variant": "houlsby", "reduction_factor": 8, "scaling": "learned"},
    "parallel": {"variant": "parallel", "reduction_factor": 2, "non_linearity": "gelu"},
}
LARGEST = 2e-5  # outputs are of scale 1 to 10; both sides in fp32, in the order of another version of transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment with AdapterHub's library; `make adapterhub`"),
]


def case_of(family: str, options: dict[str, Any], folder: Path) -> None:
    """A base, an adapter with random weights, inputs, and what our side makes of them."""
    policy = policy_of(family)
    policy.pooling = "first"  # that of the library's heads
    policy.model.save_pretrained(folder / "base")
    policy.model.set_attn_implementation("eager" if family == "deberta" else "sdpa")
    draw = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 97, (2, 9), generator=draw)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if policy.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(3, 97, (2, 5), generator=draw)
    expected = {"base": outputs(policy.model, inputs)}
    method = Bottleneck(Bottleneck.Options.model_validate(options), 0.1)
    method.attach(policy)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = 1 + 0.1 * noise if name.endswith("scaling") else 0.3 * noise
    policy.eval()
    expected["adapter"] = outputs(policy.model, inputs)
    for head in policy.heads.values():
        head.standardise(torch.randn(20, policy.width, generator=draw))  # type: ignore[operator]
        if family not in ("modernbert",):
            expected["logits"] = head(expected["adapter"][:, 0]).detach()
    method.export(policy, folder / "adapter")
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "case.json").write_text(json.dumps({"kind": policy.kind}))


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model.eval()(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Of every family and variant, by one process of the other Python."""
    root = tmp_path_factory.mktemp("adapterhub")
    folders: list[Path] = []
    for family in SERVED:
        for variant, options in OPTIONS.items():
            folders.append(root / f"{family}-{variant}")
            folders[-1].mkdir()
            case_of(family, options, folders[-1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(PYTHON), str(HERE / "adapterhub_side.py"), *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {Path(k).name: v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    for name, value in found.items():
        print(name, *(f"{what} {number:.1e}" for what, number in value.items()))
    return found


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("family", SERVED)
def test_an_exported_adapter_has_the_same_outputs_there(
    family: str, variant: str, differences: dict[str, dict[str, float]]
) -> None:
    found = differences[f"{family}-{variant}"]
    assert ("head" in found) == (family in ("bert", "roberta", "deberta"))
    assert max(found.values()) < LARGEST, found


def test_labels_travel_with_the_head(tmp_path: Path) -> None:
    case_of("bert", {}, tmp_path)
    head = json.loads((tmp_path / "adapter" / "head_config.json").read_text())
    assert head["config"]["label2id"] == {label: i for i, label in enumerate(LABELS)}
