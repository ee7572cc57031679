"""Charts choose an axis that fits their values and reduce long series."""

from __future__ import annotations

import numpy as np

from t2idist.report import charts


def test_chart_ticks_enclose_the_values_and_wide_ranges_get_a_log_axis() -> None:
    assert charts._ticks(0, 4.2) == [0, 1, 2, 3, 4, 5] or charts._ticks(0, 4.2) == [0, 2, 4, 6]
    flat = charts.draw_chart("flat", [charts.Series("x", (1.0, 2.0), (3.0, 3.0))], 0)
    steep = charts.draw_chart("steep", [charts.Series("x", (1.0, 2.0, 3.0), (1e-4, 1.0, 30.0))], 1)
    assert "log scale" not in flat.html and "log scale" in steep.html
    for chart in (flat, steep):
        for series in chart.values["series"]:
            assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in series["at"])


def test_long_series_are_reduced_and_keep_their_mean() -> None:
    n = 5000
    series = charts.Series("x", tuple(map(float, range(n))), tuple(float(i % 7) for i in range(n)))
    thin = charts._thinned(series)
    assert len(thin.x) == charts.MAX_POINTS and abs(np.mean(thin.y) - np.mean(series.y)) < 0.05
