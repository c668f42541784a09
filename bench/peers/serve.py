"""A contestant's process: ``python -m peers.serve NAME THREADS`` answers the requests of protocol.py."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from . import MODULES
from .protocol import Case, Unsupported, Work, sample


def timed(call: Callable[[], object], warm: int, repeat: int, inner: int) -> list[float]:
    """Seconds per call, `repeat` times the mean of `inner` calls."""
    seconds = []
    gc.collect()
    gc.disable()  # as timeit does: a collection is not the contestant's work
    for _ in range(warm):
        call()
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        seconds.append((time.perf_counter() - start) / inner)
    gc.enable()
    return seconds


class Server:
    """Holds the contestant and the case that is ready."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer
        self._work: Work | None = None

    def answer(self, verb: str, words: dict[str, str]) -> dict[str, Any]:
        """The answer to one request."""
        if verb in ("case", "drop"):
            self._work = None  # the last case's arrays go before the next one's come
            if verb == "case":
                self._work = self._peer.prepare(Case.parse(words))
            return {"ok": True}
        assert self._work is not None, "no case is ready"
        if verb == "sample":
            return {"sample": sample(self._work.results(), int(words["count"]))}
        numbers = {key: int(words[key]) for key in ("warm", "repeat", "inner")}
        return {"seconds": timed(self._work.call, **numbers)}


def main(name: str, threads: int) -> None:
    """Answer requests on standard input until it ends."""
    # Libraries print what they like on standard output; it goes to standard error, the answers stay alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        peer = importlib.import_module(f".{MODULES[name]}", __package__).Peer(threads)
    except (ImportError, Unsupported) as e:
        say({"absent": str(e)})
        return
    say({"version": peer.version})
    server = Server(peer)
    for line in sys.stdin:
        verb, *pairs = line.split()
        try:
            say(server.answer(verb, dict(p.split("=", 1) for p in pairs)))
        except Unsupported as e:
            say({"unsupported": str(e)})
        except Exception as e:  # one case that fails must not end the run
            traceback.print_exc()
            say({"unsupported": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"})


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
