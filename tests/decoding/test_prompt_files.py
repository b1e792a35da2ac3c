import errno
import json
import logging
import os

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.decoding.prompt_files import GenerationFile, folder_fingerprint, read_prompts


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def result(text):
    return {"text": text, "finish_reason": "eos", "prompt_tokens": 2, "generated_tokens": 3}


@pytest.fixture
def rows(tmp_path):
    records = [{"prompt": f"p{i}", "id": i} for i in range(4)]
    return read_prompts(write_lines(tmp_path / "in.jsonl", *records), values=1)


SETTINGS = {"temperature": 0.0, "stop": ("a",)}


def test_texts_and_dialogues_are_read_with_their_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    dialogue = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}
    path.write_text(json.dumps({"prompt": ""}) + "\n\n" + json.dumps(dialogue))
    text, talk = read_prompts(path, values=2)
    assert (text.text, text.messages, text.where) == ("", (), f"{path}:1")
    assert talk.text is None
    assert talk.messages == (("system", "S"), ("user", "U"))
    assert talk.where == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, got list"),
        ("{}", "either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": 3}', "prompt must be a text, got int"),
        ('{"prompt": "\\ud83d"}', "surrogates not allowed"),
        ('{"prompt": "a", "strengths": 1}', r"strengths must be a list of 2 number\(s\).*got 1"),
        ('{"prompt": "a", "strengths": [1]}', r"a list of 2 number\(s\).*got \[1\]"),
        ('{"prompt": "a", "strengths": [1, "2"]}', "got .1, '2'.$"),
        ('{"prompt": "a", "strengths": [1, NaN]}', "each of strengths must be finite, got nan$"),
        ('{"prompt": "a", "strengths": [1, 1e38]}', "must be between -10,000 and 10,000, got 1e"),
        ('{"prompt": "a", "strengths": [1, 1%s]}' % ("0" * 400), "got an integer of 1329 bits$"),
        ("[" * 500 + "]" * 500, "nested"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', r"messages\[0\] must have a role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "last message must be the user"),
    ],
)
def test_malformed_lines_are_named_with_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"in.jsonl:2(:\d+)?: .*{reason}"):
        read_prompts(path, values=2)


def test_a_line_may_have_its_own_strengths(tmp_path):
    own = {"prompt": "a", "strengths": [1, -0.5]}
    rows = read_prompts(write_lines(tmp_path / "in.jsonl", own, {"prompt": "b"}), values=2)
    assert [row.strengths for row in rows] == [(1.0, -0.5), None]


def test_a_missing_or_empty_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file at"):
        read_prompts(tmp_path / "absent.jsonl", values=1)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        read_prompts(tmp_path / "empty.jsonl", values=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"prompt": "é"}\n{"prompt": "é"}\n'.encode("latin-1"),
            r"byte 12: not UTF-8 \(found 0xe9",
        ),
        ('{"prompt": "é"}\n'.encode("utf-16"), "byte 0: not UTF-8 .it begins as UTF-16"),
    ],
)
def test_an_encoding_that_is_not_utf_8_is_named_with_file_and_position(tmp_path, content, reason):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"in\.jsonl:1: {reason}"):
        read_prompts(path, values=1)


def test_results_are_whole_lines_as_soon_as_they_are_appended(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("é\nx"), result("b")])
        lines = path.read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"prompt": "p0", "id": 0, **result("é\nx")},
            {"prompt": "p1", "id": 1, **result("b")},
        ]


