"""`ModelConfig`: every architectural choice of the decoder, checked when it is made."""

from __future__ import annotations

import ast
import dataclasses
import math
from typing import Literal

from jaxattn.config_fields import check_fields
from jaxattn.errors import ConfigError
from jaxattn.mechanisms import MixerChoice, get, names, parse_mixers, resolve_mixer
from jaxattn.policies import Plan, Site, refuse
from jaxattn.policies import resolve as resolve_policy
from jaxattn.rope import Rope, RopeScaling, frequencies
from jaxattn.types import Backend

Norm = Literal["rmsnorm", "layernorm", "srmsnorm"]
NormPosition = Literal["pre", "post", "hybrid"]
Position = Literal["rope", "nope", "alibi", "learned", "sinusoid", "relative", "raw_relative"]
Mlp = Literal["swiglu", "geglu", "sglu", "gelu", "relu", "linear", "none"]
GATED = ("swiglu", "geglu", "sglu")
CONTEXT = "context"  # the word for the training context
TINY = 2.0**-126  # below it a norm's ε counts as 0 in f32, and rows of padding are divided by 0
Init = Literal["fan_in", "sink", "normal", "torch"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder language model. Heads and widths are per layer; patterns repeat over depth."""

    vocab_size: int = 0
    """Size of the vocabulary; 0 takes it from the data."""
    num_layers: int = 3
    """Number of blocks L."""
    d_model: int = 64
    """Residual width E."""
    num_heads: int = 1
    """Query heads H."""
    num_kv_heads: int = 0
    """Key/value heads K; 0 means H (multi-head attention)."""
    key_dim: int = 0
    """Width D of a query/key head; 0 means E / H."""
    value_dim: int = 0
    """Width V of a value head; 0 means D."""
    mixers: tuple[str, ...] = ("softmax",)
    """Attention per layer, repeated over depth: NAME, NAME(option=value, window=64), conv(width=3) or none."""
    mlps: tuple[Mlp, ...] = ("swiglu",)
    """Feed-forward per layer, repeated over depth; sglu is a gated unit without activation."""
    d_ff: int = 0
    """Feed-forward width F; 0 means 4E, or 8E/3 rounded up to 64 for gated kinds."""
    norm: Norm = "rmsnorm"
    """Normalisation layer; srmsnorm is RMSNorm without parameters."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    norm_position: NormPosition = "pre"
    """pre: x + f(norm(x)); post: norm(x + f(x)), no final norm; hybrid: x + norm(f(norm(x)))."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the rotation."""
    position: Position = "rope"
    """Position encoding; raw_relative adds the bucket index itself, as the sink study's code did."""
    rope_base: float = 10_000.0
    """Theta of the rotary angles."""
    rope_fraction: float = 1.0
    """Share of the head dim that is rotated."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Stretching of the rotary angles for contexts beyond the pretraining's."""
    max_positions: int = 0
    """Tokens of the longest context, rows of a learned position table; 0 takes the data's context."""
    use_bias: bool = False
    """Bias vectors in every linear map."""
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """Bias vectors in the attention's maps: q, k and v (Qwen2), or all four."""
    mlp_bias: bool = False
    """Bias vectors in the feed-forward's maps."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(E)."""
    tie_embeddings: bool = False
    """One matrix for embedding and logits."""
    init: Init = "fan_in"
    """fan_in: N(0, 1/d_in); sink: N(0, 2/(5 d_in)) and MLP output std 1/(sqrt(d_in) L); normal: N(0, 0.02²); torch: U(±1/sqrt(d_in)) and N(0, 1) embeddings, PyTorch's defaults."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, norms, logits and loss stay in float32."""
    scan_layers: bool = False
    """One compiled block scanned over depth (compile time independent of L)."""
    remat: bool = False
    """Recompute each block in the backward pass."""
    policy: str = ""
    """How decoding keeps and reads keys: NAME or NAME(option=value), behind score-space methods; nothing is dense."""
    backend: Backend = "auto"
    """Kernels of the attention: auto is the platform's own where there is one, else xla; a named one never falls back."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        for field in ("num_layers", "d_model", "num_heads"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field} is {getattr(self, field)} but must be at least 1.")
        for field in ("vocab_size", "num_kv_heads", "key_dim", "value_dim", "d_ff", "max_positions"):
            if getattr(self, field) < 0:
                raise ConfigError(f"model.{field} is {getattr(self, field)} but must be 0 (automatic) or positive.")
        if self.num_heads % self.kv_heads:
            divisors = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise ConfigError(
                f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}; "
                f"use one of {', '.join(map(str, divisors))}."
            )
        if not self.key_dim and self.d_model % self.num_heads:
            raise ConfigError(
                f"model.d_model {self.d_model} is not divisible by model.num_heads {self.num_heads}; "
                "change one of them or set model.key_dim."
            )
        if not (self.norm_eps >= TINY and math.isfinite(self.norm_eps)):
            raise ConfigError(f"model.norm_eps is {self.norm_eps} but must be positive and finite.")
        if not (self.rope_base > 0 and math.isfinite(self.rope_base)):
            raise ConfigError(f"model.rope_base is {self.rope_base} but must be positive and finite.")
        if not 0 < self.rope_fraction <= 1:
            raise ConfigError(f"model.rope_fraction is {self.rope_fraction} but must be in (0, 1].")
        if self.position == "rope":
            frequencies(
                self.head_dim, self.rope_base, self.rope_fraction, self.rope_scaling
            )  # refuses what does not fit
        if not self.mixers or not self.mlps:
            raise ConfigError("model.mixers and model.mlps need at least one entry each.")
        if self.scan_layers and self.num_layers % self.period:
            raise ConfigError(
                f"model.num_layers {self.num_layers} is not a multiple of the layer pattern's length "
                f"{self.period}; change it or set model.scan_layers=False."
            )
        for text in self.mixers:
            self._check_capabilities(text, resolve_mixer(text))
        self._check_policy()

    def _check_capabilities(self, text: str, choice: MixerChoice) -> None:
        """Refuse here what the mechanism would refuse only when it runs."""
        if choice.mechanism is None:
            return
        can = choice.mechanism.capabilities
        if not choice.mechanism.causal(choice.spec):
            raise ConfigError(f"{text} lets tokens see later ones, so it is no language model; name a causal form.")
        if self.has_bias and not can.position_bias:
            raise ConfigError(f"{text} takes no position bias: model.position {self.position!r} cannot be used.")
        if choice.window is not None and not can.window:
            raise ConfigError(f"{text} has no sliding window: drop window={choice.window}.")
        if self.kv_heads != self.num_heads and not can.gqa:
            raise ConfigError(f"{text} has no grouped queries: set model.num_kv_heads to {self.num_heads}.")
        if self.v_dim != choice.mechanism.key_dim(choice.spec, self.head_dim) and not can.value_dim:
            raise ConfigError(f"{text} needs model.value_dim {self.v_dim} to be the key dim {self.head_dim}.")
        if self.prefix_tokens and not can.prefix:
            raise ConfigError(f"{text} cannot see sink tokens: do not mix it with sink_token in one model.")

    def _check_policy(self) -> None:
        """Refuse a policy that some layer cannot use, and one that none can."""
        plan, layers = self.keeping, range(self.num_layers)
        if plan.plain:
            return
        keeping = [layer for layer in layers if (mechanism := self.mixer(layer).mechanism) and mechanism.core]
        if not keeping:
            raise ConfigError(
                f"policy {self.policy} keeps and reads keys and values, but {', '.join(self.mixers)} has a state of "
                "its own; use a model with attention over keys, such as softmax."
            )
        for layer in keeping:
            refuse(plan, self.site(layer))

    @property
    def keeping(self) -> Plan:
        """The policy with its options."""
        return resolve_policy(self.policy)

    def site(self, layer: int) -> Site:
        """A layer as policies see it."""
        choice = self.mixer(layer)
        assert choice.mechanism is not None, "a layer without a mechanism keeps no keys"
        return Site(
            mechanism=choice.mechanism.name,
            layer=layer,
            num_layers=self.num_layers,
            heads=self.num_heads,
            kv_heads=self.kv_heads,
            key_dim=self.key_dim_of(layer),
            value_dim=self.v_dim,
            dtype=self.dtype,
            window=choice.window,
            rope=self.rope,
            bias=self.has_bias,
            inseparable=choice.mechanism.inseparable,
            front=self.prefix_tokens,
            inserts=any(c.mechanism.block(c.spec) > 0 for c in map(resolve_mixer, self.mixers) if c.mechanism),
            scanned=self.scan_layers,
            position=self.position,
            trained=self.trained_positions,
            maps=choice.mechanism.maps,
        )

    @property
    def rope(self) -> Rope | None:
        """The rotary encoding, where the model has one."""
        return Rope(self.rope_base, self.rope_fraction, self.rope_scaling) if self.position == "rope" else None

    @property
    def trained_positions(self) -> int:
        """Positions that the model knows by itself; 0 where nothing says."""
        known = self.max_positions
        return self.rope_scaling.reach(known) if self.position == "rope" and known else known

    @property
    def position_limit(self) -> int:
        """Tokens that prompt and answer may have together; 0 where nothing says."""
        known = self.trained_positions
        return self.keeping.policy.reach(self.keeping.spec, known) if self.position != "learned" else known

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.key_dim or self.d_model // self.num_heads

    def key_dim_of(self, layer: int) -> int:
        """D of a layer's mechanism, which may want another width than the model's."""
        choice = self.mixer(layer)
        return choice.mechanism.key_dim(choice.spec, self.head_dim) if choice.mechanism else self.head_dim

    @property
    def v_dim(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def has_bias(self) -> bool:
        """Whether the position encoding is a bias on the scores."""
        return self.position in ("alibi", "relative", "raw_relative")

    @property
    def period(self) -> int:
        """Length of the repeating (mixer, mlp) pattern."""
        return math.lcm(len(self.mixers), len(self.mlps))

    def mixer_text(self, layer: int) -> str:
        return self.mixers[layer % len(self.mixers)]

    def mixer(self, layer: int) -> MixerChoice:
        """Mechanism, options and window of a layer."""
        return resolve_mixer(self.mixer_text(layer))

    def mlp(self, layer: int) -> str:
        return self.mlps[layer % len(self.mlps)]

    def ff_width(self, kind: str) -> int:
        """F of a feed-forward kind."""
        if self.d_ff:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 64) * 64 if kind in GATED else 4 * self.d_model

    @property
    def prefix_tokens(self) -> int:
        """Learned embeddings in front of the stream that some layer's mechanism asks for."""
        choices = [resolve_mixer(text) for text in self.mixers]
        return max((c.mechanism.prefix_tokens(c.spec) for c in choices if c.mechanism), default=0)

    def with_attention(self, attn: str) -> ModelConfig:
        """The same model with the pattern written as ``"softmax(window=64), sigmoid"``."""
        return dataclasses.replace(self, mixers=parse_mixers(attn))


def at_context(attn: str, context: int) -> str:
    """A pattern with numbers for the word: ``"sigmoid(train_len=context)"`` -> ``"sigmoid(train_len=128)"``.

    `context` is the training context in tokens. The word counts where an option takes a whole number, or as the
    window; a pattern without it, or that cannot be read, comes back as it is.
    """
    try:
        tree = ast.parse(f"({attn},)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # said where the pattern is read
        return attn
    found = False
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names()):
            continue
        whole = {f.name for f in dataclasses.fields(get(call.func.id).spec) if type(f.default) is int} | {"window"}
        for option in call.keywords:
            word = getattr(option.value, "id", getattr(option.value, "value", None))
            if word == CONTEXT and option.arg in whole:
                option.value, found = ast.Constant(context), True
    return ast.unparse(tree)[1:-1].rstrip(",") if found else attn
