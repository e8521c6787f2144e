"""Several data sets in one run: `data_dir = "data/web, data/code:2, data/mine:0.5"`.

The number is how often an epoch sees each segment of a data set (a text, or what fits in a row of a
longer one), 1 where there is none: of `:2` each twice, of `:0.5` a random half, in the next epoch
the other half. A data set of weight 0 is as if it were not named.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError

MAX_WEIGHT = 1000


@dataclass(frozen=True)
class DataSet:
    folder: str
    weight: float = 1.0  # times an epoch

    def __str__(self) -> str:
        return self.folder if self.weight == 1 else f"{self.folder}:{self.weight:g}"


def parse_mixture(text: str, setting: str = "data_dir") -> list[DataSet]:
    """The data sets of a setting, those of weight 0 left out; UserError for anything else."""
    if os.path.exists(text):  # a folder whose name has a comma or a colon
        return [DataSet(text)]
    sets = []
    for part in text.split(","):
        folder, colon, number = part.strip().rpartition(":")
        try:
            weight = float(number) if colon else math.nan
        except ValueError:
            weight = math.nan
        if math.isnan(weight):
            if colon and not {*"/\\"} & {*number}:  # C:\\data has a colon, too
                raise UserError(f"{setting}: {part.strip()!r}: its weight is not a number")
            folder, weight = part.strip(), 1.0
        if not folder:
            raise UserError(f"{setting}={text!r} names an empty folder: leave out the extra comma")
        if not 0 <= weight <= MAX_WEIGHT:
            raise UserError(f"{setting}: {part.strip()!r}: a weight is 0 to {MAX_WEIGHT}")
        sets.append(DataSet(folder, weight))
    names = [Path(data_set.folder).absolute() for data_set in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice: name it once, with the weights' sum")
    if not any(data_set.weight for data_set in sets):
        raise UserError(f"{setting}={text!r} has no weight above 0")
    return [data_set for data_set in sets if data_set.weight]


def draw_phases(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of a data set's segments on a circle of length 1, (n,) float64, for times_in_epoch.

    In random order, each as far from the one before as it is long: so an arc of `share` of the
    circle has `share` of the tokens, to within one segment (systematic sampling with a random
    start: Särndal et al., Model Assisted Survey Sampling, 3.4).
    """
    order = rng.permutation(len(lengths))
    n_tokens = max(1, int(lengths.sum()))
    ends = np.cumsum(lengths[order]) + rng.integers(n_tokens)
    phases = np.empty(len(lengths))
    phases[order] = (ends % n_tokens + 0.5) / n_tokens
    return phases


def times_in_epoch(weights: np.ndarray, phases: np.ndarray, epoch: int) -> np.ndarray:
    """How often each segment is seen in an epoch, (n,) int64.

    Over the first k epochs k * weight times, rounded up or down as the phase decides.
    """
    before, after = np.floor(epoch * weights + phases), np.floor((epoch + 1) * weights + phases)
    return (after - before).astype(int)
