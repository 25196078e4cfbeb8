"""Which parameters train. One file a method; `METHODS` finds them by name."""

from tunesmith.registry import Registry
from tunesmith.types import Method

METHODS: Registry[type[Method]] = Registry("method", __name__)
