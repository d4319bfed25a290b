"""Defines T5 1.1: encoder, decoder and `Transformer`, with the parameter names and call signature of T5X network.py."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import get_axis_names
from flax.linen.spmd import with_logical_constraint
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning_jax.t5.adapters import PREFIX
from prompt_tuning_jax.t5.config import NUMERICS, T5Config
from prompt_tuning_jax.t5.kernels import MATMUL
from prompt_tuning_jax.t5.layers import (
    RESIDUAL,
    Attention,
    Dense,
    Embed,
    Kept,
    KeyValue,
    MlpBlock,
    Prefix,
    RelativePositionBias,
    RMSNorm,
    Rows,
    draw_kept,
    drop,
)

Mask = Bool[Array, "#B 1 #Q K"]
EncodedMask = Bool[Array, "#B 1 #Q S"]
Bias = Float[Array, "1 H Q K"]
Prompt = Float[Array, "P D"] | Float[Array, "B P D"] | None
LayerPrompts = Float[Array, "L P D"] | Float[Array, "B L P D"] | None


class EncoderLayer(nn.Module):
    """Applies self-attention, then feed-forward; each reads a normalised input and adds to the residual stream."""

    config: T5Config

    def setup(self):
        if self.config.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(self.config, bidirectional=True)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Bias,
        mask: Mask,
        lengths: Int[Array, " B"] | None,
        kept: Kept,
        prefix: Prefix | None = None,
    ) -> Float[Array, "B S D"]:
        cfg = self.config
        attention = Attention(cfg, name="attention")

        y = RMSNorm(cfg.dtype, name="pre_attention_layer_norm")(x)
        y = attention(
            y, attention.after(prefix, attention.project(y)), bias=bias, mask=mask, lengths=lengths, kept=kept.values[0]
        )
        x = with_logical_constraint(x + drop(y, kept.residual[0], cfg.dropout_rate), RESIDUAL)

        y = RMSNorm(cfg.dtype, name="pre_mlp_layer_norm")(x)
        y = MlpBlock(cfg, name="mlp")(y, kept.hidden)
        return with_logical_constraint(x + drop(y, kept.residual[1], cfg.dropout_rate), RESIDUAL)


class DecoderLayer(nn.Module):
    """Applies causal self-attention, then attention to the encoder's output, then feed-forward."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        self.pre_self_attention_layer_norm = RMSNorm(cfg.dtype)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg.dtype)
        self.encoder_decoder_attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg.dtype)
        self.mlp = MlpBlock(cfg)

    def project_encoded(self, encoded: Float[Array, "B S D"]) -> KeyValue:
        return self.encoder_decoder_attention.project(encoded)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        encoded_kv: KeyValue,
        bias: Bias,
        mask: Mask,
        encoded_mask: EncodedMask,
        cache_index: Int[Array, ""] | None,
        kept: Kept,
        prefix: Prefix | None = None,
    ) -> Float[Array, "B Q D"]:
        rate = self.config.dropout_rate
        y = self.pre_self_attention_layer_norm(x)
        cached = cache_index is not None
        kv = self.self_attention.extend_cache(y, cache_index) if cached else self.self_attention.project(y)
        y = self.self_attention(y, self.self_attention.after(prefix, kv), bias=bias, mask=mask, kept=kept.values[0])
        x = x + drop(y, kept.residual[0], rate)

        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, encoded_kv, mask=encoded_mask, kept=kept.values[1])
        x = x + drop(y, kept.residual[1], rate)

        y = self.mlp(self.pre_mlp_layer_norm(x), kept.hidden)
        return with_logical_constraint(x + drop(y, kept.residual[2], rate), RESIDUAL)


