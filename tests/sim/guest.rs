//! A guest: reads, writes, flushes and trims as guests do, wherever its volume is at the moment, and compares every answer with the
//! model. Must not know how sites work.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockferry::handover::State;
use blockferry::volume::VolumeError;

use crate::model::{Begun, CELL, Outcome, fill};
use crate::random::mix;
use crate::site::Site;
use crate::slot::{Part, Served, Slot};
use crate::world::{Shared, Side};

/// With everything well, no request takes longer, however busy bulk is.
const PROMPT_MS: u64 = 8_000;
/// Where people change their minds, a guest gives a request up after this.
const PATIENCE: Duration = Duration::from_secs(90);
/// Consequences of a fault (retries, connections that are thought to live) are over after this.
const AFTERMATH_MS: u64 = 20_000;

/// See the module.
pub struct Guest {
    pub world: Shared,
    pub slot: Arc<Slot>,
    pub sites: Vec<Arc<Site>>,
    pub number: u64,
    pub requests: u64,
}

/// What becomes of a request.
enum Ended<T> {
    Done(T),
    /// The daemon died, or the client hung up, before there was an answer.
    Unknown,
}

impl Guest {
    pub async fn run(mut self) {
        let mut count = 0;
        while !self.world.is_over.load(Ordering::Relaxed) {
            count += 1;
            let pause_ms = match (count < self.requests, self.world.percent(50)) {
                (true, true) => 2,
                (true, false) => 60,
                (false, _) => 900,
            };
            self.world.rest(0, pause_ms).await;
            if self.world.percent(3)
                && let Some(elsewhere) = self.not_owner()
            {
                self.trespass(&elsewhere).await;
            }
            match self.current() {
                Some(served) => self.request(&served, count).await,
                None => self.world.rest(5, 60).await,
            }
        }
    }

    /// Where a guest goes now.
    fn current(&self) -> Option<Served> {
        let owners = self.sites.iter().filter(|site| self.slot.part(site.side).is_some_and(|part| part.is_owner()));
        let served: Vec<Served> = owners.filter_map(|site| site.serves(&self.slot)).collect();
        let at = if served.len() > 1 { self.world.below(served.len() as u64) as usize } else { 0 };
        served.into_iter().nth(at)
    }

    /// Where a guest must be refused.
    fn not_owner(&self) -> Option<Served> {
        let mut others =
            self.sites.iter().filter(|site| self.slot.part(site.side).is_some_and(|part| !part.is_owner()));
        others.find_map(|site| site.serves(&self.slot))
    }

    async fn request(&mut self, served: &Served, count: u64) {
        let begun_ms = self.world.now_ms();
        let kind = self.world.below(100);
        let range = self.range(served, kind);
        let (offset, len_bytes) = (range.start, range.end - range.start);
        self.world.note("request", [self.slot.number << 8 | self.number, kind, offset << 24 | len_bytes]);
        let tag = mix(self.slot.number << 48 | self.number << 32 | count) | 1;
        match kind {
            0..40 => self.read(served, offset, len_bytes).await,
            40..66 => self.write(served, offset, len_bytes, tag, false).await,
            66..72 => self.write(served, offset, len_bytes, tag, true).await,
            72..80 => self.flush(served).await,
            80..86 => self.zero(served, offset, len_bytes, kind.is_multiple_of(2), count.is_multiple_of(4)).await,
            86..91 => self.trim(served, offset, len_bytes).await,
            91..94 => served.volume.prefetch(offset, len_bytes),
            94..97 => self.allocation(served, offset, len_bytes).await,
            _ => self.read_now(served, offset, len_bytes),
        }
        let took_ms = self.world.now_ms() - begun_ms;
        if took_ms > PROMPT_MS && self.world.is_plain && self.world.was_well(begun_ms, AFTERMATH_MS) {
            self.world.fail("prompt", format!("{}: request {kind} at {offset} took {took_ms} ms", self.slot.name));
        }
    }

    /// Where, in whole cells: small and large, aligned and not, often where others are at work, too.
    fn range(&self, served: &Served, kind: u64) -> Range<u64> {
        let size = served.part.model.lock().size_bytes();
        self.world.random(|random| {
            let block = crate::BLOCK;
            let (grain, most) = match random.below(10) {
                0 => (CELL as u64, 3 * block),
                1 => (CELL as u64, 1024),
                2..6 => (512, 2048),
                6 | 7 => (4096, block),
                8 => (block, 2 * block),
                _ => (block, if kind >= 80 { size } else { 4 * block }),
            };
            let most = most.min(size);
            let len = (random.between(1, most) / grain * grain).clamp(grain.min(size), size);
            let hot = random.percent(50);
            let span = if hot { (4 * block).min(size) } else { size };
            let offset = random.below((span - len.min(span)).max(1)) / grain * grain;
            offset..(offset + len).min(size)
        })
    }

