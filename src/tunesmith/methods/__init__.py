"""Which parameters train. One file a method; `METHODS` finds them by name."""

from tunesmith.protocols import Method
from tunesmith.registry import Registry

METHODS: Registry[type[Method]] = Registry("method", __name__)
