"""Makes optax optimisers and learning-rate schedules: Adafactor as T5X runs it, and AdamW with or without clipping."""

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
    """Returns Adafactor with the paper's settings (section 3). Each update equals T5X's.

    Args:
      learning_rate: a number, or a schedule over the steps of this run.
      start_step: the optimiser's step number at the start of this run. T5X takes it from the base model's checkpoint,
        1,100,000 for the LM-adapted T5 1.1. With such a large step, the second moment decays slowly, and each early
        update has a root mean square of exactly the learning rate. 0 starts a new average.
      decay_rate: the decay of the second moment at step t is 1 - t ** -decay_rate.
      weight_decay: the fraction by which each step shrinks the parameters. As in T5X, it is not multiplied by the
        learning rate.
      parameter_scale: whether to multiply each update by the root mean square of its parameter, as in pre-training.
      momentum: the decay of the first moment; None for no momentum.
    """
    check_values(adafactor, locals())
    return optax.adafactor(
        learning_rate,
        # T5X factors a second moment only if both dimensions are at least 128, and ignores its own rules for matrices.
        # So the second moment of a prompt with fewer than 128 positions is not factored.
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
    """Returns optax's AdamW, with optax's defaults, after checking the arguments."""
    check_values(adamw, locals())
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)


def clipped_adamw(
    learning_rate: Rate, *, weight_decay: NotNegative = 1e-5, clip_norm: Positive = 1.0
) -> optax.GradientTransformation:
    """Returns AdamW after clipping the gradients to a global norm of at most `clip_norm`."""
    check_values(clipped_adamw, locals())
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(learning_rate, weight_decay=weight_decay))


def warmup_linear(peak: Peak, steps: Count, warmup: NotNegative = 0.0) -> optax.Schedule:
    """Returns a schedule that rises linearly to `peak` and then falls linearly to 0 at `steps`.

    It equals transformers' linear schedule with warm-up.

    Args:
      warmup: the number of steps of the rise; below 1, a fraction of `steps`.
    """
    check_values(warmup_linear, locals())
    rise = math.ceil(warmup * steps) if warmup < 1 else math.ceil(warmup)
    fall = optax.linear_schedule(peak, 0.0, max(steps - rise, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), fall], [rise]) if rise else fall


def warmup_cosine(peak: Peak, steps: Count, warmup: Share = 0.05, floor: Share = 0.05) -> optax.Schedule:
    """Returns a schedule that rises linearly to `peak` and then falls along a cosine to `floor * peak` at `steps`.

    Args:
      warmup: the rise, as a fraction of `steps`.
    """
    check_values(warmup_cosine, locals())
    rise = max(1, math.ceil(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise + 1), floor * peak)
