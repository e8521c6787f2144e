"""Several data sets in one run: `data_dir = "data/web, data/code:2, data/mine:0.5"`.

The number is how often each text of a data set is seen in an epoch, 1 where there is none: of `:2`
every text twice, of `:0.5` every other one, in the next epoch those that were left out. A data set
of weight 0 is as if it were not named.
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


def times_in_epoch(n: int, weight: float, epoch: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `n` texts is seen in an epoch, (n,) int64.

    Over any k epochs from the first, k * weight times, rounded up or down; `rng`, the same in every
    epoch, decides for which texts up.
    """
    phase = (rng.permutation(n) + 0.5) / max(1, n)
    return (np.floor((epoch + 1) * weight + phase) - np.floor(epoch * weight + phase)).astype(int)
