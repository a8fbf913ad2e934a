"""A worker: the front (inbox, journal, delivery, outcome) around an engine that can die alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.ids import RequestKey, WorkerId, fleet_address
from services.common.record import moves
from services.common.record.reader import Refused
from services.common.record.record import Attempt
from services.common.record.run import Diverged, MaySample, Run
from services.common.record.states import RequestState
from services.common.record.transitions import Answer, Verdict
from simulator.protocol import commands as c
from simulator.protocol.checks import Checks
from simulator.protocol.engine import Engine
from simulator.protocol.gateway import Gateway
from simulator.protocol.links import CloseFrame, EndFrame, Frames, Link, Network, Open, Refusal, Resume
from simulator.protocol.redis_model import insist, insist_anew
from simulator.protocol.timing import Timing
from simulator.protocol.world import Process, Task, World

REPORT_MS = 250


@dataclass(slots=True, eq=False)
class Job:
    """A run, and what the front keeps beside it."""

    run: Run
    spec: c.Spec
    suspect_until: int
    """Not 0: the engine runs it alone, until the journal has this many tokens."""
    texts: list[int]
    """Hash of each choice's text: what the engine's next token is conditioned on."""
    randomness: int
    heard: bool = False
    """Its reader has said what it holds, or the grace has passed."""
    announced: bool = False
    """Redis knows that it runs."""
    opens: int = 0
    """How often it has asked a gateway to take its frames."""
    ending: bool = False
    """The front writes its end, or gives it up; the engine has forgotten it."""


@dataclass(slots=True, eq=False)
class Session:
    """From a registration to the loss of the engine or of the registration; a worker id each."""

    worker: WorkerId
    closed: bool = False
    links: dict[str, Link] = field(default_factory=dict)
    connecting: set[str] = field(default_factory=set)


class Worker(Process):
    """Front and engine of one worker."""

    def __init__(self, world: World, name: str, checks: Checks, network: Network, gateways: dict[str, Gateway]) -> None:
        super().__init__(world, name)
        self.checks = checks
        self.network = network
        self.gateways = gateways
        self.jobs: dict[RequestKey, Job] = {}
        self.engine = Engine(self)
        self._boots = 0
        self.timing = Timing()

    def boot(self) -> None:
        """A new session, nothing kept."""
        self.jobs = {}
        self._begin_session()

    def crash(self) -> None:
        """Front and engine die together."""
        super().crash()
        self.engine = Engine(self)
        self.jobs = {}

    # --- sessions -------------------------------------------------------------------------------------------------

    def _begin_session(self) -> None:
        self._boots += 1
        self.session = Session(WorkerId(f"{self.name}.{self._boots}"))
        self.engine = Engine(self)
        self._posted_for = 0
        self.spawn(self._serve(self.session))

    def _serve(self, session: Session) -> Task:
        yield from insist(c.Register(session.worker))
        self.spawn(self._read_inbox(session))
        self.spawn(self._report(session))
        self.spawn(self._flush(session))

    def _report(self, session: Session) -> Task:
        while not session.closed:
            reported = yield c.Report(session.worker, self.engine.steps, self.engine.in_flight)
            if reported is not c.LOST and not session.closed:
                if reported.recovering:
                    yield from self._post_holdings(session)
                if not reported.registered and reported.is_member:
                    yield from insist(c.Register(session.worker))
                elif not reported.registered:
                    self.world.stats["sessions lost"] += 1
                    self.engine.stop()
                    self.spawn(self._end_session(session, ()))
                    return
            yield REPORT_MS

    def engine_died(self, in_flight: Sequence[Job]) -> None:
        """The front survives: it hands its requests over, those in the step in flight as suspects."""
        self.spawn(self._end_session(self.session, in_flight))

    def _end_session(self, session: Session, suspects: Sequence[Job]) -> Task:
        """Give up every request, then come back under a new id."""
        if session.closed:
            return
        session.closed = True
        self.spawn(insist(c.Close(session.worker)))
        jobs = [job for job in self.jobs.values() if not job.ending]
        for job in jobs:
            job.ending = True
            suspect_until = max(len(known) for known in job.run.known) + 2 if job in suspects else 0
            self.spawn(self._give_up(job, "its engine died" if suspects else "its session ended", 0, suspect_until))
        while self.jobs:
            yield 50
        # Starts that were never read from the inbox.
        while not (yield from insist(c.Retire(session.worker))):
            outstanding = yield from insist(c.Outstanding(session.worker))
            for key, attempt in outstanding.items():
                yield from self._requeue(key, attempt, "its worker's session ended")
        yield self.timing.engine_restart
        self._begin_session()

    def _give_up(self, job: Job, why: str, floor: int, suspect_until: int = 0) -> Task:
        run = job.run
        job.ending = True
        yield from self._last_flush(job)
        yield from self._requeue(run.key, run.attempt, why, floor, suspect_until)
        self._forget(job)

    def _last_flush(self, job: Job) -> Task:
        """Journal what is known; it also shows Redis, if it lost that, that the request is past its suspicion."""
        run = job.run
        for choice, known in enumerate(run.known):
            start, verdict = len(known), Verdict.GAP
            while verdict == Verdict.GAP:
                answer = yield from insist(moves.Append(run.key, run.attempt, choice, start, tuple(known[start:])))
                start, verdict = min(start, answer.index), answer.verdict

    def _requeue(self, key: RequestKey, attempt: Attempt, why: str, floor: int = 0, suspect_until: int = 0) -> Task:
        def requeue() -> moves.Requeue:
            return moves.Requeue(key, attempt, self._nonce(), why, floor=floor, suspect_until=suspect_until)

        yield from insist_anew(requeue)

    def _forget(self, job: Job) -> None:
        if self.jobs.get(job.run.key) is job:
            del self.jobs[job.run.key]
        job.ending = True

    # --- inbox ----------------------------------------------------------------------------------------------------

    def _read_inbox(self, session: Session) -> Task:
        after = 0
        while not session.closed:
            entries = yield c.ReadInbox(session.worker, after)
            if session.closed:
                return
            if entries is c.LOST:
                yield 50
                continue
            for entry_id, message in entries:
                after = entry_id
                self._take(session, message)

    def _take(self, session: Session, message: Any) -> None:
        match message:
            case c.Start():
                self._begin(session, message)
            case c.CancelAttempt(key, attempt):
                job = self.jobs.get(key)
                if job is not None and job.run.attempt == attempt and not job.ending:
                    self.spawn(self._finish(job, RequestState.CANCELLED))
            case c.Redirect(key, attempt, gateway, reader):
                job = self.jobs.get(key)
                if job is None or job.run.attempt != attempt:
                    return
                old_address, old_reader = fleet_address(job.run.gateway), job.run.reader
                job.run.redirect(gateway, reader)
                old = session.links.get(old_address)
                if old is not None and old.up and old_address != fleet_address(gateway):
                    old.to_gateway(CloseFrame(key, old_reader))
                self._open(session, job)

    def _begin(self, session: Session, start: c.Start) -> None:
        self.checks.attempt_begins(start.key, start.attempt)
        older = self.jobs.get(start.key)
        if older is not None:
            self._forget(older)
        run = Run(start.key, start.attempt, start.gateway, start.reader, start.journal)
        texts = self.checks.texts
        job = Job(
            run=run,
            spec=self.checks.specs[start.key],
            suspect_until=start.suspect_until,
            texts=[
                texts.extend(texts.beginning(start.key, choice), tokens) for choice, tokens in enumerate(start.journal)
            ],
            randomness=texts.private(),
        )
        self.jobs[start.key] = job
        self._open(session, job)
        if start.remaining_ms:
            self.world.after(start.remaining_ms, self, self._expire, job)
        if run.sampling:
            self.engine.wake()
        else:
            self.world.after(self.timing.resume_grace, self, self._grace_over, job)

    def _expire(self, job: Job) -> None:
        if not job.ending:
            self.spawn(self._finish(job, RequestState.EXPIRED))

    def _grace_over(self, job: Job) -> None:
        job.heard = True
        if not job.ending:
            self._may_sample(job, job.run.grace_over(), after_grace=True)

    # --- delivery -------------------------------------------------------------------------------------------------

    def _open(self, session: Session, job: Job) -> None:
        """Ask the reader's gateway to take frames, over a stream that may first have to be made."""
        address = fleet_address(job.run.gateway)
        link = session.links.get(address)
        if link is not None and link.up:
            _ask(link, job)
        elif link is None and address not in session.connecting:
            session.connecting.add(address)
            self.spawn(self._connect(session, address))

    def _connect(self, session: Session, address: str) -> Task:
        while any(fleet_address(job.run.gateway) == address for job in self.jobs.values()):
            yield self.world.between(0.5, 3)
            link = self.network.connect(self, self.gateways.get(address))
            if link is not None:
                session.links[address] = link
                session.connecting.discard(address)
                for job in self.jobs.values():
                    if fleet_address(job.run.gateway) == address:
                        _ask(link, job)
                return
            yield 150
        session.connecting.discard(address)

    def link_broke(self, link: Link) -> None:
        """The stream to a gateway died."""
        session = self.session
        address = link.gateway.name
        if session.links.get(address) is not link:
            return
        del session.links[address]
        for job in self.jobs.values():
            if fleet_address(job.run.gateway) == address:
                job.run.open = False
                self._open(session, job)

    def receive(self, link: Link, message: Any) -> None:
        """From a gateway's stream."""
        job = self.jobs.get(message.key)
        if job is None or job.run.attempt != message.attempt:
            return
        if fleet_address(job.run.gateway) != link.gateway.name:
            return
        if self.session.links.get(link.gateway.name) is not link:
            return
        match message:
            case Resume(_, _, held, answers):
                if self.answers_the_last_open(job, answers):
                    self._resume(job, held)
            case Refusal(_, _, Refused.STALE_ATTEMPT, highest):
                if not job.ending:
                    self.spawn(self._give_up(job, "a gateway had opened a later attempt", highest + 1))

    @staticmethod
    def answers_the_last_open(job: Job, number: int) -> bool:
        """Whether the reader that was resumed is the one that counts: a redirect may have come in between."""
        return number == job.opens

    def _resume(self, job: Job, held: Sequence[Any]) -> None:
        job.heard = True
        lengths = [len(known) for known in job.run.known]
        result = job.run.resume(held)
        if isinstance(result, Diverged):
            if not job.ending:
                self.spawn(self._rebase(job, result))
            return
        if any(len(known) > before for known, before in zip(job.run.known, lengths, strict=True)):
            self.world.stats["forced"] += 1
        self._may_sample(job, result)
        self._push(job)

    def _may_sample(self, job: Job, may: MaySample | None, after_grace: bool = False) -> None:
        if may is None:
            return
        if after_grace:
            self.world.stats["graces over"] += 1
            self.checks.graces[job.run.key] += 1
        texts = self.checks.texts
        job.texts = [texts.extend(text, forced) for text, forced in zip(job.texts, may.forced, strict=True)]
        self.engine.wake()

    def _rebase(self, job: Job, diverged: Diverged) -> Task:
        self.world.stats["rebases"] += 1
        job.ending = True
        run = job.run
        yield from insist_anew(lambda: moves.Rebase(run.key, run.attempt, self._nonce(), diverged.histories))
        self._forget(job)

    def _push(self, job: Job) -> None:
        frames = tuple(job.run.frames())
        if frames:
            self._to_reader(job, Frames(job.run.key, job.run.attempt, frames))

    def _to_reader(self, job: Job, message: Any) -> None:
        link = self.session.links.get(fleet_address(job.run.gateway))
        if link is not None and link.up:
            link.to_gateway(message)

    # --- tokens, journal and end ----------------------------------------------------------------------------------

    def sampled(self, job: Job, ended: bool) -> None:
        """The engine has further tokens of a job, which are in its run."""
        self._push(job)
        if ended:
            self.spawn(self._finish(job, RequestState.FINISHED))

    def _flush(self, session: Session) -> Task:
        while not session.closed:
            yield self.timing.flush * (0.8 + 0.4 * self.world.rng.random())
            jobs, appends = [], []
            for job in self.jobs.values():
                if job.ending:
                    continue
                frames = [(frame.choice, frame.index, frame.tokens) for frame in job.run.unjournaled()]
                if not job.announced and not frames:
                    frames = [(0, len(job.run.known[0]), ())]
                for choice, start, tokens in frames:
                    jobs.append(job)
                    appends.append(moves.Append(job.run.key, job.run.attempt, choice, start, tokens))
            if not appends:
                continue
            answers = yield c.Appends(tuple(appends))
            if answers is c.RECOVERING:
                yield from self._post_holdings(session)
            if isinstance(answers, c.Trouble):
                continue
            for job, answer in zip(jobs, answers, strict=True):
                self._journaled(job, answer)

    def _journaled(self, job: Job, answer: Answer) -> None:
        if job.ending:
            return
        match answer.verdict:
            case Verdict.OK | Verdict.GAP | Verdict.CANCEL:
                job.announced = job.announced or answer.verdict != Verdict.GAP
                job.run.journal_is(answer.choice, answer.index)
                if job.suspect_until and answer.index >= job.suspect_until and job.announced:
                    job.suspect_until = 0
                if answer.verdict == Verdict.CANCEL:
                    self.spawn(self._finish(job, RequestState.CANCELLED))
            case _:
                self._forget(job)
        self.engine.wake()

    def _finish(self, job: Job, state: RequestState) -> Task:
        """Write the end; only then tell it."""
        if job.ending:
            return
        job.ending = True
        run = job.run
        while True:
            answer = yield moves.Finish(run.key, run.attempt, state, run.tails(), outcome=b"-")
            if answer is c.RECOVERING:
                yield from self._post_holdings(self.session)
            if isinstance(answer, c.Trouble):
                yield 80
                continue
            if answer.verdict != Verdict.GAP:
                break
            run.journal_is(answer.choice, answer.index)
        if answer.verdict == Verdict.OK:
            self._tell_end(job, state)
        self._forget(job)

    def _tell_end(self, job: Job, state: RequestState) -> None:
        if job.run.open:
            self._push(job)
            counts = tuple(len(known) for known in job.run.known)
            self._to_reader(job, EndFrame(job.run.key, job.run.attempt, str(state), counts))

    # --- recovery -------------------------------------------------------------------------------------------------

    def _post_holdings(self, session: Session) -> Task:
        """Say what runs here, so that the leader goes above it."""
        reported = yield from insist(c.Report(session.worker, self.engine.steps, self.engine.in_flight))
        if not reported.recovering or reported.recovering == self._posted_for:
            return
        self._posted_for = reported.recovering
        requests = tuple(c.HeldRequest(job.run.key, job.run.attempt, True, (), None) for job in self.jobs.values())
        yield from insist(c.Post(reported.recovering, session.worker, requests))

    def _nonce(self) -> str:
        return f"{self.world.rng.getrandbits(48):012x}"


def _ask(link: Link, job: Job) -> None:
    job.opens += 1
    link.to_gateway(Open(job.run.key, job.run.attempt, job.run.reader, job.opens))
