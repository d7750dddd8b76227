"""Figures of a comparison of Λ initialisations: one number a run, differences paired by seed, intervals, correction.

A run's metrics are those of its last validation ("loss", "accuracy"), their means over the curve ("mean ...", how soon
it learns), over the evaluated sizes that are longer than any trained one ("... beyond"), and of each evaluation
("accuracy @ 1024": at size or from position 1024 on).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


CONFIDENCE = 0.95
# What arms are compared in, and the words for it. Learning rates are chosen by the first.
METRICS = {
    "loss": "final loss",
    "mean loss": "mean loss while learning",
    "loss beyond": "loss beyond the trained sizes",
}


class Comparison(NamedTuple):
    """An arm against the reference, in one metric. Differences are arm minus reference, run pairs of the same seed."""

    arm: str
    values: tuple[float, ...]  # of the arm, by seed
    mean: float
    difference: float
    half_width: float  # of the t interval of the difference, n - 1 degrees of freedom; inf for a single pair
    p: float  # of the paired t-test; nan for a single pair
    p_holm: float  # the same after Holm's correction over the arms of this table
    effect: float  # difference / standard deviation over seeds, pooled over arms

    @property
    def differs(self) -> bool:
        return self.p_holm < 1 - CONFIDENCE


def metrics(record: dict) -> dict[str, float]:
    """All metrics of a measured run by name; a diverged run has infinite losses and no accuracy."""
    names = [name for name in ("loss", "accuracy") if name in record["curve"][0]]
    if record["status"] == "diverged":
        worst = {"loss": math.inf, "accuracy": 0.0}
        return {form.format(name): worst[name] for name in names for form in ("{}", "mean {}", "{} beyond")}
    figures = {name: record["curve"][-1][name] for name in names}
    figures |= {f"mean {name}": float(np.mean([point[name] for point in record["curve"][1:]])) for name in names}
    beyond = [entry for entry in record["evaluations"] if is_beyond(entry["size"], record["settings"])]
    if beyond:
        figures |= {f"{name} beyond": float(np.mean([entry[name] for entry in beyond])) for name in names}
    for entry in record["evaluations"]:
        figures |= {f"{name} @ {entry['size']}": entry[name] for name in names}
    return figures


def is_beyond(size: int, settings: dict) -> bool:
    """Whether it is longer than what was trained on. Of a row of `length` tokens the last position is length - 1."""
    return size > max(settings["sizes"]) if "sizes" in settings else size >= settings["length"]


def by_arm_and_seed(records: list[dict], metric: str) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}} of the measured runs that have the metric, arms in the order they come in."""
    table: dict[str, dict[int, float]] = {}
    for record in records:
        if record["measured"] and metric in (figures := metrics(record)):
            table.setdefault(record["arm"], {})[record["seed"]] = figures[metric]
    return table


def compare(table: dict[str, dict[int, float]], reference: str) -> list[Comparison]:
    """Each other arm against `reference`, over the seeds that both have."""
    noise = pooled_deviation(table)
    drafts = []
    for arm, values in table.items():
        seeds = sorted(values.keys() & table[reference].keys())
        if arm == reference or not seeds:
            continue
        differences = np.array([values[seed] - table[reference][seed] for seed in seeds])
        difference, half_width, p = interval(differences)
        drafts.append((arm, tuple(values[s] for s in seeds), difference, half_width, p))
    corrected = holm([draft[-1] for draft in drafts])
    return [
        Comparison(arm, values, float(np.mean(values)), difference, half_width, p, p_holm, _ratio(difference, noise))
        for (arm, values, difference, half_width, p), p_holm in zip(drafts, corrected)
    ]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, half width of its t interval, p of the t-test against 0)."""
    count, mean = len(values), float(np.mean(values))
    if count < 2 or not np.isfinite(values).all():
        return mean, math.inf, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    if error == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return mean, quantile * error, float(2 * stats.t.sf(abs(mean) / error, count - 1))


def pooled_deviation(table: dict[str, dict[int, float]]) -> float:
    """The seed noise: the root of the mean over arms of the variance over seeds; nan where no arm has two seeds."""
    variances = [np.var(list(values.values()), ddof=1) for values in table.values() if len(values) > 1]
    variances = [variance for variance in variances if np.isfinite(variance)]
    return math.sqrt(np.mean(variances)) if variances else math.nan


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (1979): the chance of one false finding among all stays below the level."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[index] = highest
    return corrected


def _ratio(difference: float, noise: float) -> float:
    return difference / noise if noise else math.nan
