from fleet.server.batching import BatchSeen
from fleet.server.metrics import Metrics
from tests.fleet.server.fakes import Statistics


def metrics() -> Metrics:
    return Metrics(variants=lambda: 7, waiting=lambda: 5, statistics=Statistics)


def test_what_prometheus_reads():
    found = metrics()
    found.request("/v1/predict", 200, 0.02)
    found.request("/v1/predict", 429, 0.0001)
    found.batch(BatchSeen(rows=3, variants=2, waited_s=0.001, seconds=0.1, failed=1))
    found.refresh_failed()
    lines = found.text().decode().splitlines()
    for line in (
        'fleet_requests_total{route="/v1/predict",status="200"} 1.0',
        'fleet_requests_total{route="/v1/predict",status="429"} 1.0',
        'fleet_request_seconds_count{route="/v1/predict"} 2.0',
        "fleet_batch_inputs_sum 3.0",
        "fleet_batch_variants_sum 2.0",
        "fleet_batch_seconds_sum 0.1",
        "fleet_failed_inputs_total 1.0",
        "fleet_failed_refreshes_total 1.0",
        "fleet_variants 7.0",
        "fleet_waiting_inputs 5.0",
        "fleet_tenants_hits 3.0",
        "fleet_tenants_seconds_reading 0.5",
    ):
        assert line in lines
    assert "tiers" not in found.text().decode()


def test_servers_in_one_process_count_apart():
    first, second = metrics(), metrics()
    first.request("/health", 200, 0.1)
    assert b'route="/health"' in first.text()
    assert b'route="/health"' not in second.text()
