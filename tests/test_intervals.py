"""Intervals that cover, tests that keep their level, each beside a naive one that does not.

A simulated evaluation draws its items, and its clusters, anew from a population whose value is
known. With RUNS of them a coverage of 95 % is measured to +-0.5 points (one standard error).
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from evaluation import intervals
from evaluation.intervals import (
    Difference,
    Estimate,
    holm,
    macro_mean,
    mean,
    paired,
    paired_ratios,
    ratio,
    share,
    verdict,
    without,
)

RUNS = 2000
SOME = slice(500)  # of them, for naive intervals that are far off
Z = 1.959964


def covers(estimates: list[Estimate], truth: float) -> float:
    """The share of intervals that contain the truth."""
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def naive(estimates: list[Estimate], quantile: float = Z) -> list[Estimate]:
    """The same values, each with an interval of value +- quantile * standard error."""
    return [
        Estimate(e.value, s, e.value - quantile * s, e.value + quantile * s, e.n)
        for e in estimates
        for s in [e.standard_error]
    ]


def width(estimates: list[Estimate]) -> float:
    return float(np.mean([estimate.high - estimate.low for estimate in estimates]))


def is_right(coverage: float) -> bool:
    return 0.93 <= coverage <= 0.97


def clustered_shares(
    rng: np.random.Generator, value: float, correlation: float, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """0/1 items (RUNS, N) whose clusters have beta-distributed chances, and labels (N,)."""
    a, b = (p * (1 / correlation - 1) for p in (value, 1 - value))
    chances = rng.beta(a, b, (RUNS, len(sizes))).repeat(sizes, axis=1)
    return rng.random(chances.shape) < chances, np.arange(len(sizes)).repeat(sizes)


# Shares


@pytest.mark.parametrize(("value", "n"), [(0.02, 250), (0.25, 22), (0.25, 500)])
def test_intervals_of_shares_cover(value, n):
    estimates = [share(run) for run in np.random.default_rng(0).random((RUNS, n)) < value]
    assert is_right(covers(estimates, value))
    if n < 500:
        assert covers(naive(estimates), value) < covers(estimates, value) - 0.015


def test_wilsons_bounds_are_the_shares_that_a_z_test_just_accepts():
    for n, k in [(10, 0), (10, 10), (37, 1), (500, 130)]:
        estimate = share([1] * k + [0] * (n - k))
        for bound in (estimate.low, estimate.high):
            if bound != k / n:
                z = abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert z == pytest.approx(Z, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "correlation", "n_clusters"), [(0.02, 0.2, 250), (0.25, 0.3, 100), (0.25, 0.1, 10)]
)
def test_intervals_of_clustered_shares_cover(value, correlation, n_clusters):
    rng = np.random.default_rng(1)
    runs, labels = clustered_shares(rng, value, correlation, np.full(n_clusters, 5))
    estimates = [share(run, labels) for run in runs]
    assert is_right(covers(estimates, value))
    assert covers([share(run) for run in runs[SOME]], value) < 0.92
    assert covers(naive(estimates), value) < covers(estimates, value)
    if n_clusters == 10:
        assert covers(naive(estimates), value) < 0.92


def test_intervals_of_shares_cover_with_clusters_of_unequal_sizes():
    rng = np.random.default_rng(2)
    sizes = np.array([60, 30, 30, *[10] * 6, *[3] * 20])
    runs, labels = clustered_shares(rng, 0.3, 0.3, sizes)
    estimates = [share(run, labels) for run in runs]
    assert is_right(covers(estimates, 0.3))
    assert covers(naive(estimates), 0.3) < 0.91


def test_the_standard_error_without_clusters_is_that_of_lm_eval():
    def lm_eval_error(values):  # mean_stderr and sample_stddev in lm_eval/api/metrics.py
        mu = sum(values) / len(values)
        deviation = math.sqrt(sum((x - mu) ** 2 for x in values) / (len(values) - 1))
        return deviation / math.sqrt(len(values))

    rng = np.random.default_rng(3)
    for n in (2, 7, 500):
        correct, values = rng.integers(0, 2, n).tolist(), rng.random(n).tolist()
        assert share(correct).standard_error == pytest.approx(lm_eval_error(correct), rel=1e-12)
        assert mean(values).standard_error == pytest.approx(lm_eval_error(values), rel=1e-12)
        gains = [a - b for a, b in zip(values, correct, strict=True)]
        error = paired(values, correct).standard_error
        assert error == pytest.approx(lm_eval_error(gains), rel=1e-12)


def test_the_clustered_standard_error_is_a_sum_over_pairs_of_items_of_one_cluster():
    rng = np.random.default_rng(4)
    values, labels = rng.normal(size=24), np.arange(24) // 4
    gaps = values - values.mean()
    pairs = sum(gaps[i] * gaps[j] for i in range(24) for j in range(24) if i // 4 == j // 4)
    error = math.sqrt(pairs / 24**2 * 6 / 5)  # Miller's equation 4, times G / (G - 1)
    order = rng.permutation(24)
    names = np.array(list("abcdef"))[labels]
    for estimate in (mean(values, labels), mean(values[order], names[order].tolist())):
        assert estimate.standard_error == pytest.approx(error, rel=1e-12)
        assert estimate.high - estimate.value == pytest.approx(2.570582 * error, rel=1e-6)
    alone = mean(values, range(24))
    assert [alone.low, alone.high] == pytest.approx([mean(values).low, mean(values).high])


# Means and ratios


def test_intervals_of_means_cover_with_few_clusters():
    rng = np.random.default_rng(5)
    values = 0.3 + 0.1 * rng.normal(size=(RUNS, 8)).repeat(6, axis=1)
    values += 0.1 * rng.normal(size=values.shape)
    estimates = [mean(run, np.arange(48) // 6) for run in values]
    assert is_right(covers(estimates, 0.3))
    assert covers(naive(estimates), 0.3) < 0.92  # a normal quantile
    assert covers([mean(run) for run in values[SOME]], 0.3) < 0.75


def documents(rng: np.random.Generator, n: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes (RUNS, n) of texts of log-normal lengths; short ones cost more a byte."""
    n_bytes = 400 * np.exp(sigma * rng.normal(size=(RUNS, n)))
    return n_bytes * (1 + 0.3 * (n_bytes / 400) ** -0.5 + 0.3 * rng.normal(size=(RUNS, n))), n_bytes


