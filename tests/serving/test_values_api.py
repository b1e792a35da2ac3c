"""Value networks are loaded and unloaded over HTTP while others are being answered."""

import dataclasses
import http.client
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from ivl_jax.assets import family_folder
from ivl_jax.config import ConfigError, ServeConfig, check_serve_config
from ivl_jax.decoding.compose import compose
from ivl_jax.vocabulary.mapping import save_vocabulary_map
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.anew import random_map
from tests.serving.conftest import STRENGTHS, running

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def shelf(folders, tmp_path_factory):
    """A folder to load from: a value, one of another vocabulary with its map, and a broken one."""
    root = tmp_path_factory.mktemp("shelf")
    base, mine, other = folders
    shutil.copytree(other, root / "other" / "value")
    shutil.copytree(family_folder("S"), root / "S")
    described = random_map(load_language_model(base), load_language_model(family_folder("S")))
    save_vocabulary_map(root / "S.safetensors", described.vocabulary_map, described.metadata)
    shutil.copytree(mine, root / "broken")
    (root / "broken" / "ivl.json").write_text("{}")
    (root / "out").symlink_to(mine)
    return root


@pytest.fixture(scope="module")
def config(serve_config, folders, shelf):
    mine = f"mine={folders[1]}"
    model = dataclasses.replace(serve_config.model, value=(mine,), strength=STRENGTHS[:1])
    return dataclasses.replace(serve_config, model=model, values_dir=str(shelf), max_values=3)


@pytest.fixture(scope="module")
def client(config):
    with running(config) as client:
        yield client


@pytest.fixture
def loaded(client):
    """Loads a value network; whatever a test has loaded is unloaded after it."""
    names = []

    def load(name, folder, **more):
        status, body = client.post("/v1/values", name=name, folder=folder, **more)
        if status == 201:
            names.append(name)
        return status, body

    yield load
    deadline = time.monotonic() + 30
    for name in names:
        while client.send("DELETE", f"/v1/values/{name}")[0] == 409:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def models(client):
    return [model["id"] for model in client.send("GET", "/v1/models")[1]["data"]]


def test_a_value_comes_answers_and_goes(client, loaded, folders):
    before = models(client)
    assert before == ["stories", "mine", "stories+mine"]
    status, body = loaded("new", "other/value", strength=0.4)
    assert (status, body["id"], body["strengths"]) == (201, "new", {"new": 0.4})
    assert models(client) == ["stories", "mine", "new", "stories+mine", "stories+new"]
    alone = compose(folders[0], folders[2], strengths=[0.4])
    expected = alone.generate(PROMPT, max_new_tokens=20).text
    assert client.text("new", PROMPT, max_tokens=20) == expected
    mixed = compose(folders[0], folders[1], folders[2], strengths=[0.1, 0.2])
    strengths = {"mine": 0.1, "new": 0.2}
    found = client.text("stories", PROMPT, max_tokens=20, strengths=strengths)
    assert found == mixed.generate(PROMPT, max_new_tokens=20).text
    assert client.send("DELETE", "/v1/values/new") == (
        200,
        {"id": "new", "object": "model", "deleted": True},
    )
    assert models(client) == before
    assert client.complete("new")[1]["error"]["code"] == "model_not_found"
    assert client.send("DELETE", "/v1/values/new")[1]["error"]["code"] == "value_not_found"


def test_a_value_of_another_vocabulary_comes_with_its_map(client, loaded, shelf, folders):
    assert loaded("S", "S")[0] == 400  # without its map it does not fit
    status, body = loaded("S", "S", map="S.safetensors", strength=0.5)
    assert status == 201, body
    alone = compose(
        folders[0], str(shelf / "S"), strengths=[0.5], maps=[str(shelf / "S.safetensors")]
    )
    expected = alone.generate(PROMPT, max_new_tokens=16).text
    assert client.text("S", PROMPT, max_tokens=16) == expected
    assert client.text("mine", PROMPT, max_tokens=16)


