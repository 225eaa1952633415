import json

from floe.store.histogram import Distribution, Histogram


def test_values_are_counted_below_the_bound_that_holds_them_and_go_over_a_socket():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.add(value)
    found = Distribution.decode(json.loads(json.dumps(histogram.encode())))
    assert found.counts == (2, 1, 1)
    assert found.buckets() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert found.total == 0.05 + 0.1 + 0.5 + 7.0
