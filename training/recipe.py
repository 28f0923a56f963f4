"""The recipe of a training run: every choice that determines its weights, in one object.

A recipe comes from its defaults, a TOML file (`--recipe`) and options, the later over the earlier.
It is written into the run folder; a run is resumed only under the recipe that began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmserve.config import Experts, ModelConfig
from llmserve.errors import ConfigError

from .clean_steps import DEFAULT_STEPS, parse_steps
from .recipe_fields import DeviceName, check_fields, check_known, fields_sha256, read_toml

__all__ = ["TrainingRecipe", "load_recipe", "recipe_names"]

_RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """Text preparation, model, optimization and bookkeeping of one run.

    Raises `ConfigError` for a value outside its range or a shape that makes no model.
    """

    tokenizer: str = "bpe"
    """bpe, word or char: trained on the text; or a folder whose tokenizer is used."""
    vocab_size: int = 2048
    """Most entries of the vocabulary; a character tokenizer may need fewer."""
    separator: str = ""
    """Text between two documents of one file; empty: files are cut at empty lines into blocks."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a .parquet table, that holds the text."""
    cleaning: str = DEFAULT_STEPS
    """Steps of cleaning, with commas between; all or none (`llmserve data clean --help`)."""
    packing: Literal["stream", "documents"] = "stream"
    """Windows cut from the whole text, or packed with documents that do not see each other."""
    held_out: float = 0.05
    """Share of the text that is never trained on, for evaluation. Above 0, at most 0.5."""
    held_out_by: Literal["document", "tail"] = "document"
    """Hold out documents picked by their hash, or the end of the whole text."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How a token's place reaches the model."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward."""
    bias: bool = False
    """Biases on every projection, as GPT-2 has them."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks of attention and feed-forward."""
    num_heads: int = 4
    """Query heads; divides hidden_size."""
    num_kv_heads: int = 2
    """Key and value heads; divides num_heads."""
    intermediate_size: int = 688
    """Width inside the feed-forward."""
    max_seq_len: int = 256
    """Tokens of context, in training and after."""
    tie_word_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""
    num_experts: int | None = None
    """Feed-forwards in each layer, of which a token goes through a few; none given: one."""
    num_experts_per_token: int = 2
    """How many of num_experts a token goes through."""
    expert_size: int | None = None
    """Width inside one expert; none given: intermediate_size / num_experts_per_token, so that a
    token costs what it costs without experts."""
    shared_expert_size: int | None = None
    """Width of one more expert, which every token goes through; none given: there is none."""
    balance_loss: float = 0.01
    """Weight of the loss that spreads the tokens over the experts."""
    dropout: float = 0.0
    """Share of activations dropped in training. 0 or more, below 1."""
    steps: int | None = None
    """Optimizer steps; give this or minutes."""
    minutes: float | None = None
    """Wall-clock minutes for training; the first steps are timed and the rest planned by them."""
    max_passes: float | None = None
    """Most passes over the text that are planned for minutes, however fast the machine; none given:
    no limit."""
    batch_size: int = 16
    """Windows of max_seq_len tokens in one optimizer step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other; divides batch_size."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW; AdamW whose moments take a byte each (bitsandbytes); or Muon for the blocks' matrices
    and AdamW for the rest."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: half a cosine down to the final one; the highest to the end;
    or the highest until a linear fall over the last part (warm-up, stable, decay)."""
    decay_share: float = 0.2
    """Part of the steps that fall, with the schedule wsd. Above 0, at most 1."""
    learning_rate: float = 1.5e-3
    """Highest learning rate, reached after the warm-up."""
    final_learning_rate: float = 1e-4
    """Learning rate at the last step, unless the schedule is constant."""
    warmup_steps: int = 100
    """Steps of linear rise from zero."""
    weight_decay: float = 0.1
    """Decay of the weights, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; it is scaled down to this."""
    ema_decay: float | None = None
    """Share of the averaged weights that each step keeps (0.999, say): these are then evaluated and
    become the model; none given: the weights themselves."""
    device: DeviceName = "cpu"
    """cpu; or cuda: an NVIDIA GPU, with torchrun one for each process."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; auto: bfloat16 where the device has instructions for it.
    With float16 the loss is scaled up, so that small gradients are not lost."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what is inside it: less
    memory, a third more work."""
    compile: bool = False
    """Compile the model with torch.compile, which needs a C++ compiler and takes a while."""
    threads: int | None = None
    """Threads that share a step; none given: one for each core. Sums, so weights, depend on it."""
    seed: int = 0
    """Seed of initial weights, dropout, order of the text and choice of held-out documents."""
    evaluate_every: int = 100
    """Steps between evaluations on held-out text."""
    evaluation_tokens: int = 16_384
    """Most held-out tokens of an evaluation on the way; the last one takes them all."""
    early_stop: int | None = None
    """Evaluations in a row without a lower held-out loss that end the run; the model is then that
    of the lowest. None given: it goes on to its end, and the model is the last."""
    log_every: int = 10
    """Steps whose means make one line of the log; the last of them is measured layer by layer."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best one."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept for good; none given: none of them."""
    max_skipped_steps: int = 5
    """Steps in a row that may be skipped for a loss or gradient that is not finite."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes (torchrun) share: the batch; or the weights and the optimizer's state
    as well (FSDP2). Without effect in one."""

    def __post_init__(self) -> None:
        check_fields(self, _RANGES)
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"final_learning_rate ({self.final_learning_rate}) must be at most "
                f"learning_rate ({self.learning_rate})"
            )
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("give either steps or minutes, to say how long to train")
        if self.steps is not None and self.max_passes is not None:
            raise ConfigError(
                "max_passes bounds what minutes plan; leave it out where steps are given"
            )
        parse_steps(self.cleaning)
        self._check_combinations()
        self.model_config(vocab_size=self.vocab_size)

    def model_config(self, *, vocab_size: int, **special_ids: Any) -> ModelConfig:
        """The model over a vocabulary. Raises `ConfigError` where the shape makes no model."""
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            max_seq_len=self.max_seq_len,
            positions=self.positions,
            # Beside sinusoids of amplitude 1, fresh embeddings are not heard (1706.03762, 3.4).
            embedding_scale=self.hidden_size**0.5 if self.positions == "sinusoidal" else 1.0,
            norm=self.norm,
            activation=self.activation,
            attention_bias=self.bias,
            attention_output_bias=self.bias,
            mlp_bias=self.bias,
            tie_word_embeddings=self.tie_word_embeddings,
            experts=self._experts(),
            **special_ids,
        )

    @property
    def sha256(self) -> str:
        """Digest of all fields."""
        return fields_sha256(self)

    @property
    def micro_batch_size(self) -> int:
        """Windows computed at once."""
        return self.batch_size // self.accumulation

    def _experts(self) -> Experts | None:
        if self.num_experts is None:
            return None
        share = max(1, self.intermediate_size // self.num_experts_per_token)
        return Experts(
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
            intermediate_size=share if self.expert_size is None else self.expert_size,
            shared_intermediate_size=self.shared_expert_size,
        )

    def _check_combinations(self) -> None:
        if self.num_experts is None and (self.expert_size or self.shared_expert_size):
            raise ConfigError("expert_size and shared_expert_size need num_experts")
        if self.num_experts is not None and self.compile:
            raise ConfigError(
                "compile cannot be used with num_experts: which experts run is known only then"
            )
        if self.parallel == "fsdp" and (self.optimizer != "adamw" or self.num_experts is not None):
            raise ConfigError("parallel fsdp needs the optimizer adamw, and no num_experts")
        if self.compile and self.activation_checkpointing:
            raise ConfigError(
                "compile decides itself what it computes again: leave out activation_checkpointing"
            )


_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (2, 1 << 20),
    "held_out": (1e-4, 0.5),
    "max_seq_len": (2, 1 << 20),
    "num_experts": (1, 4096),
    "num_experts_per_token": (1, 4096),
    "balance_loss": (0.0, 100.0),
    "dropout": (0.0, 0.99),
    "steps": (1, 10**9),
    "minutes": (0.01, 10**6),
    "max_passes": (0.001, 10**6),
    "batch_size": (1, 1 << 20),
    "accumulation": (1, 1 << 20),
    "decay_share": (1e-6, 1.0),
    "learning_rate": (1e-9, 10.0),
    "final_learning_rate": (0.0, 10.0),
    "warmup_steps": (0, 10**9),
    "weight_decay": (0.0, 10.0),
    "beta1": (0.0, 0.9999),
    "beta2": (0.0, 0.99999),
    "clip_norm": (1e-6, 1e6),
    "ema_decay": (0.0, 0.999999),
    "threads": (1, 4096),
    "seed": (0, 2**63 - 1),
    "evaluate_every": (1, 10**9),
    "evaluation_tokens": (1, 10**12),
    "early_stop": (1, 10**6),
    "log_every": (1, 10**6),
    "checkpoint_every": (1, 10**9),
    "keep_checkpoints": (1, 10**6),
    "keep_every": (1, 10**9),
    "max_skipped_steps": (0, 10**6),
}


def load_recipe(source: str | None, overrides: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe called `source` or in the TOML file at `source`, with `overrides` over it.

    An override of `steps` replaces `minutes` of the file, and the other way round.

    Raises:
        ConfigError: no such recipe, a file that is no TOML, an unknown key or a bad value.
    """
    values = {} if source is None else read_toml(_recipe_path(source))
    check_known(TrainingRecipe, source, values)
    check_known(TrainingRecipe, "options", overrides)
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if one in overrides and other not in overrides:
            values.pop(other, None)
    if "steps" in overrides:
        values.pop("max_passes", None)
    return TrainingRecipe(**{**values, **overrides})


def recipe_names() -> list[str]:
    """Names of the recipes that come with the program."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def _recipe_path(source: str) -> Path:
    own = _RECIPES / f"{source}.toml"
    path = own if own.is_file() else Path(source)
    if not path.is_file():
        raise ConfigError(
            f"no recipe {source!r}: neither a TOML file nor one of {', '.join(recipe_names())}"
        )
    return path