def test_a_draft_serves_values_with_a_map_and_without(config, shelf, folders):
    model = dataclasses.replace(config.model, draft=folders[0], draft_length=3)
    with running(dataclasses.replace(config, model=model)) as client:
        body = {"folder": "S", "map": "S.safetensors", "strength": 0.02}
        assert client.post("/v1/values", name="S", **body)[0] == 201
        asked = {"temperature": 0, "max_tokens": 24}
        mapped = client.complete("S", PROMPT, **asked)[1]
        both = client.complete("stories", PROMPT, **asked, strengths={"S": 0.02, "mine": 0.1})[1]
    values = folders[1], str(shelf / "S")
    alone = compose(folders[0], *values, maps=[None, str(shelf / "S.safetensors")])
    for found, strengths in ((mapped, (0.0, 0.02)), (both, (0.1, 0.02))):
        expected = alone.generate(PROMPT, max_new_tokens=24, strengths=strengths).text
        assert found["choices"][0]["text"] == expected
        assert found["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


def test_a_value_in_use_stays_and_running_answers_are_not_disturbed(client, loaded, folders):
    expected = client.text("mine", PROMPT, max_tokens=300)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    asked = {"model": "mine", "prompt": PROMPT, "temperature": 0, "max_tokens": 300}
    body = json.dumps({**asked, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    first = response.readline()
    status, error = client.send("DELETE", "/v1/values/mine")
    assert (status, error["error"]["code"]) == (409, "value_in_use")
    assert "in use by 1 request(s)" in error["error"]["message"]
    assert loaded("beside", "other/value")[0] == 201
    assert client.text("beside", PROMPT, max_tokens=8)
    assert client.send("DELETE", "/v1/values/beside")[0] == 200
    rest = response.read().decode()
    connection.close()
    lines = [line for line in (first.decode() + rest).split("\n\n") if line]
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(one["choices"][0]["text"] for one in pieces) == expected


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"folder": "../x"}, 403, "is not below --values-dir"),
        ({"folder": "/etc"}, 403, "is not below --values-dir"),
        ({"folder": "out"}, 403, "is not below --values-dir"),
        ({"folder": "absent"}, 404, "there is no 'absent' below --values-dir"),
        ({"folder": "S.safetensors"}, 400, "is not a folder"),
        ({"folder": "broken"}, 400, "ivl.json"),
        ({"folder": "other/value", "map": "../m"}, 403, "map: '../m' is not below"),
        ({"folder": "S", "map": "other"}, 400, "map: 'other' is not a file"),
        ({"folder": "S", "map": "other/value/ivl.json"}, 400, "ivl.json"),
        ({"folder": "S"}, 400, "vocabulary"),
        ({"name": "mine", "folder": "S"}, 409, "mine is the name of a model already"),
        ({"name": "stories", "folder": "S"}, 409, "stories is the name of a model already"),
        ({"name": "a/b", "folder": "S"}, 400, "'a/b' cannot be a model's name"),
        ({"folder": ""}, 400, "folder is empty"),
        ({"folder": 3}, 400, "folder: expected a path below --values-dir, got 3"),
        ({"folder": "S", "strength": float("nan")}, 400, "strength must be finite"),
        ({"folder": "S", "folders": "x"}, 400, "unknown field 'folders'"),
        ({}, 400, "folder is missing"),
    ],
)
def test_what_cannot_be_loaded_gets_one_clear_sentence(client, shelf, body, status, message):
    before = models(client)
    found, answer = client.post("/v1/values", **{"name": "x", **body})
    assert (found, set(answer)) == (status, {"error"}), answer
    assert message in answer["error"]["message"]
    assert str(shelf) not in answer["error"]["message"]
    assert models(client) == before


