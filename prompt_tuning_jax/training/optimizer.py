"""Adafactor as T5X runs it, AdamW with clipped gradients, both through optax, and learning-rate schedules."""

import math

import optax

from prompt_tuning_jax.settings import Count, Natural, NotNegative, Peak, Positive, Rate, Share, Switch, check_values


def adafactor(
    learning_rate: Rate,
    *,
    start_step: Natural = 0,
    decay_rate: Positive = 0.8,
    weight_decay: Share = 1e-5,
    parameter_scale: Switch = False,
    momentum: Share | None = None,
) -> optax.GradientTransformation:
    """Adafactor with the paper's settings (section 3), equal to T5X's update for update.

    Args:
      learning_rate: a number, or a schedule over this run's own steps.
      start_step: the optimiser's step at which this run begins. T5X takes it from the base's checkpoint, 1,100,000 for
        the LM-adapted T5 1.1; the second moment then averages over all steps so far, and each early update has a root
        mean square of exactly the learning rate. 0 starts a fresh average.
      decay_rate: the second moment's weight at step t is 1 - t ** -decay_rate.
      weight_decay: share of a parameter taken off each step; T5X does not multiply it by the learning rate.
      parameter_scale: updates in units of a parameter's own root mean square (pre-training).
      momentum: decay of a first moment; None keeps none.
    """
    check_values(adafactor, locals())
    return optax.adafactor(
        learning_rate,
        # T5X factors a second moment whose two dimensions are at least 128 and ignores its own rules for matrices,
        # so that prompts shorter than 128 keep all of it.
        min_dim_size_to_factor=128,
        decay_rate=decay_rate,
        decay_offset=-start_step,
        multiply_by_parameter_scale=parameter_scale,
        clipping_threshold=1.0,
        momentum=momentum,
        weight_decay_rate=weight_decay or None,
        eps=1e-30,
    )


def adamw(
    learning_rate: Rate,
    b1: Share = 0.9,
    b2: Share = 0.999,
    eps: Positive = 1e-8,
    *,
    weight_decay: NotNegative = 1e-4,
) -> optax.GradientTransformation:
    """AdamW of optax, whose defaults these are, once its numbers are checked."""
    check_values(adamw, locals())
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)


def clipped_adamw(
    learning_rate: Rate, *, weight_decay: NotNegative = 1e-5, clip_norm: Positive = 1.0
) -> optax.GradientTransformation:
    """AdamW of gradients whose global norm is at most `clip_norm`."""
    check_values(clipped_adamw, locals())
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(learning_rate, weight_decay=weight_decay))


def warmup_linear(peak: Peak, steps: Count, warmup: NotNegative = 0.0) -> optax.Schedule:
    """Linear up to `peak`, then linear down to 0 at `steps`, as transformers' schedule of that name.

    Args:
      warmup: how many steps the rise takes, or which share of `steps` if it is below 1.
    """
    check_values(warmup_linear, locals())
    rise = math.ceil(warmup * steps) if warmup < 1 else math.ceil(warmup)
    fall = optax.linear_schedule(peak, 0.0, max(steps - rise, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), fall], [rise]) if rise else fall


def warmup_cosine(peak: Peak, steps: Count, warmup: Share = 0.05, floor: Share = 0.05) -> optax.Schedule:
    """Linear up to `peak` over the first `warmup` share of `steps`, then a cosine down to `floor` times it."""
    check_values(warmup_cosine, locals())
    rise = max(1, math.ceil(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise + 1), floor * peak)
