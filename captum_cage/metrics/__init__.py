"""Whether an attribution is true: scores, and the statistics that compare them."""

from captum_cage.metrics.calibration import Calibration, calibrate_metric
from captum_cage.metrics.curves import (
    area,
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
    metric_info,
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
from captum_cage.metrics.scores import METRICS, Metric, Score, by_position, ranked
from captum_cage.metrics.statistics import (
    Comparison,
    Estimate,
    compare,
    compare_all,
    estimate,
)
from captum_cage.metrics.truth import (
    COVERAGE,
    agreement,
    auroc,
    average_precision,
    coverage,
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
    "by_position",
    "calibrate_metric",
    "compare",
    "compare_all",
    "coverage",
    "estimate",
    "fractions",
    "mas",
    "metric_info",
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