class Encoder(nn.Module):
    """Runs the encoder's layers. Prompts enter here and nowhere else.

    Attributes:
      prompt_factory: builds the module that owns a prompt, called as `module(embedded [B, T, D]) -> [P, D]`; None if
        prompts are arguments of the call.
    """

    config: T5Config
    prompt_factory: Callable[[], nn.Module] | None = None

    def setup(self):
        cfg = self.config
        if self.prompt_factory is not None:
            self.prompt = self.prompt_factory()
        if not cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        layer = traced_once(self, remat(EncoderLayer, cfg))
        self.layers = [layer(cfg) for _ in range(cfg.num_encoder_layers)]
        self.encoder_norm = RMSNorm(cfg.dtype)

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 #T T"],
        prompt: Prompt = None,
        layer_prompts: LayerPrompts = None,
        prompt_mask: Bool[Array, "B P"] | None = None,
        layers_replace: Bool[Array, " B"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        rows: Rows = None,
    ) -> Float[Array, "B S D"]:
        cfg, x = self.config, embedded
        if prompt is None and self.prompt_factory is not None:
            prompt = self.prompt(embedded)
        first = prompt if prompt is not None or layer_prompts is None else layer_prompts[..., 0, :, :]
        if first is not None:
            x = with_logical_constraint(prepend_prompt(embedded, first), RESIDUAL)
            prompt_length = first.shape[-2]
            mask = extend_over_prompt(mask, prompt_length, prompt_mask)
            lengths = None if lengths is None or prompt_mask is not None else lengths + prompt_length
        prefixes = prefixes_of(self)
        before = 0
        if prefixes is not None:
            before = prefixes.key.shape[2]
            mask, lengths = extend_over_prompt(mask, before), None  # with a prefix there is no fused attention
        biases = position_biases(self, x.shape[1], before + x.shape[1], before)
        kept = draw_kept(self.make_rng, cfg, cfg.num_encoder_layers, [before + x.shape[1]], rows)
        x = drop(x, kept.input, cfg.dropout_rate)
        replaces = prompt is None if layers_replace is None else layers_replace
        for number, (layer, bias) in enumerate(zip(self.layers, biases, strict=True)):
            if layer_prompts is not None:
                x = change_prompt(x, layer_prompts[..., number, :, :], replaces)
            x = layer(x, bias, mask, lengths, kept.layers[number], prefix_of_layer(prefixes, number))
        return drop(self.encoder_norm(x), kept.output, cfg.dropout_rate)


