"""Shared test set-up: eight virtual CPU devices, strict numerics, shape checks, shared data."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.fast_compilation import FAST_COMPILATION

PROJECT_ROOT = Path(__file__).resolve().parent.parent

# Before jax is imported anywhere: eight virtual CPU devices, never an accelerator, never a hub.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        FAST_COMPILATION,
    )
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A second run of the same tests finds their programs compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROJECT_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Commands that tests start obey Ctrl-C and SIGHUP, also where the tests run in the background.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

from jaxtyping import install_import_hook  # noqa: E402

# Every annotation with a shape is checked while tests run, and only then.
install_import_hook("ivl_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def _shared(relative: str) -> Path:
    folder = PROJECT_ROOT.parent / "shared" / relative
    if not folder.exists():
        pytest.skip(f"../shared/{relative} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The repository's root folder."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def stories260k_dir() -> Path:
    """A real pre-trained Llama checkpoint of 0.26 M parameters in Hugging Face layout."""
    return _shared("models/stories260k")


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """GSM8K as two JSONL files: train.jsonl (7,473 rows) and test.jsonl (1,319 rows)."""
    return _shared("data/gsm8k")


@pytest.fixture(scope="session")
def llama2_tokenizer_dir() -> Path:
    """The Llama-2 SentencePiece tokenizer, 32,000 pieces."""
    return _shared("tokenizers/llama2")


@pytest.fixture(scope="session")
def gpt2_tokenizer_dir() -> Path:
    """The GPT-2 byte-level BPE, 50,257 pieces."""
    return _shared("tokenizers/gpt2")


_OURS = logging.getLogger("ivl_jax")
_LEVEL = _OURS.level


@pytest.fixture(autouse=True)
def _log_of_a_fresh_process() -> Iterator[None]:
    """Every test begins with the same level of our log and without a command line's handlers.

    Command lines set both for their process, and the streams of a test's handlers are closed after
    it. A fixture of a whole module may run one before the first test.
    """
    _OURS.setLevel(_LEVEL)
    yield
    _OURS.setLevel(_LEVEL)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's are of its own classes
            root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps() -> Iterator[None]:
    """Let go of compiled programs before there are too many: a process has 65,530 memory maps.

    Each program takes a few, and XLA crashes where it gets none.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
