"""Win rate, consistency and biases of a judge, and whether it is right about the control pairs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evaluation.intervals import paired

RIDGE = 0.01  # of the logistic regression, beside a sum over pairs
NEEDED_RIGHT, ALLOWED_PREFERRED = 90, 10  # per cent, of the control pairs


@dataclass(frozen=True)
class JudgeReport:
    """Of the pairs with two verdicts, but for `unparsable`; a figure without data is None."""

    judge: str
    n_pairs: int
    wins: int
    ties: int
    losses: int
    win_rate: float | None  # of the model, ties half
    interval: tuple[float, float] | None  # 95 %
    equal_length_win_rate: float | None
    length_correlation: float | None  # of the result with the difference in characters
    follows_length: bool  # whether that differs from 0 (95 %)
    consistency: float | None  # share of pairs with the same result in both orders
    first_position: float | None  # share of A among the verdicts A and B
    unparsable: float  # share of replies without a verdict
    control_prompts: int  # each makes two pairs with a better answer and one of identical answers
    controls_right: int
    identical_preferred: int
    trusted: bool  # passed the control pairs
    prompt_tokens: int  # with those of the controls
    completion_tokens: int

    as_dict = asdict

    def lines(self) -> list[str]:
        n, doubt = self.control_prompts, "" if self.trusted else "not to be believed: "
        low, high = self.interval or (None, None)
        correlation = self.length_correlation
        return [
            f"judge {self.judge}: {self.n_pairs} pairs, each in both orders",
            ("control pairs passed" if self.trusted else "this judge cannot be trusted here")
            + f": {self.controls_right} of {2 * n} right (needed {NEEDED_RIGHT} %), one of two "
            f"identical answers preferred in {self.identical_preferred} of {n} (allowed "
            f"{ALLOWED_PREFERRED} %)",
            f"{doubt}win rate {percent(self.win_rate)} (95 % interval {percent(low)} to "
            f"{percent(high)}): {self.wins} wins, {self.ties} ties, {self.losses} losses",
            f"{doubt}win rate at equal length {percent(self.equal_length_win_rate)}, correlation "
            f"of the result with length {'n/a' if correlation is None else f'{correlation:+.2f}'}"
            + (": the verdicts follow the length" if self.follows_length else ""),
            f"same result in both orders {percent(self.consistency)}, answer shown first preferred "
            f"{percent(self.first_position)}, replies without a verdict {percent(self.unparsable)}",
            f"{self.prompt_tokens:,} tokens read and {self.completion_tokens:,} written",
        ]


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def make_report(
    judge: str,
    can_tie: bool,
    verdicts: Sequence[str | None],
    length_differences: Sequence[int],
    n_controls: int,
    tokens: tuple[int, int],
) -> JudgeReport:
    """The report on a judge's verdicts: two for each control pair, of three kinds, and each pair.

    `length_differences` (pairs,) are in characters, the first answer's minus the second's;
    `tokens` those read and written.
    """
    value = {"A": 1.0, "B": 0.0, "C": 0.5, None: np.nan}
    shown = np.array([value[verdict] for verdict in verdicts]).reshape(-1, 2)
    results = np.where([False, True], 1 - shown, shown)  # (N, 2): 1 where the first answer won
    known, identical, _ = np.split(results, [2 * n_controls, 3 * n_controls])
    preferred = np.isin(identical, (0.0, 1.0)).all(axis=1)
    if not can_tie:  # it has to name one: what counts is that it names the same one twice
        preferred &= identical[:, 0] == identical[:, 1]
    shown, results = shown[3 * n_controls :], results[3 * n_controls :]
    scored = ~np.isnan(results).any(axis=1)
    agree = results[scored, 0] == results[scored, 1]
    result = np.where(agree, results[scored, 0], 0.5)  # (pairs,)
    lengths = np.array(length_differences)[scored]
    counts = [int((result == value).sum()) for value in (1.0, 0.5, 0.0)]
    right, preferred = int((known == 1).all(axis=1).sum()), int(preferred.sum())
    interval = correlation = None
    if len(result):  # the win rate is (1 + wins - losses) / 2, with both as shares
        margin = paired(result == 1, result == 0)
        interval = ((1 + margin.low) / 2, (1 + margin.high) / 2)
    if len(set(result)) > 1 and len(set(lengths)) > 1:
        correlation = float(np.corrcoef(result, lengths)[0, 1])
    return JudgeReport(
        judge,
        len(length_differences),
        *counts,
        win_rate=mean(result),
        interval=interval,
        equal_length_win_rate=win_rate_at_equal_length(result, lengths),
        length_correlation=correlation,
        follows_length=abs(correlation or 0.0) * len(result) ** 0.5 > 1.96,
        consistency=mean(agree),
        first_position=mean(shown[(shown == 0) | (shown == 1)]),
        unparsable=mean(np.isnan(shown).ravel()),
        control_prompts=n_controls,
        controls_right=right,
        identical_preferred=preferred,
        trusted=100 * right >= NEEDED_RIGHT * 2 * n_controls
        and 100 * preferred <= ALLOWED_PREFERRED * n_controls,
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )


def win_rate_at_equal_length(results: np.ndarray, differences: np.ndarray) -> float | None:
    """sigmoid(b) of the fit sigmoid(b + w * tanh(difference / its deviation)) to results (N,).

    The length term of length-controlled AlpacaEval, arXiv 2404.04475, by Newton's method.
    """
    if not len(results):
        return None
    deviation = differences.std() or np.inf  # if all are the same, they explain nothing
    x = np.stack([np.ones(len(results)), np.tanh(differences / deviation)])
    weights = np.zeros(2)
    for _ in range(50):
        rates = 1 / (1 + np.exp(-weights @ x))
        gradient = x @ (rates - results) + RIDGE * weights
        hessian = (x * rates * (1 - rates)) @ x.T + RIDGE * np.eye(2)
        weights = weights - np.linalg.solve(hessian, gradient)
    return float(1 / (1 + np.exp(-weights[0])))
