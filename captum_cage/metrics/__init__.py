"""Whether an attribution is true: scores, and the statistics that compare them."""

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
    "Comparison",
    "Estimate",
    "agreement",
    "area",
    "auroc",
    "average_precision",
    "compare",
    "compare_all",
    "coverage",
    "estimate",
    "fractions",
    "mas",
    "monotone",
    "recovery_at",
    "remaining",
    "rise",
]
