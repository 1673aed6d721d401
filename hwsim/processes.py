"""Many independent tasks: in this process, in several (joblib), or on other machines (joblib's Dask backend).

A task is a call of one function; it must depend on its arguments alone, so that a task that ran twice because a worker
died gives one result, the same as anywhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from mdsnn.kernels.errors import ConfigError, EnvironmentFault, MissingError

CONNECT_SECONDS: Final = 5
WORKERS_SECONDS: Final = 10
GONE_SECONDS: Final = 60.0
"""So long a cluster may be without any worker."""
WATCH_SECONDS: Final = 1.0
_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")


def cores() -> int:
    """Cores that tasks may use here; 1 where joblib is not installed."""
    try:
        import joblib
    except ImportError:
        return 1
    return int(joblib.cpu_count())


def run_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    jobs: int = 1,
    scheduler: str | None = None,
) -> Iterator[Any]:
    """Results of `function(*arguments[i])`, each once, as they come: in order with jobs = 1, else in any order.

    function   of a module, so that another process finds it
    jobs       processes, at least 1; 1 stays in this one
    scheduler  address of a Dask scheduler, tcp://HOST:PORT, whose workers run the tasks instead; a worker that dies is
               made up for by the others
    raises     ConfigError       for jobs below 1, or an address of another form
               MissingError      if joblib, or dask for a scheduler, is not installed
               EnvironmentFault  if the scheduler is not there, has no worker or goes away, or a process was killed
               whatever `function` raises
    """
    if type(jobs) is not int or jobs < 1:
        raise ConfigError(f"jobs = {jobs!r} is below 1")
    if scheduler is not None:
        check_address(scheduler)
        return _on_dask(function, arguments, scheduler)
    if jobs == 1 or len(arguments) < 2:
        return (function(*each) for each in arguments)
    return _in_processes(function, arguments, min(jobs, len(arguments)))


def check_address(scheduler: str) -> None:
    """Raise ConfigError unless `scheduler` is of the form tcp://HOST:PORT or tls://HOST:PORT."""
    match = _ADDRESS.fullmatch(scheduler)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ConfigError(f"scheduler {scheduler!r:.80} is no address such as tcp://192.168.0.10:8786")


def _joblib() -> Any:
    try:
        import joblib
    except ImportError as fault:
        raise MissingError("several processes need joblib: pip install 'mdsnn[all]'") from fault
    return joblib


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start in here take no Ctrl-C, as their parent handles it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    joblib = _joblib()
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    pool = joblib.Parallel(n_jobs=jobs, backend="loky", batch_size=1, return_as="generator_unordered")
    results = None
    whole = False
    try:
        with _interrupts_ignored():
            results = pool(joblib.delayed(function)(*each) for each in arguments)
        for result in results:  # noqa: UP028  # `yield from` would close `results` outside the block that silences it
            yield result
        whole = True
    except TerminatedWorkerError as fault:
        raise EnvironmentFault(
            "a process of the pool was killed, perhaps for want of memory; use fewer (--jobs)"
        ) from fault
    finally:
        if results is not None and not whole:  # nobody waits for what still runs: joblib ends its processes
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # and would warn of tasks that nobody waited for
                results.close()


def _on_dask(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], scheduler: str) -> Iterator[Any]:
    joblib = _joblib()
    try:
        from dask import distributed
    except ImportError as fault:
        raise MissingError("a scheduler needs dask: pip install 'mdsnn[all]'") from fault
    with contextlib.ExitStack() as stack:
        for name in [*logging.root.manager.loggerDict]:  # every fault is raised once, in our words
            if name.split(".")[0] in ("distributed", "tornado"):
                logger = logging.getLogger(name)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL + 1)
        try:
            connect: Any = distributed.Client  # it has no types
            client = connect(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, RuntimeError) as fault:  # a timeout is an OSError
            raise EnvironmentFault(
                f"scheduler {scheduler}: no Dask scheduler answered within {CONNECT_SECONDS} s; "
                "start one (dask scheduler) and its workers (dask worker ADDRESS)"
            ) from fault
        stack.callback(client.close, timeout=CONNECT_SECONDS)
        try:
            client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        except (TimeoutError, OSError) as fault:
            raise EnvironmentFault(
                f"scheduler {scheduler}: has no worker after {WORKERS_SECONDS} s; start one: dask worker {scheduler}"
            ) from fault
        with joblib.parallel_config(backend=_dask_backend(client, scheduler)):
            pool = joblib.Parallel(n_jobs=-1, batch_size=1, pre_dispatch="all", return_as="generator_unordered")
            try:
                yield from pool(joblib.delayed(function)(*each) for each in arguments)
            except ModuleNotFoundError as fault:
                raise EnvironmentFault(
                    f"scheduler {scheduler}: its workers lack {fault.name}; install the same mdsnn there"
                ) from fault


def _dask_backend(client: Any, scheduler: str) -> Any:
    """joblib's Dask backend with three of its gaps closed (joblib 1.6).

    It runs everything in this process where the cluster has a single core when it starts, and it waits for ever where a
    task failed for good (its workers died, the scheduler went), or where no worker is left.
    """
    from joblib._dask import DaskDistributedBackend

    def lost(what: str) -> EnvironmentFault:
        return EnvironmentFault(f"scheduler {scheduler}: {what}")

    class Backend(DaskDistributedBackend):  # type: ignore[misc]  # joblib has no types
        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, int(super().effective_n_jobs(n_jobs)))

        def start_call(self) -> None:
            super().start_call()
            self.client.loop.add_callback(self._watch)

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise out
            return super().retrieve_result_callback(out)

        def _end(self, future: Any, outcome: Any) -> None:
            self._results.pop(future, None)
            callback = self._callbacks.pop(future, None)
            if callback is not None:
                callback(outcome)

        async def _collect(self) -> None:
            while self._continue:
                async for future, result in self.waiting_futures:
                    if future.status == "finished":
                        self._end(future, result)
                    elif future.status == "error" and type(result[1]).__name__ != "KilledWorker":
                        self._end(future, result[1])
                    elif future.status == "error":
                        what = "every worker that tried a task died, perhaps for want of memory"
                        self._end(future, lost(what))
                    else:  # cancelled
                        self._end(future, lost("went away before the last task was done"))
                await asyncio.sleep(0.01)

        async def _watch(self) -> None:
            empty = 0.0
            while self._continue:
                await asyncio.sleep(WATCH_SECONDS)
                try:
                    empty = 0.0 if await self.client.scheduler.ncores(workers=None) else empty + WATCH_SECONDS
                except OSError:  # no scheduler: the futures are about to be cancelled
                    return
                if empty >= GONE_SECONDS:
                    for future in [*self._callbacks]:
                        self._end(future, lost(f"has had no worker for {GONE_SECONDS:g} s"))

    return Backend(client=client)
