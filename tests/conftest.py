"""Shared settings: one thread, as distributed tests need it, a cache folder of their own, and a seed for each test."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks hang with more
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import zlib

import numpy
import pytest
import torch

gc.disable()  # until all is imported, of which nothing is garbage: collecting takes a fifth of that time


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed what draws without a generator of its own, so that no test depends on those before it."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that of two processes neither is left with it at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_demo.py", item.path not in slow))


def pytest_collection_finish():
    """Leave what is imported out of every later collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")  # fixtures of a module are made before those of a function
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def own_folder(request, tmp_path):
    """Run each test of a room in a folder of its own, so that paths are as people type them."""
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which some undo
        if request.path.parent.name not in ("tests", "paper"):
            patch.chdir(tmp_path)
        yield


@pytest.fixture(autouse=True, scope="module")
def charts(request):
    """Draw charts in the tests of pages and documents only: they take a third of the time of an edit."""
    room = request.path.parent.name
    with pytest.MonkeyPatch.context() as patch:
        if room not in ("tests", "report", "paper"):
            patch.setattr("tva.report.page.draw", lambda spec, name: "<svg/>")
        yield