class Decoder(nn.Module):
    """Runs the decoder's layers, and has the matrix of the logits."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if not cfg.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        layer = traced_once(self, remat(DecoderLayer, cfg))
        self.layers = [layer(cfg) for _ in range(cfg.num_decoder_layers)]
        self.decoder_norm = RMSNorm(cfg.dtype)
        if not cfg.logits_via_embedding:
            self.logits_dense = Dense(cfg.vocab_size, ("embed", "vocab"), jnp.float32)

    def project_encoded(self, encoded: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        return tuple(layer.project_encoded(encoded) for layer in self.layers)

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "B Q D"],
        encoded_kv: tuple[KeyValue, ...],
        mask: Mask | None,
        encoded_mask: EncodedMask,
        rows: Rows = None,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "B Q D"]:
        cfg, queries = self.config, embedded.shape[1]
        index, keys = None, queries
        if decode:
            started = self.has_variable("cache", "cache_index")
            cache_index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
            index = cache_index.value
            if started:
                cache_index.value = index + queries
                keys = max_decode_length or queries
        first = 0 if index is None else index
        causal = jnp.arange(keys)[None, :] <= (jnp.arange(queries) + first)[:, None]
        mask = causal[None, None] if mask is None else causal[None, None] & mask
        prefixes = prefixes_of(self)
        if prefixes is not None:
            length = prefixes.key.shape[2]
            mask = extend_over_prompt(mask, length)
            keys, first = length + keys, first + length
        biases = position_biases(self, queries, keys, first)
        kept = draw_kept(self.make_rng, cfg, cfg.num_decoder_layers, [keys, encoded_kv[0].key.shape[2]], rows)

        x = drop(embedded, kept.input, cfg.dropout_rate)
        for number, (layer, key_value, bias) in enumerate(zip(self.layers, encoded_kv, biases, strict=True)):
            prefix = prefix_of_layer(prefixes, number)
            x = layer(x, key_value, bias, mask, encoded_mask, index, kept.layers[number], prefix)
        return drop(self.decoder_norm(x), kept.output, cfg.dropout_rate)


class Transformer(nn.Module):
    """Runs a T5 1.1 encoder-decoder with the prompts that it is called with.

    `encode`, `decode` and `__call__` take the arguments that T5X's models pass to T5X's own network, and prompts as
    keyword arguments.

    Attributes:
      prompt_factory: see `Encoder`. It is set under T5X, where the prompt is a parameter of the model:
        `network.Transformer.prompt_factory = @module.SoftPrompt`.
    """

    config: T5Config
    prompt_factory: Callable[[], nn.Module] | None = None

    def setup(self):
        cfg = self.config
        self.token_embedder = Embed(cfg.vocab_size, cfg.emb_dim, cfg.dtype)
        self.encoder = Encoder(cfg, self.prompt_factory)
        self.decoder = Decoder(cfg)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        enable_dropout: bool = True,
        *,
        prompt: Prompt = None,
        layer_prompts: LayerPrompts = None,
        prompt_mask: Bool[Array, "B P"] | None = None,
        layers_replace: Bool[Array, " B"] | None = None,
        row_numbers: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the encoder's output for prompt and inputs, [B, P+T, D].

        Args:
          encoder_input_tokens: token ids; `config.pad_token_id` is padding, which is never attended to.
          encoder_segment_ids: the segment of each token in packed examples, which cannot have a prompt.
          prompt: put in front of the inputs, and replaces the model's own prompt if it has one; [P, D] for all rows,
            or [B, P, D] with one per row.
          layer_prompts: one prompt per encoder layer; [L, P, D] for all rows, or [B, L, P, D] per row. With a `prompt`,
            each is added to the prompt's positions as they enter the layer. Without one, it replaces them (Google's
            extended/train/per_layer.py).
          prompt_mask: false where a prompt position is padding. Padding belongs in front of a shorter prompt: T5's
            positions are relative, so the row's output is the same as with the shorter prompt alone.
          layers_replace: true for rows whose layer prompts replace the prompt's positions, false for rows whose layer
            prompts are added to them; one batch can have both. A row without layer prompts adds zeros.
          row_numbers: the index of each row in the whole batch, for dropout; None for 0 to B - 1.
        """
        pad = self.config.pad_token_id
        mask = (encoder_input_tokens != pad)[:, None, None, :]
        if encoder_segment_ids is not None:
            if not (self.prompt_factory is None and prompt is None and layer_prompts is None):
                raise ValueError("packed examples (encoder_segment_ids) cannot share one prompt: set pack=False")
            mask = mask & _same_segment(encoder_segment_ids, encoder_segment_ids)
        embedded = self.token_embedder(encoder_input_tokens)
        lengths = _lengths(encoder_input_tokens, pad) if encoder_segment_ids is None else None
        rows = _rows(embedded, enable_dropout, row_numbers)
        return self.encoder(embedded, mask, prompt, layer_prompts, prompt_mask, layers_replace, lengths, rows)

    def project_encoded(self, encoded: Float[Array, "B S D"]) -> tuple[KeyValue, ...]:
        """Returns each decoder layer's keys and values of `encoded`, which are computed once and read in every step."""
        return self.decoder.project_encoded(encoded)

    def decode(
        self,
        encoded: Float[Array, "B S D"] | tuple[KeyValue, ...],
        encoder_input_tokens: Int[Array, "B T"],
        decoder_input_tokens: Int[Array, "B Q"],
        decoder_target_tokens: Int[Array, "B Q"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B Q"] | None = None,
        decoder_positions: Int[Array, "B Q"] | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        *,
        prompt_mask: Bool[Array, "B P"] | None = None,
        row_numbers: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B Q V"]:
        """Returns the float32 logits of the token after each decoder input.

        Args:
          encoded: the output of `encode`, or `project_encoded` of it.
          encoder_input_tokens: the tokens that were encoded, for their padding mask. The prompt's length is the length
            of `encoded` minus theirs.
          decode: whether to decode one position per call, with the "cache" collection; see `decoding.greedy`.
          max_decode_length: length of the cache.
          prompt_mask, row_numbers: as `encode` was called with.
        """
        del decoder_positions  # T5's positions are relative
        keys = encoded if isinstance(encoded, tuple) else self.project_encoded(encoded)
        encoded_mask = (encoder_input_tokens != self.config.pad_token_id)[:, None, None, :]
        mask = None
        if encoder_segment_ids is not None and decoder_segment_ids is not None:
            mask = _same_segment(decoder_segment_ids, decoder_segment_ids)
            encoded_mask = encoded_mask & _same_segment(decoder_segment_ids, encoder_segment_ids)
        prompt_length = keys[0].key.shape[2] - encoder_input_tokens.shape[1]
        encoded_mask = extend_over_prompt(encoded_mask, prompt_length, prompt_mask)

        embedded = self.token_embedder(decoder_input_tokens)
        rows = _rows(embedded, enable_dropout, row_numbers)
        x = self.decoder(embedded, keys, mask, encoded_mask, rows, decode, max_decode_length)
        if self.config.logits_via_embedding:
            logits = self.token_embedder.attend(x)
        else:
            logits = with_logical_constraint(self.decoder.logits_dense(x), ("batch", "length", "vocab"))
        return logits / jnp.sqrt(x.shape[-1]) if self.config.scales_logits else logits

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        decoder_input_tokens: Int[Array, "B U"],
        decoder_target_tokens: Int[Array, "B U"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B U"] | None = None,
        encoder_positions: Int[Array, "B T"] | None = None,
        decoder_positions: Int[Array, "B U"] | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        prompt: Prompt = None,
        layer_prompts: LayerPrompts = None,
        prompt_mask: Bool[Array, "B P"] | None = None,
        row_numbers: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B U V"]:
        """Returns teacher-forced logits in float32."""
        del encoder_positions
        own = {"prompt_mask": prompt_mask, "row_numbers": row_numbers}
        prompts = {"prompt": prompt, "layer_prompts": layer_prompts}
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout, **prompts, **own)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout,
            decode,
            **own,
        )


class Declared(NamedTuple):
    """Holds a parameter's shape, and its logical axes in T5X, such as ("embed", "mlp")."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def declared_parameters(config: T5Config) -> Mapping[str, Declared]:
    """Returns what the model declares of each parameter by path. Computes no values."""
    numerics = {field.name: field.default for field in dataclasses.fields(T5Config) if field.name in NUMERICS}
    return _declared(dataclasses.replace(config, **numerics))


@functools.lru_cache  # tracing a large model takes a second, and a run needs the result several times
def _declared(config: T5Config) -> Mapping[str, Declared]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = functools.partial(Transformer(config).init, enable_dropout=False)
    tree = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
    shapes: Any = flatten_dict(tree["params"], sep="/")
    axes: Any = flatten_dict(get_axis_names(tree["params_axes"]), sep="/")
    return MappingProxyType({path: Declared(shapes[path].shape, tuple(axes[path])) for path in shapes})


def remat(layer: type[nn.Module], config: T5Config) -> type[nn.Module]:
    """Returns the layer such that its backward pass recomputes what `config.remat_policy` does not keep."""
    if config.remat_policy == "none":
        return layer
    keep = jax.checkpoint_policies
    # The policy of matmuls does not see those with a derivative of their own (`kernels.matmul`): these have a name.
    matmuls = keep.save_from_both_policies(keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names(MATMUL))
    policies = {"minimal": matmuls, "full": None}
    return nn.remat(layer, policy=policies[config.remat_policy])


def traced_once(stack: nn.Module, layer: type[nn.Module]) -> type[nn.Module]:
    """Returns the layer such that a stack's layers, whose arguments have equal shapes, share one tracing.

    XLA then inlines it in each place: the program is the same. `Module.init` traces each layer, because inside of
    `nn.jit` Flax would draw other initial parameters.
    """
    return layer if stack.is_initializing() else nn.jit(layer)


def position_biases(
    stack: "Encoder | Decoder", queries: int, keys: int, first_query: Int[Array, ""] | int
) -> Sequence[Bias]:
    """Returns the relative position bias of each layer of a stack: the stack's one for all layers, or each layer's."""
    if stack.config.relative_bias_per_layer:
        return [layer.relpos_bias(queries, keys, first_query) for layer in stack.layers]
    return [stack.relpos_bias(queries, keys, first_query)] * len(stack.layers)


class Prefixes(NamedTuple):
    """Holds the learned keys and values of all layers of a stack; see `adapters`."""

    key: Float[Array, "L H P head_dim"]
    value: Float[Array, "L H P head_dim"]


def prefixes_of(stack: nn.Module) -> Prefixes | None:
    """Returns the prefixes among a stack's parameters; None if it has none."""
    key, value = (stack.get_variable("params", name) for name in PREFIX)
    return None if key is None or value is None else Prefixes(key, value)


def prefix_of_layer(prefixes: Prefixes | None, number: int) -> Prefix | None:
    """Returns the prefix of the stack's layer with index `number`; None if the stack has none."""
    return None if prefixes is None else Prefix(prefixes.key[number], prefixes.value[number])


def prepend_prompt(
    embedded: Float[Array, "B T D"], prompt: Float[Array, "P D"] | Float[Array, "B P D"]
) -> Float[Array, "B P+T D"]:
    """Puts `prompt` before each row of `embedded`; a [B, P, D] prompt gives each row its own (figure 2)."""
    return jnp.concatenate([_per_row(prompt, embedded), embedded], axis=1)


def change_prompt(
    x: Float[Array, "B S D"],
    layer_prompt: Float[Array, "P D"] | Float[Array, "B P D"],
    replaces: bool | Bool[Array, " B"],
) -> Float[Array, "B S D"]:
    """Replaces the first P positions of each row by `layer_prompt`, or adds it to them where `replaces` is false."""
    before, rest = x[:, : layer_prompt.shape[-2]], x[:, layer_prompt.shape[-2] :]
    own = _per_row(layer_prompt, x)
    if isinstance(replaces, bool):
        changed = own if replaces else before + own
    else:
        changed = jnp.where(replaces[:, None, None], own, before + own)
    return jnp.concatenate([changed, rest], axis=1)


def _per_row(prompt: Float[Array, "P D"] | Float[Array, "B P D"], x: Float[Array, "B _ D"]) -> Float[Array, "B P D"]:
    # Broadcast before the cast, so that the gradients of all rows are summed in the prompt's float32.
    return jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape[-2:])).astype(x.dtype)


