"""Whether an attribution is true: scores, and the statistics that compare them."""

from captum_cage.metrics.calibration import Calibration, calibrate_metric
from captum_cage.metrics.curves import (
    COVERAGE,
    area,
    coverage,
    fractions,
    mas,
    monotone,
    remaining,
    rise,
)
from captum_cage.metrics.evaluation import (
    Evaluation,
    Evaluator,
    MetricInfo,
    metric_names,
    orders_of,
)
from captum_cage.metrics.removal import MaskedRefill
from captum_cage.metrics.sanity import (
    Randomization,
    parameter_randomization,
    randomized,
    reproducibility,
    sensitivity,
)
from captum_cage.metrics.scores import METRICS, Metric, Score, ranked
from captum_cage.metrics.statistics import (
    Comparison,
    Estimate,
    compare,
    compare_all,
    estimate,
)
from captum_cage.metrics.truth import (
    agreement,
    auroc,
    average_precision,
    recovery_at,
)

__all__ = [
    "COVERAGE",
    "METRICS",
    "Calibration",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "MaskedRefill",
    "Metric",
    "MetricInfo",
    "Randomization",
    "Score",
    "agreement",
    "area",
    "auroc",
    "average_precision",
    "calibrate_metric",
    "compare",
    "compare_all",
    "coverage",
    "estimate",
    "fractions",
    "mas",
    "metric_names",
    "monotone",
    "orders_of",
    "parameter_randomization",
    "randomized",
    "ranked",
    "recovery_at",
    "remaining",
    "reproducibility",
    "rise",
    "sensitivity",
]
