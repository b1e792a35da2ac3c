"""The engine: requests arrive and leave while others are being decoded.

In: `submit` a prepared prompt with its own options (strengths, sampling, stop ids and strings,
seed, limits), `cancel` it. Out: what every `step` has brought each request: text that has become
final, tokens, at the end a `Generation`.

    engine = model.engine(EngineLimits(max_rows=32))
    request = engine.submit(prompt)          # at any time between two steps
    while not engine.idle:
        for progress in engine.step():
            ...

One thread owns an engine: `submit`, `cancel` and `step` are plain calls that must not overlap. A
server runs `step` in a loop and hands over what its clients want between two steps. An engine with
nothing to do holds no caches and runs nothing.

A request's tokens depend neither on the others nor on when it begins: they are those of its prompt
alone up to near-ties, samples included (their key is made of the request's seed and sample index).
This holds on a mesh and with value networks of their own vocabularies too.

Requests begin in the order in which they came, and each step that reads prompts is followed by one
that generates for all rows, so that neither those that wait nor those that run are starved. With
`EngineLimits.prefill_block` such a step reads at most as many tokens, and a longer prompt takes
several of them.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import count, islice

from ivl_jax.compiled_programs import program_limit
from ivl_jax.decoding.batch import RowBatch
from ivl_jax.decoding.capacity import BatchShape, CapacityPlanner, EngineLimits, Need, Waiting
from ivl_jax.decoding.engine_model import EngineModel, EngineValue, ModelParts
from ivl_jax.decoding.entries import Entry, longest_text
from ivl_jax.decoding.own_vocabulary import expected_slots
from ivl_jax.decoding.progress import Progress, RunningRequest
from ivl_jax.decoding.prompt_groups import next_group, usual_group
from ivl_jax.decoding.requests import (
    EncodedPrompt,
    bucket_stop_ids,
    needed_slots,
    prompt_width,
    row_end,
)
from ivl_jax.decoding.streaming import RowText

DEFAULT_LIMITS = EngineLimits()


class Engine:
    """Decodes requests together, as many as its limits allow.

    Args:
        model: the model.
        new_text: makes the text of a prompt's continuation, empty so far.
        limits: how many requests are decoded together, and how long they may be.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        new_text: Callable[[EncodedPrompt], RowText],
        limits: EngineLimits = DEFAULT_LIMITS,
    ) -> None:
        self._parts, self._new_text = ModelParts(model), new_text
        self._context, self._stop_ids = model.context, model.stop_ids
        self._planner = CapacityPlanner(
            limits, model.context, model.row_multiple, cache_bytes=self._parts.cache_bytes
        )
        self._block = limits.prefill_block
        self._programs = program_limit()
        self._ids = count()
        self._waiting: OrderedDict[int, Entry] = OrderedDict()
        self._needs = Waiting()
        self._running: dict[int, RunningRequest] = {}
        self._batch: RowBatch | None = None
        # Whether running rows have waited for a group of prompts, and come next.
        self._just_admitted = False
        # Whether a request waits for memory, not for a row.
        self._no_room = False
        # Steps that free rows have waited for a refill, all of them together.
        self._free_steps = 0
        # Requests that begin in this step, or that the batch is grown for.
        self._beginning: list[int] = []
        self._lost: tuple[int, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being decoded."""
        return len(self._running)

    @property
    def lost(self) -> tuple[int, ...]:
        """Requests that were lost when `step` last raised; they get no further progress."""
        return self._lost

    @property
    def shape(self) -> BatchShape | None:
        """The batch that is held on device; None: there is none."""
        return None if self._batch is None else self._batch.shape

    @property
    def cache_growth(self) -> int:
        """Bytes that caches may still take on each device, at their peak, whatever is asked for."""
        parts = self._parts
        return self._planner.growth(parts.places, parts.most_mapped_slots, held=self.shape)

    def submit(self, prompt: EncodedPrompt) -> int:
        """Queue a request; nothing is computed yet.

        Args:
            prompt: of `ComposedModel.prepare`, with its options.

        Returns:
            The request's id: what `step` and `cancel` call it. Ids are never used again.

        Raises:
            TypeError: it is not prepared.
            RequestTooLargeError: it can never be decoded within the engine's limits.
            ValueError: it has a strength for more or fewer value networks than there are, or uses
                one that has been removed.
        """
        if not isinstance(prompt, EncodedPrompt):
            raise TypeError(
                "expected a prepared prompt, one of `model.prepare([text], options)`, got "
                f"{prompt!r:.60}"
            )
        prompt = self._parts.with_policy(prompt)
        planner, option = self._planner, prompt.options
        used = self._parts.used(prompt)
        tokens = row_end(prompt.token_ids, option, context=self._context)
        own = [self._parts.own_vocabulary(place) for place in used.texts]
        longest = longest_text(prompt, used)
        need = Need(
            needed_slots(prompt.token_ids, option, context=planner.longest),
            expected_slots(
                [one for one in own if one],
                list(used.texts.values()),
                new_tokens=tokens - len(prompt.token_ids),
            ),
            bucket_stop_ids(option, self._stop_ids),
            used.places,
            self._block is not None and prompt_width(longest, context=self._context) > self._block,
        )
        planner.check(need, tokens=tokens)
        request = next(self._ids)
        self._waiting[request] = Entry(request, prompt, need, used)
        self._needs.add(need)
        return request

    def cancel(self, request: int) -> bool:
        """Forget a request; its row is free at once.

        Args:
            request: of `submit`.

        Returns:
            Whether it was still waiting or running; no more is heard of it in any case.
        """
        if entry := self._waiting.pop(request, None):
            self._needs.remove(entry.need)
        elif self._running.pop(request, None):
            assert self._batch is not None
            self._batch.release(request)
        else:
            return False
        self._rest_if_idle()
        return True

    def add_value(self, place: int, value: EngineValue) -> None:
        """Add a value network; requests that run are not touched.

        Args:
            place: what prompts call it: a number that no other value network has.
            value: the network, checked against the base.

        Raises:
            ValueError: its caches cannot be split as the engine's batches are, or the place is
                taken.
        """
        self._parts.check(value)
        self._parts.add(place, value)

    def remove_value(self, place: int) -> None:
        """Remove a value network that no request uses; its memory is free.

        Args:
            place: where it is.

        Raises:
            ValueError: requests that run or wait use it, or there is none.
        """
        entries = [*self._waiting.values(), *(one.entry for one in self._running.values())]
        if using := sum(place in entry.need.values for entry in entries):
            raise ValueError(
                f"the value network at place {place} is used by {using} request(s) that run or "
                "wait: let them end, or cancel them, before it is removed"
            )
        if place not in self._parts.places:
            raise ValueError(f"there is no value network at place {place}: {self._parts.places}")
        if self._batch is not None:
            self._batch.reshape(self._batch.shape._replace(values=self._batch.used()))
        self._parts.remove(place)

    def step(self, *, max_tokens: int = 16) -> list[Progress]:
        """Begin waiting requests in free rows, or generate for the running ones.

        Args:
            max_tokens: tokens per row in this step, at most, and at least 1: how late a stop string
                is seen, and how long a new request waits. Always 1 where a row uses a value network
                with its own vocabulary: the host tokenises for it.

        Returns:
            One `Progress` per request with something new.

        Raises:
            ValueError: `max_tokens` below 1; nothing is lost.
            Exception: whatever the device raises. `lost` then lists the requests that are lost:
                only the new ones if their prefill failed, or making room for them; otherwise all
                running ones. The rest are unaffected.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if self.idle:
            return []
        self._programs.keep()
        self._beginning = []
        try:
            # The host reads a first token before the next one is decoded: value networks with
            # their own vocabulary read its text.
            if self._just_admitted or not (self._read_on() or self._admit()):
                self._advance(max_tokens)
            progress = self._look()
        except BaseException:
            self._drop_lost()
            raise
        self._rest_if_idle()
        return progress

    def _read_on(self) -> bool:
        """Read the next block of a long prompt; return whether there is one that is being read."""
        if self._batch is None or (request := self._batch.reads) is None:
            return False
        self._beginning = [request]
        self._batch.read_block()
        self._beginning = []
        self._just_admitted = len(self._running) > 1
        return True

    def _admit(self) -> bool:
        """Begin waiting requests if there is room and it pays; return whether any began."""
        running = [] if self._batch is None else self._batch.needs()
        plan = self._planner.plan(running, self._needs, self._first_needs, current=self.shape)
        admitted, rows, others = plan.admitted, plan.shape.rows, bool(self._running)
        if self._batch is None:
            shape = plan.shape._replace(values=())
            self._batch = RowBatch(self._parts, shape, context=self._planner.longest)
        # The plan counts the value networks of all that it admits; they join as these begin. Where
        # nothing runs, those of them that are there stay until then.
        held = self._batch.shape.values
        values = self._batch.used() if others else tuple(p for p in held if p in plan.shape.values)
        # The first of them is lost if this fails; the next step plans without it.
        self._beginning = list(islice(self._waiting, min(admitted, 1)))
        self._batch.reshape(plan.shape._replace(values=values))
        self._beginning = []
        free = rows - len(self._running)
        self._no_room = bool(self._waiting) and not admitted and free > 0
        at_once = self._block is None or max(self._widths(admitted), default=0) <= self._block
        anew = self._batch.is_empty or 2 * admitted >= rows
        # Prompts that begin anew are read in the batch itself, with no caches beside it.
        if not others and at_once and (anew or not self._planner.fits(plan.shape, beside=True)):
            self._just_admitted, self._free_steps = False, 0
            self._batch.start(self._begin(admitted))
            return True
        enough = min(self._group, admitted)
        if not admitted or (free < enough and self._free_steps < rows):
            return False
        self._free_steps = 0
        while admitted:
            group = next_group(self._widths(admitted), rows=self._group, block=self._block)
            entries = self._begin(group.size)
            if group.in_blocks:
                assert self._block is not None
                self._batch.begin_blocks(*entries, block=self._block)
                return self._read_on()
            self._batch.admit(entries, group=group.rows)
            self._beginning = []
            # Running rows wait for one group of prompts, then generate at least one token.
            bounded = others or self._block is not None
            admitted = 0 if bounded else admitted - group.size
            self._just_admitted = bounded
        return True

    def _advance(self, max_tokens: int) -> None:
        """Generate, until enough rows are free for those that wait."""
        assert self._batch is not None
        rows, free = self._batch.shape.rows, len(self._batch.free)
        enough = min(self._group, len(self._waiting)) or rows
        if self._no_room:
            enough = free + 1
        if enough <= free or self._batch.reads is not None:
            # More could begin right away: the running rows get one token before they do.
            max_tokens, enough = 1, rows
        elif free and self._waiting:
            left = (rows - self._free_steps) // free
            max_tokens = max(1, min(max_tokens, left))
        self._just_admitted = False
        self._batch.advance(max_tokens, enough_free=enough)

    def _look(self) -> list[Progress]:
        """Take what the rows have generated; those that have ended are free."""
        assert self._batch is not None
        waits = len(self._batch.free) if self._waiting else 0
        progress, steps = [], 0
        advances_next = self._just_admitted or not (waits or self._batch.reads is not None)
        held = self._batch.shape
        for news in self._batch.look(
            lambda grown: self._planner.fits(grown, moved=held, beside=True),
            advances_next=advances_next,
        ):
            steps = max(steps, len(news.token_ids))
            one = self._running[news.id].take(news)
            if one.generation is not None:
                self._batch.release(news.id)
                del self._running[news.id]
            if one.is_new:
                progress.append(one)
        self._free_steps += waits * steps
        return progress

    def _drop_lost(self) -> None:
        """Forget the requests that a failed step has lost."""
        batch = self._batch
        if self._beginning and batch is not None and batch.is_intact:
            self._lost = tuple(self._beginning)
            for request in self._lost:
                self.cancel(request)
        else:
            self._lost = tuple(self._running)
            self._running, self._batch = {}, None
        self._just_admitted, self._free_steps, self._no_room = False, 0, False
        self._rest_if_idle()

    def _begin(self, number: int) -> list[Entry]:
        """Take the first requests out of the queue."""
        entries = [self._waiting.popitem(last=False)[1] for _ in range(number)]
        self._beginning = [entry.id for entry in entries]
        for entry in entries:
            self._needs.remove(entry.need)
            self._running[entry.id] = RunningRequest(entry, self._new_text(entry.prompt))
        return entries

    def _first_needs(self, number: int) -> list[Need]:
        return [entry.need for entry in islice(self._waiting.values(), number)]

    def _widths(self, number: int) -> list[int]:
        """Tokens of the first waiting prompts, with padding."""
        each = islice(self._waiting.values(), number)
        return [prompt_width(entry.longest_text, context=self._context) for entry in each]

    @property
    def _group(self) -> int:
        """Prompts that are read together while rows run."""
        assert self._batch is not None
        return usual_group(self._batch.shape.rows)

    def _rest_if_idle(self) -> None:
        """Free the caches once there is nothing to decode."""
        if self.idle:
            self._batch = None
            self._just_admitted, self._free_steps, self._no_room = False, 0, False
