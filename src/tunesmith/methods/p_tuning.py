"""P-tuning: virtual tokens that a small network makes while it trains (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.declared import MethodFacts
from tunesmith.methods import METHODS
from tunesmith.methods.virtual_tokens import VirtualMethod, VirtualOptions
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import Virtual, VirtualTokens
from tunesmith.recipe_keys import Positive

if TYPE_CHECKING:
    from peft import PromptEncoderConfig

LSTM_LAYERS = 2


class Encoded(VirtualTokens):
    """h_i = MLP(e_i), or MLP([LSTM forwards; LSTM backwards]_i) (equation 2 of the paper's first version)."""

    def __init__(self, count: int, width: int, hidden: int, encoder: Literal["mlp", "lstm"]) -> None:
        super().__init__(count)
        self.embedding = nn.Embedding(count, width)
        self.lstm = (
            nn.LSTM(width, hidden, LSTM_LAYERS, bidirectional=True, batch_first=True) if encoder == "lstm" else None
        )
        shape = [width, hidden, hidden, width] if encoder == "mlp" else [2 * hidden, 2 * hidden, width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(shape):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        hidden_PD = self.embedding.weight
        if self.lstm is not None:
            hidden_PD = self.lstm(hidden_PD[None])[0][0]
        return self.mlp(hidden_PD)


@METHODS.register("p_tuning")
class PTuning(VirtualMethod):
    """As prompt tuning, with the vectors made by a network over free ones, which stays behind when they are used."""

    facts: MethodFacts = MethodFacts(
        summary="virtual tokens before each text, made by a small network that stays behind",
        kinds=frozenset({"decoder", "encoder", "encoder-decoder"}),
        heads=frozenset({"lm", "pooled"}),
        reference="switch",
        when="as prompt, where free vectors do not settle",
        learning_rate=3e-3,
        learning_rate_source="a tenth of prompt's, for a network moves all tokens at once; not tuned on a task yet",
    )

    class Options(VirtualOptions):
        """How many, and the network that makes them."""

        encoder: Literal["mlp", "lstm"] = Field("mlp", description="three linear layers, or a two-way LSTM below two")
        hidden: Positive | None = Field(None, description="width of the network; the model's if left out")

    options: Options

    def made(self, policy: Policy) -> Virtual:
        return Encoded(self.options.virtual_tokens, policy.width, self._hidden(policy.width), self.options.encoder)

    def config(self, policy: Policy, **shape: Any) -> PromptEncoderConfig:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            **shape,
            encoder_reparameterization_type=self.options.encoder.upper(),
            encoder_hidden_size=self._hidden(shape["token_dim"]),
        )

    def _hidden(self, width: int) -> int:
        return self.options.hidden or width
