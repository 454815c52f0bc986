"""Blocks in main memory: the run is the resident one, resume and export included."""

import pytest
from streamed_runs import check_streamed_run


@pytest.mark.slow
def test_a_streamed_run_equals_a_resident_one(train, config, tmp_path):
    """Catches a checkpoint, an average or an export that is read from a slot instead of from main memory."""
    check_streamed_run(train, config, tmp_path)
