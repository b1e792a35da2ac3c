"""Folders on an object store that runs on this machine."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

BUCKET = "bucket"


@pytest.fixture(scope="session")
def gcs_environment(project_root: Path) -> Iterator[dict[str, str]]:
    """The variables that send gcsfs, TensorStore and Orbax to an emulator, set in this process."""
    for module, extra in (("gcsfs", "gcs"), ("gcp_storage_emulator", "interop")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the extra `{extra}` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.gcs.emulator", str(port)],
        cwd=project_root,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        # Nobody looks for credentials.
        "FSSPEC_GCS_TOKEN": "anon",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        # It asks a service that the emulator does not have.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import fsspec.config

        # Where fsspec was imported before, it has read its variables.
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        _wait_for(port, server)
        yield {**os.environ, **environment}
    server.terminate()
    server.wait()


@pytest.fixture
def store(gcs_environment: dict[str, str], request: pytest.FixtureRequest) -> epath.Path:
    """A gs:// folder of this test's own."""
    from ivl_jax.paths import usable_path

    return usable_path(f"gs://{BUCKET}/{request.node.name.translate({91: '-', 93: None})}")


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the emulator ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError("the emulator does not answer")
