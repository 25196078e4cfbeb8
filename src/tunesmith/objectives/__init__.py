"""Which loss on which batch. One file an objective; `OBJECTIVES` finds them by name."""

from tunesmith.registry import Registry
from tunesmith.types import Objective

OBJECTIVES: Registry[type[Objective]] = Registry("objective", __name__)