def test_a_second_run_resumes_where_the_first_stopped(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a")])
    with GenerationFile(path, settings=dict(SETTINGS), rows=rows) as output:
        assert output.done == 1
        output.append([result("b"), result("c"), result("d")])
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == list("abcd")


def test_a_half_written_last_line_is_dropped_and_reported(tmp_path, rows, caplog):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a"), result("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with (
        caplog.at_level(logging.WARNING),
        GenerationFile(path, settings=SETTINGS, rows=rows) as output,
    ):
        assert output.done == 1
        output.append([result("b")])
    assert path.read_bytes() == whole
    assert "half-written last line" in caplog.text


def test_other_settings_are_refused_by_name(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a")])
    with pytest.raises(ConfigError, match=r"temperature: 0\.0 there, 0\.7 now") as caught:
        GenerationFile(path, settings={**SETTINGS, "temperature": 0.7}, rows=rows)
    assert "stop" not in str(caught.value)


def test_a_file_of_something_else_is_never_touched(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.settings\.json"):
        GenerationFile(path, settings=SETTINGS, rows=rows)
    assert path.read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("edited", "problem"),
    [
        (b"[[]]\n", "expected an object, got a list"),
        (b"{]\n", "not JSON"),
        (b"\n", "the line is empty"),
        (b'{"prompt": "\xe9"}\n', "byte .*not UTF-8"),
        (b'{"prompt": "p1", "id": 1}\n', "is not the result of .*in.jsonl:2"),
    ],
)
def test_an_edited_file_is_refused_with_the_line_and_kept(tmp_path, rows, edited, problem):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a"), result("b")])
    first = path.read_bytes().splitlines(keepends=True)[0]
    # The half line at the end shows that nothing at all is changed.
    path.write_bytes(first + edited + b'{"prom')
    with pytest.raises(ConfigError, match=rf"out\.jsonl:2:? {problem}"):
        GenerationFile(path, settings=SETTINGS, rows=rows)
    assert path.read_bytes() == first + edited + b'{"prom'
    settings = path.with_name("out.jsonl.settings.json")
    settings.write_text("[]")
    with pytest.raises(ConfigError, match=r"out.jsonl.settings.json: expected an object"):
        GenerationFile(path, settings=SETTINGS, rows=rows)


def test_a_second_process_is_refused_and_told_who_writes(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        with pytest.raises(ConfigError, match=rf"in use: process {os.getpid()} on .* holds"):
            GenerationFile(path, settings=SETTINGS, rows=rows)
        # Processes that compute together write once.
        other = GenerationFile(path, settings=SETTINGS, rows=rows, writes=False)
        for one in (output, other):
            one.append([result("a")])
        other.close()
    assert len(path.read_text().splitlines()) == 1
    assert not path.with_name("out.jsonl.lock").exists()


@pytest.mark.parametrize("bytes_taken", [7, None])
def test_a_line_that_a_full_disk_refuses_leaves_whole_lines(
    tmp_path, rows, monkeypatch, bytes_taken
):
    path, write = tmp_path / "out.jsonl", os.write

    def full(descriptor, line):
        if bytes_taken is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, line[:bytes_taken])

    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a")])
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as caught:
            output.append([result("b")])
        monkeypatch.undo()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == whole
        assert output.done == 1


def test_changed_prompts_are_noticed(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        output.append([result("a"), result("b")])
    with pytest.raises(ConfigError, match=r"out\.jsonl:1 is not the result of .*in\.jsonl:2"):
        GenerationFile(path, settings=SETTINGS, rows=rows[1:])
    with pytest.raises(ConfigError, match="2 lines, but the input only 1"):
        GenerationFile(path, settings=SETTINGS, rows=rows[:1])


def test_more_prompts_at_the_end_are_decoded_by_the_next_run(tmp_path, rows):
    path = tmp_path / "out.jsonl"
    with GenerationFile(path, settings=SETTINGS, rows=rows[:2]) as output:
        output.append([result("a"), result("b")])
    with GenerationFile(path, settings=SETTINGS, rows=rows) as output:
        assert output.done == 2


def test_one_other_byte_of_the_weights_gives_another_fingerprint(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    before = folder_fingerprint(tmp_path)
    assert folder_fingerprint(tmp_path) == before
    weights.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert folder_fingerprint(tmp_path) != before
