"""Gradient norms of tokens, as a base method for captum-cage."""

from gradient_norm.engine import gradient_norm_rows
from gradient_norm.method import GradientNorm

__all__ = ["GradientNorm", "gradient_norm_rows"]
