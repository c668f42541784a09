"""What is wrong with the statistics of a layer or a network, and what mends them."""

from __future__ import annotations

from .findings import Compared, Diagnosis, Finding, diagnose
from .history import History
from .network import freeze, no_update
from .recalibrate import recalibrate

__all__ = ["Compared", "Diagnosis", "Finding", "History", "diagnose", "freeze", "no_update", "recalibrate"]
