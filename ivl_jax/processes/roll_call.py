"""Which processes have been silent for too long.

In: what each process's pulse counts, and the time. Out: the silent ones. Knows no clock, no thread
and no network.
"""

from collections.abc import Iterable, Mapping


class RollCall:
    """For how long each process's pulse has stood still, in seconds that this process was awake.

    A process that was itself stopped for a minute has not heard the others in that minute, and must
    not blame them: of a long pause between two calls only `longest_pause` seconds count.

    Example:
        >>> roll = RollCall([1, 2], longest_pause=2.0)
        >>> for second in range(4):
        ...     roll.hear({1: f"{second}", 2: "0"}, now=float(second))
        >>> roll.silent(3.0)
        [2]
        >>> roll.hear({1: "4", 2: "0"}, now=1000.0)
        >>> roll.silent(6.0)
        []
    """

    def __init__(self, processes: Iterable[int], *, longest_pause: float) -> None:
        """Count all as heard.

        Args:
            processes: their numbers.
            longest_pause: seconds.
        """
        self._longest_pause = longest_pause
        self._pulse: dict[int, str | None] = dict.fromkeys(processes)
        self._silence = dict.fromkeys(self._pulse, 0.0)
        self._last: float | None = None

    def hear(self, pulses: Mapping[int, str], *, now: float) -> None:
        """Take note of the processes' pulses.

        Args:
            pulses: of those that were heard; they may be as they were before.
            now: seconds on a clock that never goes back.
        """
        passed = 0.0 if self._last is None else min(now - self._last, self._longest_pause)
        self._last = now
        for process, before in self._pulse.items():
            pulse = pulses.get(process, before)
            self._silence[process] = 0.0 if pulse != before else self._silence[process] + passed
            self._pulse[process] = pulse

    def silent(self, seconds: float) -> list[int]:
        """The processes that have been silent for at least so many seconds."""
        return [process for process, silence in self._silence.items() if silence >= seconds]
