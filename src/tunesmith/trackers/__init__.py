"""Where the numbers of a run go besides its folder. One file a tracker; `TRACKERS` finds them by name."""

from tunesmith.protocols import Tracker
from tunesmith.registry import Registry

TRACKERS: Registry[type[Tracker]] = Registry("tracker", __name__)
