"""Lists the numbers of Lester et al. 2021 (arXiv 2104.08691, version 2) that ours are compared with.

PRINTED numbers are from the paper's text and tables. DIGITISED numbers are read from its figures, to about 0.05 points
in figure 1 and 0.2 to 0.3 points in figure 3. Other sources are named. Scores are in per cent.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experiments.averages import Spread

PRINTED = "printed"
DIGITISED = "digitised"
SPOT = "SPoT's measurement"  # Vu et al. 2022, arXiv 2110.07904, with the same recipe

SIZES = ("small", "base", "large", "xl", "xxl")


class Curve(NamedTuple):
    """Holds a line of a figure.

    Attributes:
      source: PRINTED, DIGITISED, or the name of another source.
      points: the scores, in the order of `SIZES`.
    """

    source: str
    points: tuple[Spread, ...]


class Model(NamedTuple):
    """Holds a size of T5 1.1. `share` is the prompt's percentage of the parameters for length 100, as printed."""

    d_model: int
    d_ff: int
    heads: int
    layers: int
    parameters: int
    prompt_parameters: int
    share: str


def _curve(source: str, means: str, stds: str = "") -> Curve:
    """Returns a curve from means and standard deviations; "-" is a standard deviation that is not known."""
    known = stds.split() or ["-"] * len(means.split())
    pairs = zip(means.split(), known, strict=True)
    return Curve(source, tuple(Spread(float(mean), None if std == "-" else float(std)) for mean, std in pairs))


def _spread(text: str) -> Spread:
    mean, _, std = text.partition(" ")
    return Spread(float(mean), float(std) if std else None)


# The embedding table has 32,128 rows, and a head has 64 dimensions.
MODELS = {
    "small": Model(512, 1024, 6, 8, 76_961_152, 51_200, "0.0665"),
    "base": Model(768, 2048, 12, 12, 247_577_856, 76_800, "0.0310"),
    "large": Model(1024, 2816, 16, 24, 783_150_080, 102_400, "0.0131"),
    "xl": Model(2048, 5120, 32, 24, 2_849_757_184, 204_800, "0.0072"),
    "xxl": Model(4096, 10240, 64, 24, 11_135_332_352, 409_600, "0.0037"),
}

# Scores on SuperGLUE's dev set.
FIGURE_1 = {
    "prompt_tuning": _curve(DIGITISED, "58.5 63.7 75.8 80.3 90.0", "1.3 1.3 0.5 3.3 -"),
    "model_tuning": _curve(DIGITISED, "62.8 73.7 81.3 83.1 89.9", "0.8 0.6 0.6 0.2 0.2"),
    "multi_task": _curve(DIGITISED, "63.4 77.3 85.4 88.0 90.2"),  # the last value is approximate
    "prompt_tuning_spot": _curve(SPOT, "59.8 63.1 74.5 79.2 88.8"),
}
# Scores of GPT-3 few-shot by number of parameters, digitised (sizes: Brown et al. 2020, table 2.1). The leaderboard
# score below is printed.
PROMPT_DESIGN = {
    125_000_000: 50.2,
    350_000_000: 56.2,
    760_000_000: 56.8,
    1_300_000_000: 60.0,
    2_700_000_000: 64.3,
    6_700_000_000: 63.6,
    13_000_000_000: 66.9,
    175_000_000_000: 73.2,
}
PROMPT_DESIGN_LEADERBOARD = 71.8

