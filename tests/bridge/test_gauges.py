"""What Ray is told of a run."""

import numpy as np
import pytest

pytest.importorskip("ray")

from ray.util.metrics import Gauge

from bridge.gauges import Gauges


def test_what_is_about_engines_and_time_becomes_a_gauge_of_the_cluster(ray_cluster, monkeypatch):
    """Ray shows it only where ray[default] is installed; what it was told can be seen anywhere."""
    told, record = [], Gauge.set

    def observed(gauge, value):
        told.append((gauge, value))
        record(gauge, value)

    monkeypatch.setattr(Gauge, "set", observed)
    gauges = Gauges()
    gauges.set({"fleet/kv_use": 0.5, "time/step_s": np.float32(2.0), "lag/p99.9": 1, "loss": 3.0})
    gauges.set({"fleet/kv_use": np.array(0.75), "publish/bytes": 7, "ledger/dropped": 0})
    assert told[0][0] is told[3][0]  # one for each metric, as long as the run lasts
    assert [(gauge.info["name"], value) for gauge, value in told] == [
        ("jaxrl_fleet_kv_use", 0.5),
        ("jaxrl_time_step_s", 2.0),
        ("jaxrl_lag_p99_9", 1.0),
        ("jaxrl_fleet_kv_use", 0.75),
        ("jaxrl_publish_bytes", 7.0),
        ("jaxrl_ledger_dropped", 0.0),
    ]
