"""Whatever is ordered of the engine's thread is answered, and a request's end counts at once."""

import asyncio
import functools

import pytest

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from ivl_jax.config import GenerationOptions, ServeConfig
from ivl_jax.decoding.engine import Engine, Progress
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.serving.engine_thread import ChoiceProgress, EngineThread, Ticket
from ivl_jax.serving.errors import ApiError
from ivl_jax.serving.front import Front
from ivl_jax.serving.metrics import Metrics

PROMPT = EncodedPrompt([1, 2], GenerationOptions(), 0)


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
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 30))

    return run


def new_ticket():
    return Ticket([PROMPT], streams=False, on_end=lambda ended: None)


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
