"""What methods that train virtual tokens on a frozen base share: attached to the policy, saved as a folder of PEFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from safetensors.torch import load_file, save_file

from tunesmith.declared import MethodFacts
from tunesmith.methods.peft_adapter import task_type
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import Virtual
from tunesmith.recipe_keys import Positive, Strict

if TYPE_CHECKING:
    from peft import PromptLearningConfig

SAVED = "prompt_embeddings"  # PEFT's name for what its encoders come to
ENCODER = "prompt_encoder.safetensors"  # what they come from, to go on from it


class VirtualOptions(Strict):
    """How many virtual tokens there are."""

    virtual_tokens: Positive = Field(20, description="how many stand before each text, counted against the context")


class VirtualMethod(ABC):
    """A subclass makes the module of virtual tokens, and PEFT's configuration for it."""

    facts: MethodFacts

    def __init__(self, options: Any, dropout: float) -> None:
        del dropout  # the base's own layers have it already
        self.options = options
        self.facts = replace(self.facts, virtual_tokens=options.virtual_tokens)

    @abstractmethod
    def made(self, policy: Policy) -> Virtual:
        """Fresh virtual tokens for this model."""

    @abstractmethod
    def config(self, policy: Policy, **shape: Any) -> PromptLearningConfig:
        """PEFT's configuration with the fields that all its prompts have."""

    def attach(self, policy: Policy) -> None:
        policy.model.requires_grad_(False)
        policy.heads.requires_grad_(True)
        policy.put_before(self.made(policy))

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]

    def reference(self, policy: Policy) -> AbstractContextManager[None]:
        return policy.without_virtual()

    def export(self, policy: Policy, to: Path) -> None:
        """A folder for `peft.PeftModel.from_pretrained`; PEFT keeps what an encoder gives, and we the encoder too."""
        virtual = _virtual(policy)
        model, text = policy.model, policy.config.get_text_config()
        config = self.config(
            policy,
            task_type=task_type(policy),
            num_virtual_tokens=virtual.count,
            num_transformer_submodules=1,
            token_dim=policy.width,
            num_layers=int(text.num_hidden_layers),
            num_attention_heads=int(text.num_attention_heads),
            base_model_name_or_path=model.name_or_path,
            inference_mode=True,
        )
        config.save_pretrained(str(to))
        save_file({SAVED: virtual.flat().detach().float().contiguous()}, to / "adapter_model.safetensors")
        state = {name: value.contiguous() for name, value in virtual.state_dict().items()}
        if len(state) > 1:
            save_file(state, to / ENCODER)

    def load(self, policy: Policy, source: Path) -> None:
        self.attach(policy)
        virtual = _virtual(policy)
        if (source / ENCODER).is_file():
            virtual.load_state_dict(load_file(source / ENCODER))
        else:
            (only,) = virtual.state_dict()
            virtual.load_state_dict({only: load_file(source / "adapter_model.safetensors")[SAVED]})


def _virtual(policy: Policy) -> Virtual:
    assert policy.virtual is not None, "nothing is attached"
    return policy.virtual