    /// Waits for an answer, unless the daemon dies first; now and then a client hangs up.
    async fn answer<T>(&self, served: &Served, answer: impl Future<Output = T>) -> Ended<T> {
        let hangs_up = !self.world.is_quiet && self.world.percent(2);
        let patience = match (hangs_up, self.world.is_plain) {
            (true, _) => Duration::from_millis(self.world.below(30)),
            (false, true) => Duration::MAX / 4,
            // Where people decide, a request may rightly wait for a site that has let go of everything.
            (false, false) => PATIENCE,
        };
        tokio::select! {
            biased;
            () = served.process.death.wait() => Ended::Unknown,
            () = served.part.is_over.wait() => Ended::Unknown,
            done = answer => Ended::Done(done),
            () = tokio::time::sleep(patience) => {
                if !hangs_up && self.is_due(served) && self.world.was_well(self.world.now_ms(), AFTERMATH_MS) {
                    self.world.fail("answers", format!("{}: a request is not answered", self.slot.name));
                }
                Ended::Unknown
            }
        }
    }

    /// Whether everything is there that an answer takes: here, or at the site from which it arrives.
    fn is_due(&self, served: &Served) -> bool {
        let held = served.part.held.lock().clone();
        let has_let_go = |part: Arc<Part>| {
            let there = part.held.lock();
            there.epoch == held.epoch && matches!(there.state, State::Released { .. })
        };
        let is_there = match &held.state {
            State::Owned => true,
            State::Arriving { from } => self
                .sites
                .iter()
                .filter(|site| site.name == *from)
                .any(|site| self.slot.part(site.side).is_some_and(has_let_go) && site.serves(&self.slot).is_some()),
            _ => false,
        };
        is_there && self.slot.is_current(&served.part)
    }

    /// An error is right only while something is wrong.
    fn failed(&self, served: &Served, what: &'static str, error: &VolumeError) {
        self.world.note("request failed", [self.slot.number << 8 | self.number, 0, 0]);
        self.world.say(|| format!("{what}: {error}"));
        if matches!(error, VolumeError::SyncFailed { .. }) && served.process.side == Side::Destination {
            served.process.needs_operator.set();
        }
        if self.is_due(served) && self.world.was_well(self.world.now_ms(), AFTERMATH_MS) {
            self.world.fail("errors", format!("{}: {what} failed though nothing was wrong: {error}", self.slot.name));
        }
    }

    fn end_write(&self, served: &Served, begun: Begun, outcome: Outcome) {
        served.part.model.lock().end_write(begun, outcome);
    }

    fn wrote(&self, served: &Served, begun: Begun, fua: bool, done: Ended<Result<(), VolumeError>>) {
        if matches!(done, Ended::Done(Ok(()))) {
            served.part.was_written.store(true, Ordering::Relaxed);
        }
        // What failed, or was refused, is no write. Of what nobody was told that stays unknown.
        if matches!(done, Ended::Done(_)) {
            let _ = served
                .part
                .may_be_written
                .try_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
        }
        match done {
            // It stays under way: nobody knows when, or whether, it happens.
            Ended::Unknown => {}
            Ended::Done(Ok(())) if fua => self.end_write(served, begun, Outcome::Durable),
            Ended::Done(Ok(())) => self.end_write(served, begun, Outcome::Acknowledged),
            Ended::Done(Err(VolumeError::NotOwner { .. })) => self.end_write(served, begun, Outcome::Refused),
            Ended::Done(Err(error)) => {
                self.end_write(served, begun, Outcome::Unknown);
                self.failed(served, "a write", &error);
            }
        }
    }

    async fn write(&self, served: &Served, offset: u64, len_bytes: u64, tag: u64, fua: bool) {
        served.part.may_be_written.fetch_add(1, Ordering::Relaxed);
        let begun = served.part.model.lock().begin_write(offset, len_bytes, tag);
        let data = fill(tag, len_bytes as usize);
        // As the NBD server does: at once where that is possible. Not always, so that both paths meet everything.
        let here = if tag.is_multiple_of(2) { served.volume.write_here(offset, &data, fua) } else { None };
        let done = match here {
            Some(done) => Ended::Done(done),
            None => self.answer(served, served.volume.write(offset, data.into(), fua)).await,
        };
        self.wrote(served, begun, fua, done);
    }

