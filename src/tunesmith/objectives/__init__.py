"""Which loss on which batch. One file an objective; `OBJECTIVES` finds them by name."""

from tunesmith.protocols import Objective
from tunesmith.registry import Registry

OBJECTIVES: Registry[type[Objective]] = Registry("objective", __name__)
