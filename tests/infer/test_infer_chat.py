"""infer.py --chat: one message, a conversation, messages through a pipe."""

import io
import signal
import sys
import types


def test_a_chat_prompt_goes_through_the_values_template(infer, base_flags):
    flags = (*base_flags, "--max-new-tokens", 10)
    _, talked, _ = infer(*flags, "--chat", "--prompt", "Hello")
    _, written, _ = infer(*flags, "--prompt", "Hello")
    assert talked != written


def test_talking_keeps_the_conversation_until_it_is_reset(infer, base_flags, monkeypatch):
    lines = iter(["Hello", "", "Hello", "/reset", "Hello", "word " * 600, "Hello", "/exit"])
    asked = []

    def read_line(mark):
        sys.stdout.write(mark)
        asked.append(next(lines))
        return asked[-1]

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    status, output, messages = infer(*base_flags, "--chat", "--max-new-tokens", 30)
    assert status == 0
    assert asked[-1] == "/exit"
    answers = output.split("> ")
    first, again, after_reset = answers[1], answers[3], answers[5]
    assert first == after_reset
    assert again != first
    assert "more than the context of 512 tokens" in messages
    assert messages.count("30 tokens (length)") == 4


def test_messages_may_come_through_a_pipe(infer, base_flags, monkeypatch):
    flags = (*base_flags, "--chat", "--max-new-tokens", 12)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\nHello\n"))
    status, output, _ = infer(*flags)
    assert status == 0
    once = infer(*flags, "--prompt", "Hello")[1]
    assert output == once * 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600))
    status, output, messages = infer(*flags)
    assert (status, output) == (1, "")
    assert "more than the context of 512 tokens" in messages
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    status, _, messages = infer(*flags)
    assert status == 2
    assert "standard input is not UTF-8" in messages


def test_a_termination_signal_ends_a_conversation(infer, base_flags, monkeypatch):
    from ivl_jax.command_line.guard import StoppedBySignal

    def stopped(mark):
        raise StoppedBySignal(signal.SIGTERM)

    monkeypatch.setattr("builtins.input", stopped)
    status, _, messages = infer(*base_flags, "--chat")
    assert status == 143
    assert "infer.py: stopped (SIGTERM)" in messages


def test_the_end_of_input_ends_a_conversation(infer, base_flags, monkeypatch):
    def read_line(mark):
        raise EOFError

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert infer(*base_flags, "--chat")[0] == 0