def test_a_value_for_which_there_is_no_room_is_refused(client, loaded, monkeypatch):
    desk = client.prepared.service.values
    config = client.prepared.config
    monkeypatch.setattr(desk, "_config", dataclasses.replace(config, max_values=1))
    status, answer = loaded("x", "other/value")
    assert (status, answer["error"]["code"]) == (507, "insufficient_memory")
    assert "as many as --max-values allows" in answer["error"]["message"]
    monkeypatch.setattr("ivl_jax.serving.value_desk.free_memory", lambda device: 1000)
    monkeypatch.setattr(desk, "_config", config)
    status, answer = loaded("x", "other/value")
    assert (status, "MiB are free" in answer["error"]["message"]) == (507, True)
    # Its parameters fit, but not the caches that it may then need beside those of the others.
    engine = client.prepared.service.engine._engine
    free = engine.cache_growth + 1
    monkeypatch.setattr("ivl_jax.serving.value_desk.free_memory", lambda device: free)
    status, answer = loaded("x", "other/value")
    assert (status, "the caches may grow by" in answer["error"]["message"]) == (507, True)
    assert "x" not in models(client)
    assert engine._parts.places == (0,)
    monkeypatch.undo()
    # The language model S has about 0.7 M parameters: more than one MiB of float32.
    monkeypatch.setattr(desk, "_config", dataclasses.replace(config, max_value_mib=1))
    status, answer = loaded("x", "S", map="S.safetensors")
    assert (status, "of --max-value-mib" in answer["error"]["message"]) == (507, True)
    assert loaded("x", "other/value")[0] == 201


def test_one_value_is_loaded_at_a_time_so_that_its_room_stays_its_own(client, loaded, monkeypatch):
    loader, begun, go_on = client.prepared.service.values._loader, Event(), Event()
    check = loader.check

    def slow(*given, **named):
        begun.set()
        go_on.wait(60)
        return check(*given, **named)

    monkeypatch.setattr(loader, "check", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(loaded, "first", "other/value")
        assert begun.wait(60)
        status, answer = loaded("second", "other/value")
        assert (status, answer["error"]["code"]) == (409, "loading")
        assert "first is being loaded" in answer["error"]["message"]
        go_on.set()
        assert first.result()[0] == 201
    assert loaded("second", "other/value")[0] == 201


def test_a_server_without_a_folder_neither_loads_nor_unloads(client, monkeypatch):
    monkeypatch.setattr(client.prepared.service.values, "_root", None)
    for status, answer in (
        client.post("/v1/values", name="x", folder="S"),
        client.send("DELETE", "/v1/values/mine"),
    ):
        assert (status, answer["error"]["code"]) == (403, "loading_disabled")
    assert "mine" in models(client)


def test_a_value_that_the_engine_cannot_remove_stays(client, monkeypatch):
    service, seen = client.prepared.service, []
    expected = client.text("mine", PROMPT, max_tokens=8)

    def fail(place):
        seen.append((place, service.catalogue.free_place(), "mine" in service.catalogue.names))
        raise MemoryError("full")

    monkeypatch.setattr(service.engine._engine, "remove_value", fail)
    status, answer = client.send("DELETE", "/v1/values/mine")
    assert status == 500
    assert "could not be unloaded (MemoryError): it stays loaded" in answer["error"]["message"]
    # Meanwhile no request could use it, and nothing else took its place.
    assert seen == [(0, 1, False)]
    assert "mine" in models(client)
    assert client.text("mine", PROMPT, max_tokens=8) == expected


def test_flags_of_loading_are_checked(serve_config, tmp_path):
    from ivl_jax.serving.server import values_root

    with pytest.raises(ConfigError, match=r"--values-dir .* is not a folder"):
        values_root(dataclasses.replace(serve_config, values_dir=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="more than --max-values 1"):
        check_serve_config(dataclasses.replace(serve_config, values_dir="x", max_values=1))
    with pytest.raises(ConfigError, match="--max-values must be ≥ 1, got 0"):
        ServeConfig(max_values=0)
