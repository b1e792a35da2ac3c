"""Where the processes are found, before any of them is joined."""

import logging
import re

import jax
import pytest

from ivl_jax.config import ConfigError, ProcessesConfig
from ivl_jax.processes import joining
from ivl_jax.processes.joining import join_processes


@pytest.fixture
def joined_with(monkeypatch):
    """Joins with these options and variables; returns what JAX is told."""

    def joined_with(options, **environment):
        told = {}
        for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
            monkeypatch.delenv(f"JAX_{name}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(f"JAX_{name}", value)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: told.update(given))
        monkeypatch.setattr(joining, "_ask_cluster", lambda *given: (*given[:3], None))
        monkeypatch.setattr(joining, "_links", [])
        before = jax.config.values["jax_cpu_enable_async_dispatch"]
        try:
            join_processes(options)
        finally:
            jax.config.update("jax_cpu_enable_async_dispatch", before)
        return told

    return joined_with


def test_the_config_is_followed_first_and_then_the_environment(joined_with):
    options = ProcessesConfig("here:1", process_id=0, initialization_timeout=7, shutdown_timeout=9)
    told = joined_with(options, COORDINATOR_ADDRESS="there:2", NUM_PROCESSES="4", PROCESS_ID="3")
    assert told["coordinator_address"] == "here:1"
    assert (told["num_processes"], told["process_id"]) == (4, 0)
    assert (told["initialization_timeout"], told["shutdown_timeout_seconds"]) == (7, 9)


def test_jax_gives_up_on_a_silent_process_later_than_the_watch(joined_with):
    told = joined_with(ProcessesConfig("h:1", 2, 0, heartbeat_timeout=30))
    assert told["heartbeat_timeout_seconds"] > 2 * 30


def test_all_but_process_0_reach_the_coordinator_through_a_link(joined_with):
    level = logging.getLogger("ivl_jax").level
    told = joined_with(ProcessesConfig("localhost:1", 2, 1))
    assert told["coordinator_address"] != "localhost:1"
    assert told["coordinator_address"].startswith("127.0.0.1:")
    # One process talks.
    assert logging.getLogger("ivl_jax").level == logging.ERROR
    logging.getLogger("ivl_jax").setLevel(level)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (ProcessesConfig(), "found coordinator address None, None processes, process id None"),
        (ProcessesConfig("h:1", 2), "process id None"),
    ],
)
def test_processes_that_are_not_known_are_an_error_that_says_how_to_name_them(
    joined_with, options, problem
):
    with pytest.raises(ConfigError, match=problem) as error:
        joined_with(options)
    assert "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES" in str(error.value)
    assert "[processes]" in str(error.value)
    with pytest.raises(ConfigError, match="process id 5"):
        joined_with(ProcessesConfig(), COORDINATOR_ADDRESS="h:1", NUM_PROCESSES="2", PROCESS_ID="5")


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:"])
def test_an_address_without_a_port_is_refused_wherever_it_comes_from(joined_with, address):
    message = f"the coordinator's address is '{address}', not HOST:PORT"
    with pytest.raises(ConfigError, match=re.escape(message)):
        joined_with(
            ProcessesConfig(), COORDINATOR_ADDRESS=address, NUM_PROCESSES="2", PROCESS_ID="1"
        )


@pytest.mark.parametrize(
    ("error", "anothers"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset by peer"), True),
        (ValueError("INTERNAL: a collective failed"), True),
        (ValueError("a row is malformed"), False),
    ],
)
def test_a_lack_of_memory_is_not_blamed_on_other_processes(error, anothers):
    assert joining._may_be_anothers(error) == anothers
    assert joining._may_be_anothers(_caused(RuntimeError("the step failed"), error)) == anothers


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_processes_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ConfigError, match="a server runs in one process, and this is one of 2"):
        joining.require_one_process("a server")


def test_others_that_do_not_come_are_an_error_that_names_the_time_out(joined_with, monkeypatch):
    def late(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: waited\nfor long")

    monkeypatch.setattr(joining, "_skip_shutdown", lambda: None)
    joined_with(ProcessesConfig("h:1", 1, 0))
    monkeypatch.setattr(jax.distributed, "initialize", late)
    with pytest.raises(ConfigError, match=r"within 300 s \(processes.initialization_timeout\): D"):
        join_processes(ProcessesConfig("h:1", 1, 0))
