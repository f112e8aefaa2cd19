"""What verl loads when it is imported; does not need verl."""

from __future__ import annotations

import importlib
import sys

import pytest

PLUGIN, ENGINE = "oisd.integrations.verl_plugin", "oisd.integrations.verl"


def test_it_imports_nothing_unless_asked(monkeypatch):
    monkeypatch.delenv("VERL_ENGINE_VENDOR", raising=False)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    monkeypatch.setitem(sys.modules, ENGINE, None)  # its import would fail
    importlib.import_module(PLUGIN)


def test_it_says_so_when_the_engine_cannot_be_imported(monkeypatch, caplog):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "oisd")
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    monkeypatch.setitem(sys.modules, ENGINE, None)
    with pytest.raises(ImportError):
        importlib.import_module(PLUGIN)
    assert "VERL_ENGINE_VENDOR=oisd, but its engine cannot be imported" in caplog.text
