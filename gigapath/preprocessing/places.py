"""Tiles put by several threads straight into places that somebody else owns, such as the rows of batches.

S pixels of a row's side.
"""

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]


class Place(Protocol):
    """Room for tiles that follow each other.

    Attributes:
        first: index of the first of them.
        pixels: uint8 (n, S, S, 3), to be filled.
    """

    first: int
    pixels: UInt8Array

    def done(self, problem: BaseException | None = None) -> None:
        """It is filled, or because of `problem` it never will be."""


Take = Callable[[int, int], Place | None]


def fill_places(
    fill: Callable[[int, UInt8Array], object], take: Take, total: int, *, workers: int = 0, start: int = 0
) -> None:
    """Fill one place after the other, until no tile is left or no more are wanted.

    Each thread asks for a place by itself, so that none waits for another. When this returns or raises, no thread is
    left and every place is done; the first error in a thread is raised.

    Args:
        fill: puts a tile, by its index, into a row (S, S, 3), from any thread.
        take: from the index of the next tile, and the number of tiles left, to a place for one or more of them; it may
            wait for room. None where no more are wanted. It is called in the tiles' order, by one thread at a time.
        total: tiles.
        workers: threads that fill, of which the caller is one.
        start: index of the first tile to take a place for.
    """
    turn = threading.Lock()
    coming = start
    problems: list[BaseException] = []  # the first is the cause: OpenSlide refuses every read after it

    def next_place() -> Place | None:
        nonlocal coming
        with turn:
            place = take(coming, total - coming) if coming < total and not problems else None
            coming += 0 if place is None else len(place.pixels)
            return place

    def fill_rows(place: Place) -> None:
        for index, row in enumerate(place.pixels, place.first):
            if problems:
                return
            fill(index, row)

    def work() -> None:
        try:
            while place := next_place():
                try:
                    fill_rows(place)
                except BaseException as error:
                    problems.append(error)
                place.done(problems[0] if problems else None)
        except BaseException as error:
            problems.append(error)

    names = (f"tile-reader_{number}" for number in range(1, min(workers, total - start)))
    threads = [threading.Thread(target=work, name=name, daemon=True) for name in names]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
