"""Blocks that a round gives back are there for the next one."""

import resource
import subprocess
import sys

import pytest

WRITTEN = 5 * 20 * 4_000_000 / resource.getpagesize()
"""Pages that the later rounds write. How many of them are fresh without the call depends on glibc's own guesses."""
SCRIPT = """
import resource, sys
import torch
from fedmerge.core.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def round_of_clients():
    return [torch.ones(1_000_000) for _ in range(20)]
round_of_clients()
before = faults()
for _ in range(5):
    round_of_clients()
print(faults() - before)
"""


def page_faults(which):
    told = subprocess.run([sys.executable, "-c", SCRIPT, which], capture_output=True, text=True, check=True)
    return int(told.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_later_rounds_touch_no_fresh_pages(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    kept, usual = page_faults("kept"), page_faults("usual")
    if usual < 10_000:
        pytest.skip("this C library keeps what it is given back")
    assert kept < min(usual, WRITTEN / 10)
