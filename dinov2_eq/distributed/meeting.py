"""Connects the processes of a run: opens the store that all share, then waits until all are there."""

import logging
import math
import socket
import threading
import time
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

import torch.distributed as dist

from dinov2_eq.exits import ProcessLost
from dinov2_eq.waiting import waiting_for

MEETING_S = 600.0  # long, because nodes boot and containers are unpacked at different speeds
ANSWER_S = 30.0  # for the first response of a store
PERIOD_S = 0.2
TELL_AFTER_S = 2.0  # until the main process logs that it waits
OTHERS_TELL_AFTER_S = 30.0  # until the other processes log it too
PATIENCE_S = 1.0  # how long a stop signal waits; short, because nothing has started yet
NUM_SHOWN = 5

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """The rank of this process, and the address of the store that all processes share."""

    rank: int
    world_size: int
    host: str
    port: int
    is_hosted: bool  # a launcher hosts the store; otherwise the main process does
    advice: str  # for a user who started fewer processes than the launcher's variables announce

    @property
    def store(self) -> str:
        return f"{'torchrun' if self.is_hosted else 'process 0'} at {self.host}:{self.port}"


def open_store(place: Place) -> dist.Store:
    """Opens the store that all processes share; waits for its host.

    Raises:
        ValueError: the port is in use, or MASTER_ADDR is not the host of the main process.
        TimeoutError: there is no store at this address.
    """
    if place.rank == 0 and not place.is_hosted:
        return _host_store(place)
    deadline, reason = time.monotonic() + MEETING_S, ""
    what = f"a response from {place.store}"
    with waiting_for(what, advice=place.advice, tell_after_s=TELL_AFTER_S, patience_s=PATIENCE_S):
        while time.monotonic() < deadline:
            try:
                # torch would retry by itself, but without letting Python handle signals.
                socket.create_connection((place.host, place.port), timeout=TELL_AFTER_S).close()
                return _connect(place, is_master=False)
            except (OSError, dist.DistError) as error:
                reason = str(error).splitlines()[0]
                time.sleep(PERIOD_S)
    raise TimeoutError(f"Gave up after waiting {MEETING_S:.0f} s for {what} ({reason}). {place.advice}")


def _host_store(place: Place) -> dist.Store:
    try:
        with waiting_for(f"a response from this process itself, {place.store}", patience_s=PATIENCE_S):
            return _connect(place, is_master=True)
    except (OSError, dist.DistError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "already in use" in text:
            raise ValueError(
                f"Port {place.port} of MASTER_PORT is in use on this host ({socket.gethostname()}), perhaps by "
                "another run. Choose another port"
            ) from None
        raise ValueError(
            f"On {socket.gethostname()}, this process cannot reach itself as {place.store}: {text.splitlines()[0]}. "
            "Set MASTER_ADDR to the host of process 0, and MASTER_PORT to a port that it may open"
        ) from None


def _connect(place: Place, is_master: bool) -> dist.Store:
    """Connects to the store in a thread, because torch waits forever if something else listens at the address."""
    outcome: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            timeout = timedelta(seconds=ANSWER_S)
            outcome.append(
                dist.TCPStore(place.host, place.port, place.world_size, is_master, timeout, wait_for_workers=False)
            )
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(2 * ANSWER_S)
    if not outcome:
        raise TimeoutError("something other than a torch store listens there")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def await_all(store: dist.Store, place: Place) -> None:
    """Waits until all processes have called it, and logs meanwhile which are missing.

    Raises:
        TimeoutError: some processes did not call it in time.
        ProcessLost: the host of the store left.
    """
    began = time.monotonic()
    tell_after_s = TELL_AFTER_S if place.rank == 0 else OTHERS_TELL_AFTER_S
    try:
        with waiting_for("the other processes", tell_after_s=math.inf, patience_s=PATIENCE_S):
            store.set(f"came/{place.rank}", "")
            num_here = store.add("came", 1)
            while num_here < place.world_size:
                time.sleep(PERIOD_S)
                num_here, waited_s = store.add("came", 0), time.monotonic() - began
                if waited_s > MEETING_S:
                    missing = _missing(store, place, num_here)
                    raise TimeoutError(f"Gave up after waiting {MEETING_S:.0f} s for {missing}. {place.advice}")
                if waited_s > tell_after_s:
                    missing = _missing(store, place, num_here)
                    logger.warning("waiting for %s (%.0f s). %s", missing, waited_s, place.advice)
                    tell_after_s = 2 * waited_s
    except dist.DistError as error:
        raise ProcessLost(
            f"The store of {place.store} closed before all processes had connected ({str(error).splitlines()[0]}); the "
            "log of process 0 says why"
        ) from None


def _missing(store: dist.Store, place: Place, num_here: int) -> str:
    number = place.world_size - num_here
    absent = (rank for rank in range(place.world_size) if not store.check([f"came/{rank}"]))
    shown = ", ".join(map(str, islice(absent, NUM_SHOWN))) + (", ..." if number > NUM_SHOWN else "")
    return f"{number} of {place.world_size} processes, {'rank' if number == 1 else 'ranks'} {shown}"
