"""An engine: steps over what may sample. It can die, or stall, while its front lives on."""

from typing import TYPE_CHECKING

from simulator.protocol.text import has_ended

if TYPE_CHECKING:
    from simulator.protocol.worker import Job, Worker

STALL_POLL_MS = 20


class Engine:
    """One life of a worker's engine."""

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker
        self.steps = 0
        self.in_flight = False
        self.stalled_until = 0.0
        self._dead = False
        self._batch: list[Job] = []

    def wake(self) -> None:
        """Something may have become ready."""
        if not self.in_flight and not self._dead:
            self._begin()

    def stop(self) -> None:
        """Its front ends it; nobody is a suspect."""
        self._dead = True

    def die(self) -> None:
        """It crashes: whatever was in the step in flight is suspect."""
        if self._dead:
            return
        self._dead = True
        checks = self.worker.checks
        self.worker.world.stats["engines died"] += 1
        self.worker.world.log(self.worker.name, f"engine dies in a step of {[job.run.key for job in self._batch]}")
        for job in self._batch:
            checks.deaths[job.run.key] += 1
            checks.lonely_deaths[job.run.key] += len(self._batch) == 1
        self.worker.engine_died(list(self._batch))

    def _begin(self) -> None:
        ready = [job for job in self.worker.jobs.values() if job.run.sampling and not job.ending]
        complete = [job for job in ready if _complete(job)]
        for job in complete:
            # All its tokens were known already: the attempt before it died between the last token and the outcome.
            self.worker.sampled(job, ended=True)
            ready.remove(job)
        suspects = [job for job in ready if job.suspect_until]
        self._batch = suspects[:1] or ready
        self.in_flight = bool(self._batch)
        if self._batch:
            world = self.worker.world
            world.after(self.worker.timing.step * (0.8 + 0.4 * world.rng.random()), self.worker, self._done)

    def _done(self) -> None:
        world = self.worker.world
        if self._dead:
            return
        if world.now < self.stalled_until:
            world.after(STALL_POLL_MS, self.worker, self._done)
            return
        for job in self._batch:
            if 0 <= job.spec.poison_after <= max(len(known) for known in job.run.known) and not job.ending:
                self.die()
                return
        self.steps += 1
        batch, self._batch, self.in_flight = self._batch, [], False
        for job in batch:
            if not job.ending:
                self._sample(job)
        self.wake()

    def _sample(self, job: "Job") -> None:
        self.worker.checks.samples(job.run.key, job.run.attempt, job.heard)
        texts, rng = self.worker.checks.texts, self.worker.world.rng
        num_tokens = 1 + (rng.random() < 0.3) + (rng.random() < 0.15)
        for choice, known in enumerate(job.run.known):
            if has_ended(known, job.spec.max_tokens):
                continue
            tokens: list[int] = []
            text = job.texts[choice]
            left = job.spec.max_tokens - len(known)
            while len(tokens) < min(num_tokens, left) and not (tokens and has_ended(tokens, job.spec.max_tokens)):
                token, text = texts.sample(text, job.randomness)
                tokens.append(token)
            if tokens:
                job.texts[choice] = text
                job.run.sampled(choice, tokens)
        self.worker.sampled(job, _complete(job))


def _complete(job: "Job") -> bool:
    return all(has_ended(known, job.spec.max_tokens) for known in job.run.known)
