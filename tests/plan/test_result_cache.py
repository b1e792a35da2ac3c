"""What a compilation found is kept, and read again only for the same program and compilers."""

from types import SimpleNamespace

from ivl_jax.plan import compiled, result_cache
from ivl_jax.plan.compiled import Compiled, compile_program
from ivl_jax.plan.machines import MACHINES
from ivl_jax.plan.result_cache import compilation_key, find_record, keep_record


def test_a_program_is_compiled_once_per_machine():
    texts = []

    def program(text):
        stats = SimpleNamespace(temp_size_in_bytes=30, peak_memory_in_bytes=40)
        result = SimpleNamespace(memory_analysis=lambda: stats, as_text=lambda: "")

        def compile_it():
            texts.append(text)
            return result

        return SimpleNamespace(as_text=lambda: text, compile=compile_it)

    for text, machine in (("a", "v5e-1"), ("a", "v5e-1"), ("a", "v6e-1"), ("b", "v5e-1")):
        found = compile_program(program(text), MACHINES[machine], held=1)
        assert found == (True, 30, 40, {}, 0)
    assert texts == ["a", "a", "b"]


def test_another_compiler_is_another_key(monkeypatch):
    before = compilation_key("program", ["v5e-1"])
    assert before == compilation_key("program", ["v5e-1"])
    assert before != compilation_key("program", ["v5e-4"])
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    assert before != compilation_key("program", ["v5e-1"])
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setattr(result_cache, "_version", lambda package: "99")
    assert before != compilation_key("program", ["v5e-1"])


def test_what_is_said_of_a_program_is_said_of_its_record_too(caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_compile", lambda *_: Compiled(True, 1, 2, {}, counted_once=3))
    program = SimpleNamespace(as_text=lambda: "loops")
    for _ in range(2):
        caplog.clear()
        compile_program(program, MACHINES["v5e-1"], held=1)
        assert "3 collectives are in loops of unknown length" in caplog.text
    key = compilation_key("loops", (repr(MACHINES["v5e-1"]), repr({}), "1"))
    assert find_record(key)
    keep_record(key, {"peak": 1})  # of another version
    assert compile_program(program, MACHINES["v5e-1"], held=1).peak == 2


def test_a_damaged_record_and_a_missing_folder_are_no_record(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_record("key", {"peak": 1})
    assert find_record("key") == {"peak": 1}
    (tmp_path / "ivl_jax/plans/key.json").write_text('{"peak":')
    assert find_record("key") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_record("key", {"peak": 1})
    assert find_record("key") is None