FIGURE_3A = {  # prompt length
    "1": _curve(DIGITISED, "46.6 48.0 46.2 61.7 82.5"),
    "5": _curve(DIGITISED, "50.7 55.0 60.9 77 89"),
    "20": _curve(DIGITISED, "57.0 61.4 72.3 83.5 89.1"),
    "100": _curve(DIGITISED, "58.6 63.7 75.8 80.3 89.8"),
    "150": _curve(DIGITISED, "58.8 64.5 73.8 77.0 85.8"),
}
FIGURE_3B = {  # prompt initialisation
    "random_uniform": _curve(DIGITISED, "56.2 47.0 67.0 60.1 89.9"),
    "sampled_vocabulary": _curve(DIGITISED, "59.5 64.3 74.0 82.4 87.4"),
    "class_labels": _curve(DIGITISED, "58.5 63.7 75.8 80.3 89.5"),
}
FIGURE_3C = {  # pre-training objective; 8.0 is the score if no prediction is a label
    "span": _curve(DIGITISED, "51.4 8.0 8.2 8.0 82.7"),
    "span_sentinel": _curve(DIGITISED, "48.7 8.0 37.2 16.5 75.7"),
    "lm": _curve(DIGITISED, "58.6 63.8 75.9 80.4 89.7"),
}
FIGURE_3D = {  # steps of LM adaptation
    "0": FIGURE_3C["span"],
    "10000": _curve(DIGITISED, "52.8 57.9 42.0 55.4 82.1"),
    "50000": _curve(DIGITISED, "57.2 60.6 74.2 73.2 86.5"),
    "100000": FIGURE_3C["lm"],
}

# Figure 4: percentages of the model's parameters, and numbers of token ids, as stated in the paper's text. None means
# that there is no lower bound.
PREFIX_TUNING_SHARE = (0.1, 1.0)  # at inference; more in training
WARP_SHARE = (None, 0.1)
PROMPT_DESIGN_IDS = (500, 2_000)

# Table 1: F1, trained on SQuAD, XXL; model tuning, prompt tuning.
TABLE_1 = {
    "SQuAD": (_spread("94.9 0.2"), _spread("94.8 0.1")),
    "TextbookQA": (_spread("54.3 3.7"), _spread("66.8 2.9")),
    "BioASQ": (_spread("77.9 0.4"), _spread("79.1 0.3")),
    "RACE": (_spread("59.8 0.6"), _spread("60.7 0.5")),
    "RE": (_spread("88.4 0.1"), _spread("88.8 0.2")),
    "DuoRC": (_spread("68.9 0.7"), _spread("67.7 1.1")),
    "DROP": (_spread("68.9 1.7"), _spread("67.1 1.9")),
}
# Table 2: trained on, evaluated on, tuning -> accuracy, F1; XXL.
TABLE_2 = {
    ("QQP", "MRPC", "model"): (_spread("73.1 0.9"), _spread("81.2 2.1")),
    ("QQP", "MRPC", "prompt"): (_spread("76.3 0.1"), _spread("84.3 0.3")),
    ("MRPC", "QQP", "model"): (_spread("74.9 1.3"), _spread("70.9 1.2")),
    ("MRPC", "QQP", "prompt"): (_spread("75.4 0.8"), _spread("69.7 0.3")),
}


class Ensemble(NamedTuple):
    """Holds a row of table 3; each column has one value per metric."""

    metrics: tuple[str, ...]
    average: tuple[float, ...]
    best: tuple[float, ...]
    ensemble: tuple[float, ...]


# Table 3: five prompts on one frozen XXL, SuperGLUE's dev sets.
TABLE_3: Mapping[str, Ensemble] = {
    "BoolQ": Ensemble(("acc",), (91.1,), (91.3,), (91.7,)),
    "CB": Ensemble(("acc", "F1"), (99.3, 99.0), (100.0, 100.0), (100.0, 100.0)),
    "COPA": Ensemble(("acc",), (98.8,), (100.0,), (100.0,)),
    "MultiRC": Ensemble(("EM", "F1a"), (65.7, 88.7), (66.3, 89.0), (67.1, 89.4)),
    "ReCoRD": Ensemble(("EM", "F1"), (92.7, 93.4), (92.9, 93.5), (93.2, 93.9)),
    "RTE": Ensemble(("acc",), (92.6,), (93.5,), (93.5,)),
    "WiC": Ensemble(("acc",), (76.2,), (76.6,), (77.4,)),
    "WSC": Ensemble(("acc",), (95.8,), (96.2,), (96.2,)),
}
TABLE_3_MEAN = Ensemble(("average",), (90.5,), (91.0,), (91.3,))

# Table 5: seconds until the score on BoolQ is within 1% of the final mean, with P=100.
TABLE_5 = {"small": 985, "base": 1_797, "large": 5_016, "xl": 12_900, "xxl": 13_875}
