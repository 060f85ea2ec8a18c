"""Shared settings: one thread, as distributed tests need it, and a cache folder of their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks hang with more
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
