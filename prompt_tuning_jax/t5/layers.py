"""Defines the parts of a T5 1.1 layer: RMSNorm, attention, relative position bias, gated feed-forward (T5X layers.py).

Shapes: B batch, Q and K query and key positions, H heads, D d_model, F d_ff. No layer has a bias vector, and attention
logits are not scaled: the query's initialiser has the factor 1/sqrt(head_dim), as in T5.

The axes of parameters and activations are named as T5X's logical axes. On a mesh, logical axis rules turn these names
into shardings (see `parallel.mesh`); on one device the names have no effect.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.partitioning import param_with_axes
from flax.linen.spmd import with_logical_constraint
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from prompt_tuning_jax.t5.adapters import ADAPTERS
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.kernels import attend, gated_gelu, matmul, quantized_matmul

Initializer = Any  # (key, shape, dtype) -> Array
RESIDUAL = ("batch", "length", "embed")  # the logical axes of the residual stream
Rows = Int[Array, " B"] | None  # row indices, which dropout keys are folded from; None: no dropout


class KeyValue(NamedTuple):
    """Holds the projected keys and values of one attention."""

    key: Float[Array, "B H K head_dim"]
    value: Float[Array, "B H K head_dim"]


class Prefix(NamedTuple):
    """Holds the learned keys and values of one attention (Li and Liang 2021), the same for all rows."""

    key: Float[Array, "H P head_dim"]
    value: Float[Array, "H P head_dim"]


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Returns a module's parameter with its logical axes, as Flax's `param_with_axes` does.

    `Module.init` makes it, in float32, with `init`.

    Raises:
      ScopeParamShapeError: the parameter that was given has another shape.
      ScopeParamNotFoundError: none was given.
    """
    stored = module.get_variable("params", name)
    if stored is None or stored.shape != shape:  # Flax makes it or raises the error
        return param_with_axes(name, init, shape, jnp.float32, axes=axes, module=module)
    # Without this, Flax would trace `init` in each call to compare the shapes.
    return with_logical_constraint(stored, axes)


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, in float32, with no mean subtracted and no bias."""

    dtype: Any = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), ("embed",))
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Dense(nn.Module):
    """Multiplies by a kernel [in, features], and by its scales if the base model is int8 (see `quantized`).

    Adapters beside the kernel change the result: see `adapters` for the formula. They are float32 parameters. The
    low-rank matrices are cast to the activations' dtype, as all matrices are (PEFT casts the activations to float32
    there). A scale multiplies in float32, as in PEFT, because bfloat16 has no number between 1 and 1.008.
    """

    features: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

    @nn.compact
    def __call__(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.axes)
        lora_a, lora_b, input_scale, output_scale = (self.get_variable("params", name) for name in ADAPTERS)
        x = x if input_scale is None else _scaled(x, input_scale)
        y = self._matmul(x, kernel)
        if lora_a is not None:
            low_rank = matmul(x.astype(self.dtype), lora_a.astype(self.dtype), self.dtype)
            y = y + matmul(low_rank, lora_b.astype(self.dtype), self.dtype)
        return y if output_scale is None else _scaled(y, output_scale)

    def _matmul(self, x: Float[Array, "*B d_in"], kernel: Array) -> Float[Array, "*B d_out"]:
        scale = self.get_variable("params", "kernel_scale")
        if scale is not None:
            return quantized_matmul(x, kernel, scale, self.dtype)
        # Logits are float32, but a bfloat16 kernel is not cast for them: float32 holds a product of bfloat16 exactly.
        operands = jnp.promote_types(x.dtype, kernel.dtype) if self.dtype == jnp.float32 else self.dtype
        return matmul(x.astype(operands), kernel.astype(operands), self.dtype)


def _scaled(x: Float[Array, "*B d"], scale: Float[Array, " d"]) -> Float[Array, "*B d"]:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class Embed(nn.Module):
    """Embeds the tokens of encoder and decoder with one table (T5 1.1 has a separate matrix for the logits)."""

    vocab_size: int
    features: int
    dtype: Any = jnp.float32

    def setup(self):
        shape, init = (self.vocab_size, self.features), nn.initializers.normal(1.0)
        self.embedding = parameter(self, "embedding", init, shape, ("vocab", "embed"))
        self.scale = self.get_variable("params", "embedding_scale")  # None unless the base model is int8

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gathers the features first: rows from a table that is sharded by features would have to be resharded by batch.
        table = with_logical_constraint(self.embedding, ("vocab", None))
        embedded = jnp.take(table, tokens, axis=0, mode="clip")
        if self.scale is not None:
            embedded = embedded * jnp.take(self.scale, tokens, mode="clip")[..., None]
        return with_logical_constraint(embedded.astype(self.dtype), RESIDUAL)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of T5 1.0, `x` times the transposed table, in float32."""
        if self.scale is not None:
            return quantized_matmul(x, self.embedding.T, self.scale, jnp.float32)
        return jnp.dot(x.astype(jnp.float32), self.embedding.astype(jnp.float32).T)


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of each relative position, key minus query: exact if near, logarithmic if far.

    In a bidirectional stack, half of the buckets are for keys to the right. In a causal stack, such keys get bucket 0.
    """
    bucket = np.zeros_like(relative_position)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket += (distance < 0) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    eps = np.finfo(np.float32).eps
    # float32 throughout, as in T5X: a float64 logarithm moves some distances to the next bucket.
    far = np.log(distance.astype(np.float32) / exact + eps) / np.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
    return bucket + np.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
    """Learns one number per bucket and head, which is added to attention logits.

    All layers of a stack share these numbers, unless `config.relative_bias_per_layer` is set.
    """

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int, first_query: Int[Array, ""] | int = 0) -> Float[Array, "1 H Q K"]:
        """Returns the bias of queries at first_query .. first_query + queries - 1 for keys at 0 .. keys - 1."""
        cfg = self.config
        shape, axes = (cfg.num_heads, cfg.relative_attention_num_buckets), ("heads", "relpos_buckets")
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = parameter(self, "rel_embedding", init, shape, axes)
        # `first_query` may be traced: the buckets of all possible distances are computed while tracing, then indexed.
        bucket_of = relative_position_bucket(
            np.arange(-keys + 1, keys, dtype=np.int32),
            bidirectional=self.bidirectional,
            num_buckets=cfg.relative_attention_num_buckets,
            max_distance=cfg.relative_attention_max_distance,
        )
        relative = jnp.arange(keys)[None, :] - (jnp.arange(queries) + first_query)[:, None]
        by_distance = jnp.take(table, bucket_of, axis=1)
        return jnp.take(by_distance, relative + keys - 1, axis=1, mode="clip")[None]


class Kept(NamedTuple):
    """Holds masks that are true where dropout keeps a row's numbers in one layer; None instead of a mask drops nothing.

    Each mask broadcasts to the array that it is applied to. As in T5X, a feature is dropped at all positions of a row,
    and a key's value of a head in all of its features.
    """

    residual: Sequence[Bool[Array, "B 1 D"] | None]  # what each block adds to the residual stream, in order
    hidden: Bool[Array, "B 1 F"] | None  # in the feed-forward block
    values: Sequence[Bool[Array, "B H K 1"] | None]  # of each attention, in order


class KeptOfStack(NamedTuple):
    """Holds what dropout keeps of each row in a stack of layers; see `Kept`."""

    input: Bool[Array, "B 1 D"] | None
    output: Bool[Array, "B 1 D"] | None
    layers: Sequence[Kept]


def draw_kept(
    make_rng: Callable[[str], Array], config: T5Config, number_of_layers: int, lengths: Sequence[int], rows: Rows
) -> KeptOfStack:
    """Draws the dropout masks of a stack of layers.

    Keys are folded from the row index, so a row's masks do not depend on the rest of the batch, on micro-batches or on
    sharding. The masks of attention are drawn position by position, so a row's masks do not change if longer rows add
    padding to the batch.

    A loop draws the masks of one layer after another, and all of a layer at once, because XLA takes long to compile
    JAX's generator for a CPU: with a draw for each mask, the training step of T5 1.1 small took three times as long to
    compile. The last turn of the loop draws the masks of the stack's input and output.

    Args:
      make_rng: the stack's `Module.make_rng`.
      lengths: the number of keys of each attention of a layer.
      rows: see `Rows`.
    """
    blocks = len(lengths) + 1  # each attention and the feed-forward block
    if rows is None or config.dropout_rate == 0.0:
        return KeptOfStack(None, None, [Kept([None] * blocks, None, [None] * len(lengths))] * number_of_layers)
    stack_key = make_rng("dropout")
    features, heads = blocks * config.emb_dim + config.mlp_dim, len(lengths) * config.num_heads

    def draw(layer: Int[Array, ""], row: Int[Array, ""]) -> Kept:
        # One number for each pair of row and layer, because each call of fold_in takes long to compile, too.
        key = jax.random.fold_in(stack_key, row * (number_of_layers + 1) + layer)
        kept = jax.random.bernoulli(key, 1.0 - config.dropout_rate, (features + max(lengths) * heads,))
        *residual, hidden = jnp.split(kept[None, :features], config.emb_dim * np.arange(1, blocks + 1), axis=1)
        by_attention = kept[features:].reshape(max(lengths), len(lengths), config.num_heads, 1).transpose(1, 2, 0, 3)
        return Kept(residual, hidden, [own[:, :length] for own, length in zip(by_attention, lengths, strict=True)])

    numbers = jnp.arange(number_of_layers + 1)
    drawn = jax.lax.map(lambda layer: jax.vmap(functools.partial(draw, layer))(rows), numbers)
    *layers, own = [jax.tree.map(lambda masks, number=number: masks[number], drawn) for number in range(len(numbers))]
    return KeptOfStack(own.residual[0], own.residual[1], layers)


def drop(x: Float[Array, "..."], kept: Bool[Array, "..."] | None, rate: float) -> Float[Array, "..."]:
    """Returns `x` where it is kept, scaled such that its mean stays, and 0 elsewhere; `x` itself if `kept` is None."""
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0.0)


class Attention(nn.Module):
    """Computes multi-head attention. `query`, `key`, `value` and `out` are one matrix each, as T5X stores them."""

    config: T5Config

    def setup(self):
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        into = functools.partial(Dense, joined, ("embed", "joined_kv"), cfg.dtype)
        self.query = into(kernel_init=lambda *args: init(*args) / np.sqrt(cfg.head_dim))
        self.key = into(kernel_init=init)
        self.value = into(kernel_init=init)
        self.out = Dense(cfg.emb_dim, ("joined_kv", "embed"), cfg.dtype, kernel_init=init)

    def _heads(self, x: Float[Array, "B T joined"]) -> Float[Array, "B H T head_dim"]:
        # Heads come before positions, so that both einsums of attention are plain batched matmuls.
        heads = x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim).swapaxes(1, 2)
        return with_logical_constraint(heads, ("batch", "heads", "length", "kv"))

    def project(self, x: Float[Array, "B K D"]) -> KeyValue:
        """Returns the keys and values of `x`."""
        return KeyValue(self._heads(self.key(x)), self._heads(self.value(x)))

    def after(self, prefix: Prefix | None, key_value: KeyValue) -> KeyValue:
        """Returns `key_value` with the learned keys and values of `prefix`, if there is one, in front."""
        if prefix is None:
            return key_value

        def put_before(rest: Float[Array, "B H K head_dim"], own: Float[Array, "H P head_dim"]) -> Array:
            # Broadcast before the cast, so that the gradients of all rows are summed in the prefix's float32.
            rows = jnp.broadcast_to(own, (rest.shape[0], *own.shape)).astype(rest.dtype)
            rows = with_logical_constraint(rows, ("batch", "heads", "length", "kv"))
            return jnp.concatenate([rows, rest], axis=2)

        return KeyValue(put_before(key_value.key, prefix.key), put_before(key_value.value, prefix.value))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        key_value: KeyValue,
        *,
        bias: Float[Array, "1 H Q K"] | None = None,
        mask: Bool[Array, "#B 1 #Q K"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        kept: Bool[Array, "B H K 1"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attends from `x` to `key_value` where `mask` is true; `bias` is added to the logits.

        Args:
          lengths: the number of keys of each row that `mask` shows, if these are its first keys; None if not.
          kept: what dropout keeps of the values; see `Kept`.
        """
        key, value = key_value.key, drop(key_value.value, kept, self.config.dropout_rate)
        query = self._heads(self.query(x))
        # A fused kernel takes lengths, and reads one bias for all rows; a mask would need a bias per row. cuDNN needs
        # even numbers of positions.
        if self.config.attention == "products" or lengths is None or key.shape[2] % 2 or query.shape[2] % 2:
            mixed = attend(query, key, value, bias, mask).swapaxes(1, 2)
        else:
            fused: Any = jax.nn.dot_product_attention  # positions before heads
            arrays = (array.swapaxes(1, 2) for array in (query, key, value))
            options = {"scale": 1.0, "key_value_seq_lengths": lengths, "implementation": self.config.attention}
            mixed = fused(*arrays, None if bias is None else bias.astype(query.dtype), **options)
        return self.out(mixed.reshape(*x.shape[:2], -1))

    @nn.compact
    def extend_cache(self, x: Float[Array, "B Q D"], index: Int[Array, ""]) -> KeyValue:
        """Writes the keys and values of `x` at position `index` of the "cache" collection; returns the whole cache.

        The first call finds no cache. It creates an empty one, as long as `x`, and returns the keys and values of `x`.
        """
        new = self.project(x)
        exists = self.has_variable("cache", "cached_key")
        key = self.variable("cache", "cached_key", jnp.zeros, new.key.shape, new.key.dtype)
        value = self.variable("cache", "cached_value", jnp.zeros, new.value.shape, new.value.dtype)
        if not exists:
            return new
        key.value = lax.dynamic_update_slice_in_dim(key.value, new.key, index, axis=2)
        value.value = lax.dynamic_update_slice_in_dim(value.value, new.value, index, axis=2)
        return KeyValue(key.value, value.value)


class MlpBlock(nn.Module):
    """Computes the feed-forward layer: `wo` of the elementwise product of the activated `wi_0` and `wi_1`.

    T5 1.0 has a single projection, `wi`.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], kept: Bool[Array, "B 1 F"] | None = None) -> Float[Array, "B T D"]:
        cfg = self.config
        names: Sequence[str] = ["wi"] if len(cfg.mlp_activations) == 1 else [f"wi_{i}" for i in range(9)]
        branches = [
            Dense(cfg.mlp_dim, ("embed", "mlp"), cfg.dtype, name=name)(x)
            for name, _ in zip(names, cfg.mlp_activations, strict=False)
        ]
        if tuple(cfg.mlp_activations) == ("gelu", "linear"):
            hidden = gated_gelu(*branches)
        else:
            activations = [(lambda h: h) if a == "linear" else getattr(nn, a) for a in cfg.mlp_activations]
            hidden = functools.reduce(operator.mul, [f(h) for f, h in zip(activations, branches, strict=True)])
        hidden = with_logical_constraint(drop(hidden, kept, cfg.dropout_rate), ("batch", "length", "mlp"))
        return Dense(cfg.emb_dim, ("mlp", "embed"), cfg.dtype, name="wo")(hidden)
