"""Slides handed to workers that may be anywhere and may vanish: the largest first, two to a worker, nothing lost.

A worker has one slide in work and knows one more, so that it reads ahead; nothing else waits with it, and all that
comes back are statuses: memory stays bounded however many slides there are. What a worker had in hand when it was lost
is done elsewhere. Such slides are suspects, since one of them may have ended it: they are worked on with no other slide
beside them from then on, and one that loses its worker again and again has failed, while the others go on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.status import Status
from gigapath.signals import StopFlag, Stopped

# A slide may lose so many workers that worked on nothing else.
_LOSSES = 2
# So many workers may be lost one after the other before a slide is through.
_STARTS = 4
# How long workers have for ending what they do, of the 20 seconds that a scheduler gives.
_STOP_SECONDS = 12.0
# How long a run waits where there is no worker at all: machines that are lent out come back, or are started.
PATIENCE_SECONDS = 600.0
_NEWS_SECONDS = 0.2
# How often the crew is brought to the strength that the machines at hand allow.
_STAFF_SECONDS = 2.0


@dataclass(frozen=True)
class Ready:
    """A worker can take slides."""


@dataclass(frozen=True)
class Report:
    """What a worker says when it is through with a slide.

    Attributes:
        statuses: of each stage that it came to.
        tiles: tiles that it embedded, or found in a tiling run.
        seconds: how long it worked.
        embedded: tiles that the worker has embedded so far, for whoever watches.
        stopped: it was asked to stop, and the slide is not finished.
        error: what ends the worker, since no slide is to blame, or None.
    """

    statuses: tuple[Status, ...] = ()
    tiles: int = 0
    seconds: float = 0.0
    embedded: int = 0
    stopped: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Lost:
    """A worker is gone."""


News = Ready | Report | Lost


class Worker(Protocol):
    """One that does slides, seen from the run."""

    node: int

    def work(self, entries: Sequence[SlideEntry]) -> None:
        """Do the first slide, and look ahead at the second where there is one. It was the second before, or is new."""

    def stop(self, why: str) -> None:
        """End what is in work as stopped, soon."""

    def end(self) -> None:
        """Be gone."""


class Crew(Protocol):
    """Workers, and where they come from."""

    def room(self) -> int:
        """How many workers the machines hold that are there now."""

    def hire(self) -> Worker:
        """Begin with one more worker; it is Ready or Lost later."""

    def news(self, seconds: float) -> Sequence[tuple[Worker, News]]:
        """What has happened, waited for so long at the most."""


@dataclass
class Share:
    """What one machine did: slides, tiles, seconds of work by all its workers, and from when to when it worked."""

    workers: int = 0
    slides: int = 0
    tiles: int = 0
    busy: float = 0.0
    began: float | None = None
    ended: float = 0.0


@dataclass
class _Member:
    worker: Worker
    ready: bool = False
    hand: list[SlideEntry] = field(default_factory=list)
    since: float = 0.0


class Spread:
    """Brings slides through a crew; call it with slides for (slide, its statuses), in the order in which they end.

    Args:
        crew: the workers.
        weights: about how much work each slide is.
        stop: tells that a signal came.
        give_up: makes the status of a slide that its workers did not survive.
        clock: seconds.

    Attributes:
        shares: by machine.
        lost: workers lost.
    """

    def __init__(
        self,
        crew: Crew,
        weights: Mapping[str, float],
        stop: StopFlag,
        give_up: Callable[[SlideEntry, str], Status],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shares: dict[int, Share] = {}
        self.lost = 0
        self._crew = crew
        self._weights = weights
        self._stop = stop
        self._give_up = give_up
        self._clock = clock
        self._began = clock()
        self._members: list[_Member] = []
        self._queue: deque[SlideEntry] = deque()
        self._suspects: set[str] = set()
        self._losses: Counter[str] = Counter()
        self._lost_in_a_row = 0
        self._next_staffing = 0.0
        self._alone_since: float | None = None

    def admit(self, worker: Worker) -> None:
        """Take in a worker that is ready already."""
        self._members.append(_Member(worker, ready=True))

    def __call__(self, entries: Sequence[SlideEntry]) -> Generator[tuple[SlideEntry, Sequence[Status]], None, None]:
        """Do slides.

        Raises:
            Stopped: a signal came; what was in work is marked as stopped.
            OSError: workers are lost as soon as they start, or there is no machine for one.
            Exception: what ended a worker, where it is no slide's fault and befalls others too.
        """
        self._queue.extend(sorted(entries, key=lambda entry: (-self._weights.get(entry.slide_id, 0.0), entry.slide_id)))
        why = "the run"
        try:
            while self._queue or any(member.hand for member in self._members):
                self._stop.check()
                self._staff()
                self._hand_out()
                for worker, news in self._crew.news(_NEWS_SECONDS):
                    yield from self._take(worker, news)
        except Stopped as signal:
            why = str(signal)
            raise
        finally:
            self._queue.clear()
            self._wind_up(why)

    # ------------------------------------------------------------------------------------------------ handing out

    def _staff(self) -> None:
        """As many workers as there is room for and work left."""
        now = self._clock()
        if now < self._next_staffing:
            return
        self._next_staffing = now + _STAFF_SECONDS
        some_work = any(member.ready for member in self._members)
        if self._lost_in_a_row >= _STARTS and some_work:  # until a slide is through, no more of them
            return
        wanted = min(self._crew.room(), len(self._queue) + sum(bool(member.hand) for member in self._members))
        for _ in range(wanted - len(self._members)):
            self._members.append(_Member(self._crew.hire()))
        if some_work:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > PATIENCE_SECONDS:
            raise OSError(
                f"expected a worker within {PATIENCE_SECONDS:.0f} s, got none: the machines are taken, or gone. "
                "Look at `ray status`, then run the same command again."
            )

    def _hand_out(self) -> None:
        for member in self._members:
            if member.ready and not member.hand and self._queue:
                member.hand.append(self._queue.popleft())
                self._begin(member)

    def _begin(self, member: _Member) -> None:
        """Let a member do the slide in its hand, and know the next one.

        Of the last slides none waits behind another: a worker that becomes free takes it.
        """
        if not self._alone(member.hand[0]) and len(self._queue) >= len(self._members) and len(member.hand) == 1:
            following = self._queue[0]
            if not self._alone(following):
                member.hand.append(self._queue.popleft())
        member.since = self._clock()
        member.worker.work(tuple(member.hand))

    def _alone(self, entry: SlideEntry) -> bool:
        return entry.slide_id in self._suspects

    # ----------------------------------------------------------------------------------------------------- taking

    def _take(self, worker: Worker, news: News) -> Iterator[tuple[SlideEntry, Sequence[Status]]]:
        member = next((member for member in self._members if member.worker is worker), None)
        if member is None:  # it was let go before
            return
        if isinstance(news, Ready):
            member.ready = True
            self._share(member).workers += 1
        elif isinstance(news, Lost) or news.error is not None or news.stopped:
            error = None if isinstance(news, Lost) else news.error
            if getattr(error, "errno", None) is not None:  # the disk is full: it is so for every worker
                assert error is not None
                raise error
            yield from self._lose(member, error)
        else:
            entry = member.hand.pop(0)
            self._lost_in_a_row = 0
            self._count(member, news)
            if member.hand:
                self._begin(member)
            yield entry, news.statuses

    def _lose(self, member: _Member, error: Exception | None) -> Iterator[tuple[SlideEntry, Sequence[Status]]]:
        self._members.remove(member)
        member.worker.end()
        self.lost += 1
        self._lost_in_a_row += 1
        self._next_staffing = 0.0
        hand = member.hand
        if not hand and self._lost_in_a_row >= _STARTS and not any(other.ready for other in self._members):
            raise error or OSError(
                f"{self._lost_in_a_row} workers were lost one after the other as they started. Look at Ray's logs, and "
                "at the memory of the machines."
            )
        if len(hand) == 1:
            self._losses[hand[0].slide_id] += 1
        for entry in reversed(hand):
            self._suspects.add(entry.slide_id)
            if self._losses[entry.slide_id] < _LOSSES:
                self._queue.appendleft(entry)
            elif error is not None:
                raise error
            else:
                yield entry, [self._give_up(entry, _GIVEN_UP)]

    def _share(self, member: _Member) -> Share:
        return self.shares.setdefault(member.worker.node, Share())

    def _count(self, member: _Member, report: Report) -> None:
        share = self._share(member)
        share.slides += 1
        share.tiles += report.tiles
        share.busy += report.seconds
        share.began = member.since - self._began if share.began is None else share.began
        share.ended = self._clock() - self._began

    # ---------------------------------------------------------------------------------------------------- the end

    def _wind_up(self, why: str) -> None:
        """Nothing stays in work; who doesn't end by itself is ended."""
        until = self._clock() + _STOP_SECONDS
        for member in self._members:
            if member.hand:
                member.worker.stop(why)
        while any(member.hand for member in self._members) and self._clock() < until:
            for worker, news in self._crew.news(_NEWS_SECONDS):
                for member in [member for member in self._members if member.worker is worker]:
                    if isinstance(news, Report) and news.error is None and not news.stopped:
                        self._count(member, news)
                    if not isinstance(news, Ready):
                        member.hand.clear()
                        self._members.remove(member)
                        member.worker.end()
        for member in [member for member in self._members if member.hand]:
            self._members.remove(member)
            member.worker.end()


_GIVEN_UP = (
    f"its worker was lost, {_LOSSES} times with no other slide in work: killed, out of memory, or its machine went "
    "away. Try it by itself with --engine local."
)
