"""What a run measures, as gauges of the Ray cluster that it runs on: Prometheus can read them."""

import re
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

_SHOWN = ("fleet/", "publish/", "lag/", "ledger/", "time/")


class Gauges:
    """One for each metric that is about the engines, or about time."""

    def __init__(self) -> None:
        """Ray must be initialised in this process."""
        self._gauges: dict[str, Gauge] = {}

    def set(self, metrics: Mapping[str, Any]) -> None:
        """Shows the newest values, numbers or scalar arrays: fleet/kv_use as jaxrl_fleet_kv_use."""
        for name, value in metrics.items():
            if name.startswith(_SHOWN):
                if name not in self._gauges:
                    valid = re.sub("[^a-zA-Z0-9_]", "_", name)
                    self._gauges[name] = Gauge(f"jaxrl_{valid}", f"{name} in metrics.jsonl")
                self._gauges[name].set(float(value))