def bits_per_byte(sigma: float) -> float:
    """Of the population of `documents`: E[B^k] is exp(k^2 sigma^2 / 2) times 400^k."""
    return 1 + 0.3 * math.exp(sigma**2 / 8 - sigma**2 / 2)


def test_intervals_of_bits_per_byte_cover():
    bits, n_bytes = documents(np.random.default_rng(6), 300, 1.0)
    estimates = [ratio(*run) for run in zip(bits, n_bytes, strict=True)]
    assert is_right(covers(estimates, bits_per_byte(1.0)))
    assert estimates[0].value == bits[0].sum() / n_bytes[0].sum()
    of_each = [mean(run) for run in (bits / n_bytes)[SOME]]
    assert covers(of_each, bits_per_byte(1.0)) < 0.1  # not a mean over documents
    n = n_bytes.shape[1]
    fixed = [  # and not with the bytes taken as a constant
        Estimate(e.value, s, e.value - Z * s, e.value + Z * s, n)
        for e, b, c in zip(estimates, bits, n_bytes, strict=True)
        for s in [b.std(ddof=1) * math.sqrt(n) / c.sum()]
    ]
    assert covers(fixed, bits_per_byte(1.0)) > 0.97


def test_intervals_of_bits_per_byte_cover_with_few_documents_of_unequal_lengths():
    rng = np.random.default_rng(7)
    n_bytes = np.exp(1.5 * rng.normal(size=(RUNS, 20)))
    bits = n_bytes * (1 + 0.3 * rng.normal(size=n_bytes.shape))
    estimates = [ratio(*run) for run in zip(bits, n_bytes, strict=True)]
    assert is_right(covers(estimates, 1.0))
    assert covers(naive(estimates, 2.093024), 1.0) < 0.91  # t with 19 degrees of freedom