def extend_over_prompt(
    mask: Bool[Array, "B 1 Q T"], prompt_length: int, prompt_mask: Bool[Array, "B {prompt_length}"] | None = None
) -> Bool[Array, "B 1 Q {prompt_length}+T"]:
    """Returns `mask` with `prompt_length` keys in front: all visible, or only those where `prompt_mask` is true."""
    if prompt_mask is None:
        return jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prompt_length, 0)), constant_values=True)
    shape = (*mask.shape[:3], prompt_length)
    return jnp.concatenate([jnp.broadcast_to(prompt_mask[:, None, None, :], shape), mask], axis=3)


def _rows(x: Float[Array, "B T D"], enable_dropout: bool, row_numbers: Rows) -> Rows:
    if not enable_dropout:
        return None
    return jnp.arange(len(x)) if row_numbers is None else row_numbers


def _lengths(tokens: Int[Array, "B T"], pad: int) -> Int[Array, " B"]:
    """Returns each row's length without the padding at its end; at least 1, as a softmax over no keys is NaN."""
    indices = jnp.where(tokens != pad, jnp.arange(tokens.shape[1], dtype=jnp.int32), 0)
    return 1 + jnp.max(indices, axis=1)


def _same_segment(queries: Int[Array, "B Q"], keys: Int[Array, "B K"]) -> Bool[Array, "B 1 Q K"]:
    return (queries[:, :, None] == keys[:, None, :])[:, None]
