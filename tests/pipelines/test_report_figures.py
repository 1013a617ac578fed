import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import report_examples
from pipelines.report_charts import Scale, kept_by_size_chart, share_by_complexity_chart
from pipelines.report_figures import ClusterTable, histogram
from pipelines.report_text import plain


def parse(svg):
    assert "nan" not in svg and "inf" not in svg
    return ElementTree.fromstring(svg)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.floats(-1e6, 1e6, allow_nan=False, width=32) | st.just(float("nan")), max_size=60
    ),
    mark=st.none() | st.floats(-10, 10),
)
def test_histogram_counts_every_value_once(values, mark):
    array = np.array(values, dtype=np.float64)
    first = np.arange(array.size) % 3 == 0
    pieces = [slice(0, array.size // 2), slice(array.size // 2, None)]
    found = histogram(lambda: ((array[p], first[p]) for p in pieces), mark=mark)
    finite = np.isfinite(array)
    if found is None:
        assert not finite.any()
        return
    assert found.first.sum() == (finite & first).sum()
    assert found.second.sum() == (finite & ~first).sum()
    assert found.missing == (~finite).sum()
    assert (np.diff(found.edges) > 0).all() and len(found.edges) < 200


def test_histogram_equals_numpy_where_nothing_lies_beyond_the_axis():
    values = np.random.default_rng(0).normal(0.3, 0.1, 5000)
    found = histogram(lambda: iter([(values, values > 0.3)]), mark=0.25)
    assert found.beyond == 0
    expected, _ = np.histogram(values, found.edges)
    np.testing.assert_array_equal(found.first + found.second, expected)
    assert np.isclose(found.edges, 0.25, atol=1e-12).any()


def test_outliers_do_not_flatten_the_histogram():
    values = np.concatenate([np.linspace(0.2, 0.4, 10_000), [-999.0, 1e30]])
    found = histogram(lambda: iter([(values, np.ones(values.size, dtype=bool))]))
    assert found.beyond == 2
    assert found.edges[0] > 0 and found.edges[-1] < 1


def test_most_and_least_pruned_are_never_the_same_cluster():
    for k in range(0, 12):
        size, zeros = np.arange(k) % 5, np.zeros(k)
        table = ClusterTable(np.arange(k), size, size // 2, zeros, zeros, zeros, zeros)
        most, least = report_examples._extremes(table)
        assert not set(most) & set(least)
        assert len(most) + len(least) == min(8, int((size > 0).sum()))
        assert 0 not in most


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.9, 1.2), (1, 5e7), (30, 31), (0.8, 300)])
def test_axes_have_readable_ticks(log, low, high):
    ticks = Scale(low, high, 0, 400, log).ticks(6)
    assert len(ticks) <= 8
    assert len({text for _, text in ticks}) == len(ticks)
    room = 1e-3 * (high - low)
    assert len(ticks) >= 2
    assert all(low - room <= value <= high + room for value, _ in ticks)


def test_charts_of_degenerate_clusters():
    one = np.array([5], dtype=np.int64)
    for kept in (0, 5):
        parse(kept_by_size_chart(one, np.array([kept]), name="a"))
    assert share_by_complexity_chart(np.array([np.nan]), np.ones(1), overall=1.0, name="b") == ""
    parse(share_by_complexity_chart(np.zeros(1), np.ones(1), overall=1.0, name="b"))


@given(st.text(max_size=400), st.integers(2, 50))
def test_plain_text_is_short_and_printable(text, most):
    shown = plain(text, most)
    assert len(shown) <= most
    assert not set(shown) & set("\u202e\u2066\x00\n\r")