def test_intervals_of_bits_per_byte_cover_with_clusters():
    rng = np.random.default_rng(8)
    n_bytes = np.exp(0.5 * rng.normal(size=(RUNS, 200)))
    rates = 1 + 0.2 * rng.normal(size=(RUNS, 40)).repeat(5, axis=1)
    bits = n_bytes * (rates + 0.2 * rng.normal(size=n_bytes.shape))
    runs = list(zip(bits, n_bytes, strict=True))
    assert is_right(covers([ratio(*run, np.arange(200) // 5) for run in runs], 1.0))
    assert covers([ratio(*run) for run in runs[SOME]], 1.0) < 0.85


def test_macro_mean_by_hand():
    tasks = [Estimate(0.5, 0.03, 0, 1, 100), Estimate(0.3, 0.04, 0, 1, 50)]
    both = macro_mean(tasks)
    assert (both.value, both.n) == (0.4, 150)
    assert both.standard_error == pytest.approx(0.025)
    assert [both.low, both.high] == pytest.approx([0.4 - Z * 0.025, 0.4 + Z * 0.025])


# Two systems


def two_models(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """0/1 items (RUNS, n) of two models that find the same items hard, and their difference."""
    easy = rng.random((RUNS, n)) < 0.4
    first = rng.random((RUNS, n)) < np.where(easy, 0.95, 0.10)
    second = rng.random((RUNS, n)) < np.where(easy, 0.90, 0.07)
    return first, second, 0.4 * 0.05 + 0.6 * 0.03


def test_paired_intervals_cover_and_are_narrower_than_unpaired_ones():
    first, second, truth = two_models(np.random.default_rng(9), 400)
    differences = [paired(*run) for run in zip(first, second, strict=True)]
    assert is_right(covers(differences, truth))
    unpaired = []
    for a, b in zip(map(share, first), map(share, second), strict=True):
        value, error = a.value - b.value, math.hypot(a.standard_error, b.standard_error)
        unpaired.append(Estimate(value, error, value - Z * error, value + Z * error, a.n))
    assert covers(unpaired, truth) > 0.99
    assert width(differences) < 0.7 * width(unpaired)
    assert all(d.high - d.low < u.high - u.low for d, u in zip(differences, unpaired, strict=True))


def test_paired_intervals_cover_where_one_system_is_right_wherever_the_other_is():
    more = np.random.default_rng(10).random((RUNS, 100)) < 0.08
    differences = [paired(run, np.zeros(100)) for run in more]
    assert is_right(covers(differences, 0.08))
    assert covers(naive(differences), 0.08) < 0.93


def test_paired_intervals_of_clustered_items_cover():
    rng = np.random.default_rng(11)
    chances = rng.dirichlet(np.array([0.2, 0.1, 0.7]) * (1 / 0.3 - 1), (RUNS, 80))
    at = rng.random((RUNS, 400))
    first = at < chances[..., 0].repeat(5, axis=1)
    second = at > 1 - chances[..., 1].repeat(5, axis=1)
    runs = list(zip(first, second, strict=True))
    assert is_right(covers([paired(*run, np.arange(400) // 5) for run in runs], 0.1))
    assert covers([paired(*run) for run in runs[SOME]], 0.1) < 0.88


@pytest.mark.parametrize(
    ("n", "left_out", "per_cluster"), [(300, 0.3, 1), (300, 0.3, 4), (1000, 0.02, 1), (60, 0.5, 1)]
)
def test_intervals_of_a_change_by_items_left_out_cover(n, left_out, per_cluster):
    """Items that were trained on are right more often; both means share the others."""
    rng = np.random.default_rng(18)
    dirty = (rng.random((RUNS, n // per_cluster)) < left_out).repeat(per_cluster, axis=1)
    chances = np.where(dirty, 0.6, 0.3)
    if per_cluster > 1:
        chances += rng.uniform(-0.2, 0.2, (RUNS, n // per_cluster)).repeat(per_cluster, axis=1)
    right, ones = rng.random((RUNS, n)) < chances, np.ones(n)
    clusters = None if per_cluster == 1 else np.arange(n) // per_cluster
    runs = list(zip(right, ~dirty, strict=True))
    changes = [without(values, ones, kept, clusters) for values, kept in runs]
    assert is_right(covers(changes, left_out * 0.3))
    for (values, kept), change in zip(runs[:20], changes, strict=False):
        assert change.value == pytest.approx(values.mean() - values[kept].mean())
    labels = np.arange(n) if clusters is None else clusters
    apart = [(share(v, labels), share(v[kept], labels[kept])) for v, kept in runs[SOME]]
    apart = np.mean([a.standard_error + b.standard_error for a, b in apart])
    assert width([c for c in changes if math.isfinite(c.high)]) < 0.7 * 2 * Z * apart
    nothing = without(right[0], ones, ones)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    few = np.arange(n) >= 9
    for kept in (few, ~few):  # too few of one part for an interval
        assert math.isinf(without(right[0], ones, kept).high)


def test_paired_intervals_of_probabilities_cover():
    rng = np.random.default_rng(12)
    base = 0.8 * rng.random((RUNS, 150))
    first = base + 0.2 * rng.random(base.shape) ** 2
    differences = [paired(*run) for run in zip(first, base, strict=True)]
    assert is_right(covers(differences, 0.2 / 3))
    unpaired = [math.hypot(a.std(), b.std()) for a, b in zip(first, base, strict=True)]
    assert width(differences) < 0.3 * 2 * Z * np.mean(unpaired) / math.sqrt(150)


def test_paired_intervals_of_bits_per_byte_cover():
    """The two systems count other bytes, as with tokenizers of their own."""
    rng = np.random.default_rng(13)
    bits, n_bytes = documents(rng, 250, 0.8)
    other_bytes = n_bytes * rng.uniform(0.97, 0.99, n_bytes.shape)
    rates = bits / n_bytes + 0.03 + 0.05 * rng.normal(size=bits.shape)
    runs = list(zip(bits, n_bytes, other_bytes * rates, other_bytes, strict=True))
    differences = [paired_ratios((a, b), (c, d)) for a, b, c, d in runs]
    assert is_right(covers(differences, -0.03))
    assert differences[0].value == pytest.approx(
        bits[0].sum() / n_bytes[0].sum() - runs[0][2].sum() / other_bytes[0].sum()
    )
    assert width(differences) < 0.4 * width([ratio(a, b) for a, b, _, _ in runs])
    sources = np.arange(250) // 10
    shift = 0.05 * rng.normal(size=(RUNS, 25)).repeat(10, axis=1)
    runs = [(a, b, c + d * s, d) for (a, b, c, d), s in zip(runs, shift, strict=True)]
    clustered = [paired_ratios((a, b), (c, d), sources) for a, b, c, d in runs]
    assert is_right(covers(clustered, -0.03))
    assert covers([paired_ratios((a, b), (c, d)) for a, b, c, d in runs[SOME]], -0.03) < 0.8


def mcnemar(n_first: int, n_second: int) -> Fraction:
    """The two-sided exact binomial test, in whole numbers."""
    n, smaller = n_first + n_second, min(n_first, n_second)
    return min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(smaller + 1)), 2**n))


def discordant(n_first: int, n_second: int, n_equal: int = 10) -> tuple[list[int], list[int]]:
    return [1] * (n_first + n_equal) + [0] * n_second, [0] * n_first + [1] * (n_equal + n_second)


def test_mcnemar_of_a_few_items_by_hand():
    table = {(0, 0): 1, (1, 0): 1, (5, 0): 1 / 16, (0, 6): 1 / 32, (1, 5): 7 / 32, (2, 8): 7 / 64}
    for counts, p in table.items():
        assert float(mcnemar(*counts)) == p
        assert paired(*discordant(*counts)).p_value == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("counts", [(12, 25), (59, 41), (180, 120), (1100, 1020), (0, 400)])
def test_mcnemar_equals_whole_numbers(counts):
    difference = paired(*discordant(*counts))
    assert difference.p_value == pytest.approx(float(mcnemar(*counts)), rel=1e-10)
    assert (difference.n_first_only, difference.n_second_only) == counts
    assert difference.value == pytest.approx((counts[0] - counts[1]) / difference.n)


def test_the_clustered_test_equals_all_sign_changes_one_by_one():
    rng = np.random.default_rng(14)
    p_values = []
    for _ in range(20):
        first, second = rng.integers(0, 2, (2, 40))
        labels = rng.integers(0, 9, 40)
        sums = [int((first - second)[labels == label].sum()) for label in set(labels.tolist())]
        flips = list(itertools.product([-1, 1], repeat=len(sums)))
        totals = [abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in flips]
        p = sum(total >= abs(sum(sums)) for total in totals) / len(flips)
        p_values.append(p)
        assert paired(first, second, labels).p_value == pytest.approx(p, rel=1e-12)
    assert len(set(p_values)) > 5


def equal_systems(
    rng: np.random.Generator, n_clusters: int, size: int, correlation: float
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """RUNS pairs of 0/1 items, and the labels of clusters in which either system may be better."""
    weights = np.array([0.05, 0.05, 0.9]) * (1 / correlation - 1)
    chances = rng.dirichlet(weights, (RUNS, n_clusters)).repeat(size, axis=1)
    at = rng.random(chances.shape[:2])
    runs = zip(at < chances[..., 0], at > 1 - chances[..., 1], strict=True)
    return list(runs), np.arange(n_clusters).repeat(size)


def rejected(differences: list[Difference]) -> float:
    return float(np.mean([difference.p_value < 0.05 for difference in differences]))


def test_equal_systems_are_told_apart_in_at_most_5_percent():
    rng = np.random.default_rng(15)
    runs, labels = equal_systems(rng, 30, 4, 0.05)
    differences = [paired(*run, labels) for run in runs]
    assert 0.01 < rejected(differences) < 0.05
    assert np.mean([abs(d.value) > Z * d.standard_error for d in differences]) > 0.06  # a z test
    runs, labels = equal_systems(rng, 20, 6, 0.3)
    assert 0.01 < rejected([paired(*run, labels) for run in runs]) < 0.06
    assert rejected([paired(*run) for run in runs[SOME]]) > 0.1  # McNemar's
    values = rng.normal(size=(2, RUNS, 30))
    assert 0.03 < rejected([paired(*run) for run in zip(*values, strict=True)]) < 0.07


def test_the_smallest_difference_is_found_with_a_power_of_80_percent():
    rng = np.random.default_rng(16)
    gap = 2.8 / math.sqrt(200)
    differences = [paired(run, np.zeros(200)) for run in gap + rng.normal(size=(RUNS, 200))]
    assert np.mean([d.smallest for d in differences]) == pytest.approx(gap, rel=0.02)
    assert 0.77 < rejected(differences) < 0.83
    at = rng.random((RUNS, 1000))
    differences = [paired(*run) for run in zip(at < 0.12, at > 1 - 0.0805, strict=True)]
    assert np.mean([d.smallest for d in differences]) == pytest.approx(0.0395, abs=0.001)
    assert 0.75 < rejected(differences) < 0.85  # exact, thus a little under 80 %
    none = paired(np.ones(1000), np.ones(1000))  # where no items differ, the test sets the bound
    runs = rng.random((RUNS, 1000)) < none.smallest
    assert 0.77 < rejected([paired(run, np.zeros(1000)) for run in runs]) < 0.83


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


# In words


def test_verdicts():
    difference = paired(*discordant(40, 10, 450))
    p = "adjusted p below 0.0001, 500 items)"
    interval = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    assert (
        verdict(difference, 2e-5, "A", "B")
        == f"A is better than B (difference +0.0600, {interval}, {p}"
    )
    assert "A is worse than B" in verdict(difference, 2e-5, "A", "B", lower_is_better=True)
    reverse = paired(*discordant(10, 40, 450))
    assert verdict(reverse, 0.0123) == (
        f"the model is worse than the baseline (difference -0.0600, 95 % interval "
        f"{reverse.low:+.4f} to {reverse.high:+.4f}, adjusted p 0.0123, 500 items)"
    )
    assert "is better" in verdict(reverse, 0.0123, lower_is_better=True)
    assert "A and B are not distinguishable (difference +0.0600" in verdict(
        difference, 0.05, "A", "B"
    )
    shown = f"a difference of {difference.smallest:.4f} had an 80 % chance to be shown)"
    assert verdict(difference, 0.05).endswith(shown)


def test_verdicts_on_too_little():
    equal = verdict(paired(*discordant(0, 0, 50)), 1.0)
    assert "not distinguishable (equal on each of 50 items; a difference of 0.1580 had" in equal
    assert verdict(paired([0.5, 0.2], [0.5, 0.2]), 1.0).endswith("(equal on each of 2 items)")
    for few in (paired([0.5], [0.25]), paired([1], [0]), paired([1] * 5, [0] * 5)):
        assert few.p_value > 0.05
        assert "not distinguishable" in verdict(few, few.p_value)
        assert "so few items or clusters cannot show" in verdict(few, few.p_value)
    six = paired([1] * 6, [0] * 6)
    assert six.p_value == pytest.approx(1 / 32) and six.smallest == 1


# Borders


def test_one_item():
    assert share([1]).low == pytest.approx(1 / (1 + Z**2), abs=1e-6)  # Wilson's for 1 of 1
    assert share([1]).high == 1
    assert share([1]).standard_error == math.inf
    for estimate in (mean([3.0]), ratio([6.0], [2.0])):
        assert estimate == Estimate(3.0, math.inf, -math.inf, math.inf, 1)
    one = paired([1], [0])
    assert (one.value, one.p_value, one.high) == (1, 1, 1) and one.low < 0
    assert paired([0.5], [0.25]).p_value == 1


def test_one_cluster_says_nothing_of_others():
    for correct in ([1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]):
        estimate = share(correct, [7] * 4)
        assert (estimate.low, estimate.high) == (0, 1)
        assert estimate.standard_error == math.inf
    assert mean([1.0, 2.0], ["a", "a"]).high == math.inf
    difference = paired([1, 1, 1], [0, 0, 0], [0, 0, 0])
    assert (difference.low, difference.high, difference.p_value) == (-1, 1, 1)


def test_all_right_and_all_wrong():
    for n in range(1, 300):
        right, wrong = share([1] * n), share([0] * n)
        assert (right.value, right.high, wrong.value, wrong.low) == (1, 1, 0, 0)
        assert wrong.high == pytest.approx(1 - right.low) == pytest.approx(Z**2 / (n + Z**2))
    clustered = share([1] * 100, np.arange(100) // 5)  # as good as 20 items, not 100
    t = 2.093024
    assert clustered.low == pytest.approx(20 / (20 + t**2), rel=1e-6)
    independent = width([share([0, 1] * 50)])
    for pair in ([0, 1], [1, 1]):  # clusters that are all the same, or all but one
        balanced = share([*pair, *[0, 1] * 49], np.arange(100) // 2)
        assert independent < width([balanced]) < 1.05 * independent


def test_systems_in_the_other_order_have_the_opposite_difference():
    rng = np.random.default_rng(19)
    n_bytes = rng.uniform(1, 9, (2, 30)) ** 2
    ours, theirs = zip(rng.normal(3, 1, (2, 30)) * n_bytes, n_bytes, strict=True)
    labels = np.arange(30) // 3
    a, b = rng.integers(0, 2, (2, 30))
    for forth, back in (
        (paired_ratios(ours, theirs), paired_ratios(theirs, ours)),
        (paired_ratios(ours, theirs, labels), paired_ratios(theirs, ours, labels)),
        (paired(a, b, labels), paired(b, a, labels)),
    ):
        assert forth.value != 0
        assert [forth.value, forth.low, forth.high] == pytest.approx(
            [-back.value, -back.high, -back.low]
        )
        assert forth.p_value == pytest.approx(back.p_value)
        assert (forth.n_first_only, forth.n_second_only) == (back.n_second_only, back.n_first_only)


def test_equal_systems():
    equal = paired([1, 0, 1, 0] * 25, [1, 0, 1, 0] * 25)
    assert (equal.value, equal.standard_error, equal.p_value) == (0, 0, 1)
    assert (equal.n_first_only, equal.n_second_only) == (0, 0)
    # Bonett and Price: one more item right for each system only, of n + 2.
    assert equal.high == -equal.low == pytest.approx(Z * math.sqrt(2) / 102)
    values = np.random.default_rng(17).random(30)
    for same in (paired(values, values), paired_ratios((values, values), (values, values))):
        assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: share([]), "correct: give a list of at least one number"),
        (lambda: mean([]), "values: give a list"),
        (lambda: holm([]), "p_values: give a list"),
        (lambda: macro_mean([]), "at least one estimate"),
        (lambda: paired([], []), "first: give a list"),
        (lambda: mean([[1.0]]), "values: give a list"),
        (lambda: share([1, 0, math.nan]), "correct: item 2 is nan"),
        (lambda: mean([1.0, -math.inf]), "values: item 1 is -inf"),
        (lambda: paired([1, 0], [1, math.nan]), "second: item 1 is nan"),
        (lambda: paired_ratios(([1], [1]), ([math.nan], [1])), "second_numerators: item 0 is nan"),
        (lambda: holm([0.5, math.nan]), "p_values: item 1 is nan"),
        (lambda: share([1, 0, 0.5]), "neither 0 nor 1"),
        (lambda: ratio([1, 1], [3, 0]), "denominators: item 1 is not positive"),
        (lambda: paired([1, 0], [1]), r"the same items for each: first \(2,\), second \(1,\)"),
        (lambda: without([1, 0], [1, 1], [0, 0]), "at least one True"),
        (lambda: share([1, 0], [1, 2, 3]), "clusters: 3 labels for 2 items"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Student's t


def test_t_quantiles_equal_published_tables():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045}
    for df, quantile in (table | {30: 2.042, 60: 2.000, 120: 1.980}).items():
        assert intervals.t_quantile(df) == pytest.approx(quantile, abs=5.1e-4)
    assert intervals.t_quantile(100_000) == pytest.approx(Z, abs=3e-5)


def test_t_tails_equal_closed_forms_and_numerical_integrals():
    for t in (0.1, 1.0, 2.5, 30.0):
        assert intervals.t_outside(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
        assert intervals.t_outside(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)
    x = np.linspace(0, 2.3, 20_001)
    for df in (3, 4, 17, 500, 20_000):
        scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
        density = np.exp(scale - (df + 1) / 2 * np.log1p(x**2 / df))
        inside = 2 * np.trapezoid(density, x)
        assert intervals.t_outside(2.3, df) == pytest.approx(1 - inside, abs=1e-8)
    assert (intervals.t_outside(0.0, 7), intervals.t_outside(math.inf, 7)) == (1, 0)


def test_quantiles_and_tests_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in (*range(1, 40), 999, 10_000):
        assert intervals.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), abs=1e-9)
        for t in (0.3, 2.0, 6.0):
            assert intervals.t_outside(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-12)
    first, second = np.random.default_rng(18).normal(size=(2, 40))
    theirs = stats.ttest_rel(first, second)
    ours = paired(first, second)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    bounds = theirs.confidence_interval(0.95)
    assert [ours.low, ours.high] == pytest.approx([bounds.low, bounds.high], abs=1e-9)
    theirs = stats.binomtest(23, 80).proportion_ci(0.95, method="wilson")
    ours = share([1] * 23 + [0] * 57)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=1e-9)
