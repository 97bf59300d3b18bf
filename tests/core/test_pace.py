"""The time that a run needs to stop, as it measured it."""

from pathlib import Path

from pipeline.core import pace
from pipeline.core.output import Output


def test_the_longest_time_between_two_looks_and_the_longest_save(tmp_path, monkeypatch):
    times = iter([1000.0, 1003.0, 1004.0, 1030.0])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(times))
    output = Output(tmp_path, "pretrain", "pretrain", {})
    own = pace.Pace(output)
    own.look(0.0)  # what was before counts as the start
    assert pace.seconds_to_stop(output.path) is None
    own.look(7.0)
    assert pace.seconds_to_stop(output.path) == 3 + 7
    own.look(9.0)  # written at most every WRITE_EVERY seconds
    assert pace.seconds_to_stop(output.path) == 3 + 7
    own.look(9.0)
    assert pace.seconds_to_stop(output.path) == 26 + 9


def test_a_run_that_has_measured_nothing_or_a_damaged_file(tmp_path):
    assert pace.seconds_to_stop(Path("nowhere")) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/pace.json").write_text('{"longest_step": 3')
    assert pace.seconds_to_stop(tmp_path) is None
