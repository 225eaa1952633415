"""The benchmarks' arithmetic: the pace and the round trips of their proxy, percentiles, rounds."""

from bench.report import Results, percentile
from bench.throttle import Pace, Turns


def test_a_connection_gets_its_rate_and_no_more():
    pace, now, passed = Pace(1000, burst=0.5), 100.0, 0
    for _ in range(40):
        now += pace.wait(250, now)
        passed += 250
    assert passed / 1000 - 0.5 <= now - 100.0 <= passed / 1000


def test_a_sleep_that_lasts_too_long_is_made_up_for():
    pace = Pace(1000, burst=0.5)
    now = 10.0 + pace.wait(1000, 10.0) + 0.25
    assert pace.wait(1000, now) <= 0.75 + 1e-9


def test_a_pause_saves_up_no_more_than_the_burst():
    pace = Pace(1000, burst=0.5)
    assert pace.wait(1000, 50.0) == 0.5
    assert pace.wait(1000, 5000.0) == 0.5


def test_without_a_rate_nothing_waits():
    assert Pace(None).wait(1 << 30, 1.0) == 0.0


def test_requests_wait_a_round_trip_and_their_later_bytes_do_not():
    turns = Turns(0.02)
    assert turns.asked() == 0.04  # the connection's handshake
    assert turns.asked() == 0.0
    turns.answered()
    turns.answered()
    assert turns.asked() == 0.02
    assert turns.asked() == 0.0


def test_percentiles_are_values_that_were_measured():
    values = [float(n) for n in range(100, 0, -1)]
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 0.5) == 50.0
    assert percentile([7.0], 0.99) == 7.0


def test_rounds_that_were_measured_elsewhere_are_all_kept_and_compared_with_their_own_base():
    results = Results()
    results.add("first read", [{"floe": 2.0, "ranged GETs": 1.0}, {"floe": 4.0, "ranged GETs": 3.0}], "ranged GETs")
    floe = results.as_json()["workloads"]["first read"]["floe"]
    assert floe == {"median_seconds": 3.0, "speed_to_ranged_GETs": 2.0 / 3.0, "seconds": [2.0, 4.0]}
    assert "0.67 x ranged GETs" in results.as_text()
