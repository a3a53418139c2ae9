"""SIGTERM means: save, then leave. All processes must leave at the same step."""

import signal

import jax

EXIT_CODE = 75  # EX_TEMPFAIL: interrupted, saved, start me again


class StoppedEarly(BaseException):
    """SIGTERM before the first step: there is nothing to save, so nothing is waited for."""


class PreemptionNotice:
    """Make it after jax.distributed is initialised: with several processes JAX has a handler of its own."""

    def __init__(self):
        self._noticed, self._training = False, False
        self._alone = jax.process_count() == 1
        if self._alone:
            signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, *_):
        self._noticed = True
        if not self._training:
            raise StoppedEarly

    def training_begins(self) -> None:
        """From now on SIGTERM is noted, and heeded after the step."""
        self._training = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process. Call it at every step."""
        if self._alone:
            return self._noticed
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
