"""Accelerators that JAX does not use."""

import os

from ivl_jax.devices import unused_accelerator


def test_an_accelerator_that_jax_does_not_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidia0")
    assert "JAX_PLATFORMS=cpu is set: unset it" in unused_accelerator()
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "GPU is present, but JAX RUNS ON THE CPU" in unused_accelerator()
    assert "'jax[cuda12]'" in unused_accelerator()
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert unused_accelerator() is None
