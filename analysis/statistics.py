"""Figures of out-of-fold predictions, and how far a difference of them may be chance: photos, and seeds."""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from utils import decide, log_losses

FEW = 3000  # photos; with more, the degrees of freedom decide nothing, and the jackknife takes long


def weighted_auc(is_positive, scores, weights):
    """ROC AUC in which a photo counts as often as its weight says: float (r,), nan without positives or negatives.

    is_positive: bool (n,); scores: float (n,); weights: float (r, n), one row per resample. Equal scores count half.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of each group of equal scores
    positive, negative = (weights[:, order] * chosen[order] for chosen in (is_positive, ~is_positive))
    positive, negative = (np.add.reduceat(of_kind, starts, axis=1) for of_kind in (positive, negative))
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        return np.einsum("ij,ij->i", positive, below) / pairs


def measure(labels, probabilities, classes, weights=None):
    """The figures of one run: dict of name to float (r,), one value per resample; without `weights` of all photos, once.

    labels: bool (n, k); probabilities: float (n, k); weights: float (r, n), how often each photo counts. The mean AUC is
    over the classes for which it is defined.
    """
    weights = np.ones((1, len(labels))) if weights is None else weights
    aucs = {name: weighted_auc(labels[:, k], probabilities[:, k], weights) for k, name in enumerate(classes)}
    defined = [of_class for of_class in aucs.values() if not np.isnan(of_class).any()]
    mean = np.mean(defined, axis=0) if defined else np.full(len(weights), np.nan)
    losses = weights @ log_losses(labels, probabilities) / weights.sum(1)
    wrong = weights @ (decide(probabilities) != labels).any(1) * (len(labels) / weights.sum(1))
    return {"mean AUC": mean, **aucs, "log loss": losses, "wrong photos": wrong}


def rows_of_equal(labels):
    """The row numbers of the photos of each class, or, where a photo may have several, of each set of classes."""
    kinds, number = np.unique(labels, axis=0, return_inverse=True)
    return [np.flatnonzero(number.ravel() == k) for k in range(len(kinds))[::-1]]


def resample(labels, n_resamples):
    """How often each photo is drawn in each resample: float32 (r, n). Drawn among those of equal labels, bool (n, k).

    Of n photos of a class n - 1 are drawn: with n, the variance would come out too small by (n - 1) / n, which matters
    in a rare class (McCarthy and Snowden 1985, "The bootstrap and finite population sampling").
    """
    rng, weights = np.random.default_rng(0), np.zeros((n_resamples, len(labels)), np.float32)
    for rows in rows_of_equal(labels):
        weights[:, rows] = rng.multinomial(max(1, len(rows) - 1), np.full(len(rows), 1 / len(rows)), n_resamples)
    return weights


@dataclass
class Difference:
    """A difference of a figure, and the interval that holds the true one in 95 of 100 such comparisons."""

    value: float
    low: float
    high: float

    def __bool__(self):
        """Whether chance alone is an unlikely explanation."""
        return self.low > 0 or self.high < 0


def compare(labels, variants, classes, n_resamples=2000, names=None):
    """The figures of the second variant less those of the first: dict of name to Difference.

    variants: two lists of runs, each a float (n, k) of probabilities of the same photos, one run per seed. names: the
    figures wanted, by default all. An interval of an AUC that is wider than from chance to perfect is endless: unknown.
    """
    runs, n_first = [run for runs in variants for run in runs], len(variants[0])
    drawn = resample(labels, n_resamples)
    figures, of_drawn = ([measure(labels, run, classes, weights) for run in runs] for weights in (None, drawn))
    of_left_out = []
    if len(runs) == 2 and len(labels) <= FEW:
        left_out = 1 - np.eye(len(labels), dtype=np.float32)
        of_left_out = [measure(labels, run, classes, left_out) for run in runs]
    unknown = 1 in labels.sum(0)  # the one photo of a class does not tell how much another one would change any figure
    differences = {}
    for name in names or figures[0]:
        values = np.concatenate([of_run[name] for of_run in figures])
        covariance = np.cov([of_run[name] for of_run in of_drawn])
        value = values[n_first:].mean() - values[:n_first].mean()
        if len(runs) > 2:
            variance, freedom = variance_of_variants(values, covariance, n_first)
        else:
            variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
            freedom = degrees_of_freedom(labels, of_left_out[1][name] - of_left_out[0][name]) if of_left_out else np.inf
        reach = stdtrit(min(freedom, 1e6), 0.975) * np.sqrt(max(0, variance))
        limit = {"log loss": np.inf, "wrong photos": len(labels)}.get(name, 1)
        if unknown or limit == 1 and reach > 0.5 or len(runs) > 2 and not variance:  # limit 1: an AUC
            reach = limit = np.inf
        low, high = np.clip([value - reach, value + reach], -limit, limit)
        differences[name] = Difference(float(value), float(low), float(high))
    return differences


def degrees_of_freedom(labels, left_out):
    """Satterthwaite's degrees of freedom of a variance over photos, float: few where a rare class decides.

    left_out: float (n,), the figure without each photo. From these (the jackknife) comes how much each class adds.
    """
    rows = rows_of_equal(labels)
    parts = [((left_out[of] - left_out[of].mean()) ** 2).sum() * (len(of) - 1) / len(of) for of in rows]
    doubt = sum(part**2 / (len(of) - 1) for part, of in zip(parts, rows, strict=True) if len(of) > 1)
    return sum(parts) ** 2 / doubt if doubt else np.inf


def variance_of_variants(values, covariance, n_first):
    """The variance of a difference of two variants of three or more runs in all, and its degrees of freedom.

    values: float (m,), one per run, those of the first variant first; covariance: float (m, m), over resamples of the
    photos. The variance among seeds, which holds what photos do to each seed alone, and what the resamples show to be
    common to all seeds of a variant: Obuchowski and Rockette (1995), with the degrees of freedom of Hillis (2007). With
    as many seeds on both sides, their variance is taken to be the same. With other numbers it is not, and the degrees of
    freedom are those of the smaller side; one run is taken to vary as the other side does.
    """
    groups = np.arange(n_first), np.arange(n_first, len(values))
    sizes = np.array([len(rows) for rows in groups])
    squares = np.array([((values[rows] - values[rows].mean()) ** 2).sum() for rows in groups])
    blocks = [covariance[np.ix_(rows, rows)] for rows in groups if len(rows) > 1]
    common = np.mean([(block.sum() - np.trace(block)) / (block.size - len(block)) for block in blocks])
    of_photos = 2 * max(0, common - covariance[np.ix_(*groups)].mean())
    if sizes[0] == sizes[1]:
        of_seeds = 2 * squares.sum() / (len(values) - 2) / sizes[0]
        variance = of_seeds + of_photos
        return variance, (variance / of_seeds) ** 2 * (len(values) - 2) if of_seeds else np.inf
    several = sizes > 1
    of_each = np.where(several, squares / np.maximum(1, sizes - 1), squares.sum() / (sizes.max() - 1))
    return (of_each / sizes).sum() + of_photos, sizes[several].min() - 1
