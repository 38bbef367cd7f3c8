"""Base methods that the field has and Captum lacks, as Captum attribution classes."""

from captum_cage.methods.capability import Capability
from captum_cage.methods.method import TokenMethod, UnitMethod

__all__ = ["Capability", "TokenMethod", "UnitMethod"]
