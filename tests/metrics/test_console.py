"""Clocks. What the console prints is in test_log.py."""

from __future__ import annotations

from megasparse.metrics.console import clock


def testclock():
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
