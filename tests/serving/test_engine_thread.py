"""Whatever is ordered of the engine's thread is answered, and a request's end counts at once."""

import asyncio
import functools

import pytest

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from ivl_jax.config import GenerationOptions, ServeConfig
from ivl_jax.decoding.capacity import RequestTooLargeError
from ivl_jax.decoding.engine import Engine, Progress
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.serving.engine_thread import ChoiceProgress, EngineThread, Ticket
from ivl_jax.serving.errors import ApiError
from ivl_jax.serving.front import Front
from ivl_jax.serving.metrics import Metrics

PROMPT = EncodedPrompt([1, 2], GenerationOptions(), 0)
TOO_LONG = EncodedPrompt([1, 2], GenerationOptions(max_new_tokens=100), 0)


class IdleEngine(Engine):
    """An engine that has nothing to do, and never gets anything."""

    def __init__(self):
        pass

    idle, running, waiting, shape = True, 0, 0, None


def new_thread():
    return EngineThread(IdleEngine(), Metrics())


def in_a_loop(test):
    """Runs a test in an event loop."""

    @functools.wraps(test)
    def run(*arguments, **named):
        return asyncio.run(asyncio.wait_for(test(*arguments, **named), 30))

    return run


def new_ticket(prompts=(PROMPT,)):
    return Ticket(prompts, streams=False, on_end=lambda ended: None)


def event(choice, *, ends=False):
    generation = Generation("a", (5,), "length", 2) if ends else None
    return ChoiceProgress(choice, Progress(0, "a", (5,), (), generation))


async def refusal(work):
    """What is raised, in time."""
    with pytest.raises(ApiError) as raised:
        await asyncio.wait_for(work, 5)
    return raised.value.status, raised.value.message


@in_a_loop
async def test_orders_left_when_the_thread_fails_and_later_ones_are_refused():
    thread = new_thread()

    def die():
        raise KeyError("gone")

    thread._orders.put(die)
    ticket = new_ticket()
    thread.submit(ticket)
    change = asyncio.ensure_future(thread.change(lambda engine: None))
    await asyncio.sleep(0)  # it is ordered
    thread.start()
    expected = (503, "the engine has failed: KeyError: 'gone'")
    assert await refusal(ticket.get()) == expected
    assert await refusal(change) == expected
    assert thread.failure == "KeyError: 'gone'"
    thread.stop(seconds=60.0)
    late = new_ticket()
    thread.submit(late)
    assert await refusal(late.get()) == expected
    assert await refusal(thread.change(lambda engine: None)) == expected


@in_a_loop
async def test_orders_behind_a_stop_and_after_it_are_refused():
    thread = new_thread()
    thread._orders.put(None)
    change = asyncio.ensure_future(thread.change(lambda engine: None))
    await asyncio.sleep(0)
    thread.start()
    expected = (503, "the server is stopping")
    assert await refusal(change) == expected
    thread.stop(seconds=60.0)
    assert await refusal(thread.change(lambda engine: None)) == expected
    thread.cancel(new_ticket())
    assert thread.failure is None


@pytest.mark.parametrize(
    ("error", "status", "words", "code", "param"),
    [
        (
            RequestTooLargeError("max_cache_bytes"),
            400,
            ("102 tokens", "max_tokens", "--max-cache-mib"),
            "cache_memory_exceeded",
            "max_tokens",
        ),
        (ValueError("odd"), 500, ("could not be submitted: odd",), None, None),
    ],
)
def test_what_the_engine_refuses_is_said_in_the_servers_words_and_not_tried_again(
    error, status, words, code, param
):
    @in_a_loop
    async def refused():
        thread, ticket = new_thread(), new_ticket([TOO_LONG])

        def refuse(prompt):
            raise error

        vars(thread._engine).update(submit=refuse)
        thread.start()
        thread.submit(ticket)
        with pytest.raises(ApiError) as raised:
            await asyncio.wait_for(ticket.get(), 5)
        thread.stop(seconds=60.0)
        return raised.value

    found = refused()
    assert (found.status, found.code, found.param) == (status, code, param)
    assert found.headers["x-should-retry"] == "false"
    assert all(word in found.message for word in words)
    assert "max_cache_bytes" not in found.message


class Desk:
    """A front whose tickets the test answers."""

    def __init__(self, config):
        thread = new_thread()
        self.tickets, self.cancelled = [], []
        vars(thread).update(submit=self.tickets.append, cancel=self.cancelled.append)
        self.front = Front(config, thread, Metrics())

    async def begun(self, places, *, choices=2):
        """An answer whose first event has been read."""
        progress = self.front.choices([PROMPT] * choices, streams=True, places=places)
        first = asyncio.ensure_future(anext(progress))
        await asyncio.sleep(0)
        await self.arrive(event(0))
        assert (await first).choice == 0
        return progress

    async def arrive(self, *events):
        self.tickets[-1].put(events)
        await asyncio.sleep(0.001)


@in_a_loop
async def test_an_answer_that_decoding_failed_in_is_not_asked_for_again():
    desk = Desk(ServeConfig())
    with desk.front.admit(2) as places:
        progress = await desk.begun(places)
        failed = Generation("", (5,), "error", 2, error="base: logits are not finite")
        await desk.arrive(ChoiceProgress(1, Progress(0, "", (5,), (), failed)))
        with pytest.raises(ApiError) as raised:
            await anext(progress)
    assert raised.value.status == 500
    assert raised.value.headers["x-should-retry"] == "false"


@in_a_loop
async def test_a_choice_that_has_ended_counts_no_longer_though_nobody_reads_on():
    desk = Desk(ServeConfig())
    with desk.front.admit(2) as places:
        progress = await desk.begun(places)
        await desk.arrive(event(0, ends=True))
        assert desk.front.in_flight == 1
        await desk.arrive(ApiError(500, "lost"))
        assert desk.front.in_flight == 0
        await progress.aclose()
    assert desk.front.in_flight == 0
    with desk.front.admit(3), desk.front.admit(1):
        assert desk.front.in_flight == 4
    assert desk.front.in_flight == 0


@in_a_loop
async def test_what_has_ended_in_time_is_delivered_however_late_it_is_read():
    desk = Desk(ServeConfig(request_seconds=0.5))
    with desk.front.admit(1) as places:
        progress = await desk.begun(places, choices=1)
        await desk.arrive(event(0), event(0, ends=True))
        places.start -= 10
        rest = [one async for one in progress]
        assert [one.progress.generation is not None for one in rest] == [False, True]
    assert not desk.cancelled


@in_a_loop
async def test_what_has_not_ended_in_time_is_given_up_and_not_to_be_repeated():
    desk = Desk(ServeConfig(request_seconds=0.5, queue_seconds=0.5))
    with desk.front.admit(1) as places:
        progress = await desk.begun(places, choices=1)
        await desk.arrive(event(0))
        places.start -= 10
        with pytest.raises(ApiError, match="has not ended") as late:
            await anext(progress)
        assert late.value.headers == {"x-should-retry": "false"}
    assert desk.cancelled == desk.tickets
    with desk.front.admit(1) as places:
        places.start -= 10
        with pytest.raises(ApiError, match="has no token yet") as late:
            await anext(desk.front.choices([PROMPT], streams=True, places=places))
        assert late.value.headers == {"Retry-After": "5"}
