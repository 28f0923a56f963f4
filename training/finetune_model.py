"""The model of a fine-tuning: a folder's weights under the task's head, and what of it is trained.

Trained are all weights, or LoRA's matrices and a head that is new; everything else is frozen, and
may be quantized. What comes out is written as the folder's own family: the whole model with LoRA
merged into it, and the matrices by themselves.

Shapes: B batch, T tokens, E hidden_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmserve.adapters import Adapter
from llmserve.checkpoint import Checkpoint
from llmserve.config import Head, ModelConfig
from llmserve.errors import ConfigError
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_parameters
from llmserve.quant.layout import AnyQuantizedLinear

from .devices import beside, device_of, training_device
from .finetune_examples import TokenRow, fill_up
from .finetune_frozen import freeze_layers, quantized_layers
from .finetune_recipe import FinetuneRecipe
from .lora_merge import merged
from .lora_weights import LoraWeights

__all__ = ["TunedModel", "open_tuned"]

_HEADS = ("score", "qa_outputs")
_HEAD_STD = 0.02


class TunedModel:
    """A model being tuned. An optimizer changes what `trainable` gives; nothing else does."""

    def __init__(
        self,
        model: Transformer,
        lora: LoraWeights | None,
        frozen: dict[str, AnyQuantizedLinear],
    ) -> None:
        """Use `open_tuned`. `frozen` are quantized layers by canonical name without `.weight`."""
        self.model = model
        self.lora = lora
        """None: all weights are trained."""
        self.frozen = frozen
        """Layers that are quantized in memory."""
        self._attend = CausalAttention(model.config)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration, with the task's head."""
        return self.model.config

    def trainable(self) -> dict[str, nn.Parameter]:
        """What an optimizer may change, by name."""
        if self.lora is None:
            return dict(self.model.named_parameters())
        head = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.partition(".")[0] in _HEADS
        }
        return {**self.lora.parameters(), **head}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return device_of(self.model)

    def fill_up(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """`finetune_examples.fill_up` of the rows, beside the model."""
        return beside(self.model, *fill_up(rows))

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states of rows from their first position on: [B, T] → [B, T, E]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.model.hidden(ids, positions, self._attend, self.lora)

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] → float32 [B, T, V]."""
        return self.model.logits(self.hidden(ids))

    def scores(self, ids: Tensor) -> Tensor:
        """What the head makes of every token: [B, T] → float32 [B, T, labels]."""
        return self.model.scores(self.hidden(ids))

    def last_scores(self, ids: Tensor, last: Tensor) -> Tensor:
        """The head's scores at each row's last place: [B, T] and [B] → float32 [B, labels]."""
        hidden = self.hidden(ids)
        rows = torch.arange(len(last), device=last.device)
        return self.model.scores(hidden[rows, last])

    def tensors(self) -> dict[str, Tensor]:
        """Every canonical tensor, float32, with LoRA's part added, in the host's memory."""
        tensors = {name: tensor.cpu() for name, tensor in canonical_tensors(self.model).items()}
        for name, layer in self.frozen.items():
            tensors[f"{name}.weight"] = torch.from_numpy(layer.dequantize())
        adapter = self.adapter()
        if adapter is not None:
            tensors = merged(tensors, adapter)
        return tensors

    def adapter(self) -> Adapter | None:
        """LoRA's matrices; None where all weights are trained."""
        return None if self.lora is None else self.lora.adapter("tuned")


def open_tuned(checkpoint: Checkpoint, recipe: FinetuneRecipe, head: Head | None) -> TunedModel:
    """The model in the folder with the head that the task needs, ready to be trained.

    A head that the folder has already, with the same labels, is trained on; another is drawn anew.

    Raises:
        ConfigError: the folder has a head and the task needs the output layer, LoRA finds nothing
            to adapt, nf4 no layer to quantize, or there is no such device.
        MissingDependencyError: qlora without bitsandbytes.
    """
    device = training_device(recipe.device)
    if head is None and checkpoint.config.head is not None:
        raise ConfigError(
            f"the model has a head ({checkpoint.config.head.kind}) in place of the output layer "
            "that this task trains; give the model that it was made from"
        )
    frozen = (
        {}
        if recipe.method == "full"
        else quantized_layers(checkpoint, to_nf4=recipe.method == "qlora")
    )
    with torch.device("meta"):  # frozen layers never exist as floats
        config = dataclasses.replace(checkpoint.config, head=head)
        model = Transformer(config, dropout=recipe.dropout)
    if frozen and device.type != "cpu":
        raise ConfigError(
            f"layers that stay quantized are trained beside on cpu alone, not on {device.type}; "
            "use the method lora on a folder of floats, or full"
        )
    freeze_layers(model, frozen)
    _fill(model, checkpoint, recipe.seed)
    model.to(device)
    checkpoint.drop_pages()  # what was read of the files would stay in memory beside the weights
    if recipe.method == "full":
        return TunedModel(model, None, {})
    model.requires_grad_(False)
    lora = LoraWeights(
        config,
        recipe.target_names(),
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        seed=recipe.seed,
        device=device,
    )
    tuned = TunedModel(model, lora, frozen)
    for parameter in tuned.trainable().values():
        parameter.requires_grad_(True)
    return tuned


def _fill(model: Transformer, checkpoint: Checkpoint, seed: int) -> None:
    """Give the model the folder's weights, float32, and a head that the folder has not new ones."""
    has_head = checkpoint.config.head == model.config.head
    for name, child in model.named_children():
        if has_head or name not in _HEADS:
            load_parameters(model, checkpoint, f"{name}.", dtype=torch.float32)
            continue
        generator = torch.Generator().manual_seed(seed)
        new = {
            f"{name}.{part}": torch.empty(meta.shape).normal_(
                0.0, _HEAD_STD if part == "weight" else 0.0, generator=generator
            )
            for part, meta in child.named_parameters()
        }
        model.load_state_dict(new, strict=False, assign=True)