    async fn zero(&self, served: &Served, offset: u64, len_bytes: u64, may_punch: bool, fua: bool) {
        served.part.may_be_written.fetch_add(1, Ordering::Relaxed);
        let begun = served.part.model.lock().begin_write(offset, len_bytes, 0);
        let done = self.answer(served, served.volume.write_zeroes(offset, len_bytes, may_punch, fua)).await;
        self.wrote(served, begun, fua, done);
    }

    /// What a trim promises: zeros, or what was there, in the sectors at its ends; so whole sectors only.
    async fn trim(&self, served: &Served, offset: u64, len_bytes: u64) {
        let size = served.part.model.lock().size_bytes();
        let (start, end) = (offset / 512 * 512, offset + len_bytes);
        let end = if end == size { end } else { end / 512 * 512 };
        if start < end {
            served.part.may_be_written.fetch_add(1, Ordering::Relaxed);
            let begun = served.part.model.lock().begin_write(start, end - start, 0);
            let done = self.answer(served, served.volume.trim(start, end - start, false)).await;
            self.wrote(served, begun, false, done);
        }
    }

    async fn flush(&self, served: &Served) {
        let began = served.part.model.lock().now();
        let here = if began.is_multiple_of(2) { served.volume.flush_here() } else { None };
        let done = match here {
            Some(done) => Ended::Done(done),
            None => self.answer(served, served.volume.flush()).await,
        };
        match done {
            Ended::Unknown => {}
            Ended::Done(Ok(())) => served.part.model.lock().flushed(began),
            Ended::Done(Err(error)) => self.failed(served, "a flush", &error),
        }
    }

    async fn read(&self, served: &Served, offset: u64, len_bytes: u64) {
        let began = served.part.model.lock().begin_read();
        let done = self.answer(served, served.volume.read(offset, len_bytes as u32)).await;
        match done {
            Ended::Unknown => {}
            Ended::Done(Ok(data)) => self.check(served, "reads", offset, &data, began),
            Ended::Done(Err(error)) => self.failed(served, "a read", &error),
        }
        served.part.model.lock().end_read(began);
    }

    fn read_now(&self, served: &Served, offset: u64, len_bytes: u64) {
        let mut buf = vec![0xff; len_bytes as usize];
        let began = served.part.model.lock().begin_read();
        if let Some(Ok(())) = served.volume.try_read_now(offset, &mut buf) {
            self.check(served, "reads at once", offset, &buf, began);
        }
        served.part.model.lock().end_read(began);
    }

    fn check(&self, served: &Served, check: &'static str, offset: u64, data: &[u8], began: u64) {
        let first = data.first_chunk::<8>().map_or(0, |tag| u64::from_le_bytes(*tag));
        self.world.note("read", [self.slot.number << 8 | self.number, offset, first]);
        if let Err(why) = served.part.model.lock().check_read(offset, data, began) {
            self.world.fail(check, format!("{}: {why}", self.slot.name));
        }
    }

    async fn allocation(&self, served: &Served, offset: u64, len_bytes: u64) {
        let began = served.part.model.lock().begin_read();
        if let Ended::Done(Ok(runs)) = self.answer(served, served.volume.allocation(offset, len_bytes, 1000)).await {
            let mut at = offset;
            for (len, is_zero) in runs {
                let model = served.part.model.lock();
                let checked = if is_zero { model.check_zero(at, len, began) } else { Ok(()) };
                if let Err(why) = checked {
                    self.world.fail("allocation", format!("{}: {why}", self.slot.name));
                }
                at += len;
            }
        }
        served.part.model.lock().end_read(began);
    }

    /// A write where the volume does not belong must be refused.
    async fn trespass(&self, elsewhere: &Served) {
        let writing = elsewhere.volume.write(0, fill(0x00de_ad00_0000_0001, 512).into(), false);
        if let Ended::Done(Ok(())) = self.answer(elsewhere, writing).await
            && !elsewhere.part.is_owner()
        {
            let side = elsewhere.process.side;
            self.world
                .fail("ownership", format!("{}: the {side:?} took a write that is not its owner", self.slot.name));
        }
    }
}
