"""Metrics that combine exactly, each with its formula and its names in other frameworks.

There is one file per family of metrics, and one for the accumulators that they share:

    parts.py      Mean, Max, Min, Sum, Spread, Correlation; how they combine and become numbers
    mismatch.py   sampler against trainer (`mismatch/…`), current policy against the rollout's
                  (`staleness/…`)
    weights.py    importance weights (`weight/…`), clipping (`clip/…`), corrections
                  (`correction/…`)
    validity.py   how well the token-level objective approximates the sequence-level one
                  (`validity/…`)
    routing.py    router agreement (`routing/…`), load and confidence (`experts/…`)

In the lists of metrics, square brackets contain the names under which other frameworks record the
same quantity.

Metrics that only the host knows are computed in `run/judge.py` (`reward/…`, `response/…`),
`run/evaluation.py` (`eval/…`) and `train.py` (`sampling/…`). `report/meanings.py` explains all of
them in words.
"""

from jaxrl_stable.diagnostics.mismatch import (
    mismatch_metrics,
    probability_mismatch,
    response_mismatch,
    staleness_metrics,
    token_mismatch,
)
from jaxrl_stable.diagnostics.parts import (
    Correlation,
    EffectiveShare,
    Max,
    Mean,
    Metrics,
    Min,
    Spread,
    Sum,
    as_floats,
    collapse,
    finalize,
    is_metric,
    masked_correlation,
    masked_max,
    masked_mean,
    masked_min,
    masked_spread,
    merge,
    weighted_mean,
)
from jaxrl_stable.diagnostics.routing import load_metrics, routing_metrics
from jaxrl_stable.diagnostics.validity import validity_metrics
from jaxrl_stable.diagnostics.weights import clip_metrics, correction_metrics, weight_metrics

__all__ = [
    "Correlation",
    "EffectiveShare",
    "Max",
    "Mean",
    "Metrics",
    "Min",
    "Spread",
    "Sum",
    "as_floats",
    "clip_metrics",
    "collapse",
    "correction_metrics",
    "finalize",
    "is_metric",
    "load_metrics",
    "masked_correlation",
    "masked_max",
    "masked_mean",
    "masked_min",
    "masked_spread",
    "merge",
    "mismatch_metrics",
    "probability_mismatch",
    "response_mismatch",
    "routing_metrics",
    "staleness_metrics",
    "token_mismatch",
    "validity_metrics",
    "weight_metrics",
    "weighted_mean",
]
