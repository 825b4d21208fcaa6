//! A guest: reads, writes, flushes and trims as guests do, wherever its volume is at the moment, and compares every answer with the
//! model. Must not know how sites work.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockferry::volume::VolumeError;

use crate::model::{Begun, CELL, Outcome, fill};
use crate::random::mix;
use crate::slot::{Served, Slot};
use crate::world::{Shared, Side};

/// With everything well, no request takes longer, however busy bulk is.
const PROMPT_MS: u64 = 8_000;
/// Consequences of a fault (retries, connections that are thought to live) are over after this.
const AFTERMATH_MS: u64 = 20_000;

/// See the module.
pub struct Guest {
    pub world: Shared,
    pub slot: Arc<Slot>,
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
                && let Some(elsewhere) = self.slot.not_owner()
            {
                self.trespass(&elsewhere).await;
            }
            match self.slot.current() {
                Some(served) => self.request(&served, count).await,
                None => self.world.rest(5, 60).await,
            }
        }
    }

    async fn request(&mut self, served: &Arc<Served>, count: u64) {
        let begun_ms = self.world.now_ms();
        let kind = self.world.below(100);
        let range = self.range(kind);
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
        if took_ms > PROMPT_MS && self.world.was_well(begun_ms, AFTERMATH_MS) {
            self.world.fail("prompt", format!("{}: request {kind} at {offset} took {took_ms} ms", self.slot.name));
        }
    }

    /// Where, in whole cells: small and large, aligned and not, often where others are at work, too.
    fn range(&self, kind: u64) -> Range<u64> {
        let size = self.slot.model.lock().size_bytes();
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
        let patience = if !self.world.is_quiet && self.world.percent(2) {
            Duration::from_millis(self.world.below(30))
        } else {
            Duration::MAX / 4
        };
        tokio::select! {
            biased;
            () = served.process.death.wait() => Ended::Unknown,
            done = answer => Ended::Done(done),
            () = tokio::time::sleep(patience) => Ended::Unknown,
        }
    }

    /// An error is right only while something is wrong.
    fn failed(&self, served: &Served, what: &'static str, error: &VolumeError) {
        self.world.note("request failed", [self.slot.number << 8 | self.number, 0, 0]);
        self.world.say(|| format!("{what}: {error}"));
        if matches!(error, VolumeError::SyncFailed { .. }) && served.process.side == Side::Destination {
            served.process.needs_operator.set();
        }
        if self.world.was_well(self.world.now_ms(), AFTERMATH_MS) {
            self.world.fail("errors", format!("{}: {what} failed though nothing was wrong: {error}", self.slot.name));
        }
    }

    fn end_write(&self, begun: Begun, outcome: Outcome) {
        self.slot.model.lock().end_write(begun, outcome);
    }

    fn wrote(&self, served: &Served, begun: Begun, fua: bool, done: Ended<Result<(), VolumeError>>) {
        match done {
            // It stays under way: nobody knows when, or whether, it happens.
            Ended::Unknown => {}
            Ended::Done(Ok(())) if fua => self.end_write(begun, Outcome::Durable),
            Ended::Done(Ok(())) => self.end_write(begun, Outcome::Acknowledged),
            Ended::Done(Err(VolumeError::NotOwner { .. })) => self.end_write(begun, Outcome::Refused),
            Ended::Done(Err(error)) => {
                self.end_write(begun, Outcome::Unknown);
                self.failed(served, "a write", &error);
            }
        }
    }

    async fn write(&self, served: &Served, offset: u64, len_bytes: u64, tag: u64, fua: bool) {
        let begun = self.slot.model.lock().begin_write(offset, len_bytes, tag);
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
        let begun = self.slot.model.lock().begin_write(offset, len_bytes, 0);
        let done = self.answer(served, served.volume.write_zeroes(offset, len_bytes, may_punch, fua)).await;
        self.wrote(served, begun, fua, done);
    }

    /// What a trim promises: zeros, or what was there, in the sectors at its ends; so whole sectors only.
    async fn trim(&self, served: &Served, offset: u64, len_bytes: u64) {
        let size = self.slot.model.lock().size_bytes();
        let (start, end) = (offset / 512 * 512, offset + len_bytes);
        let end = if end == size { end } else { end / 512 * 512 };
        if start < end {
            let begun = self.slot.model.lock().begin_write(start, end - start, 0);
            let done = self.answer(served, served.volume.trim(start, end - start, false)).await;
            self.wrote(served, begun, false, done);
        }
    }

    async fn flush(&self, served: &Served) {
        let began = self.slot.model.lock().now();
        let here = if began.is_multiple_of(2) { served.volume.flush_here() } else { None };
        let done = match here {
            Some(done) => Ended::Done(done),
            None => self.answer(served, served.volume.flush()).await,
        };
        match done {
            Ended::Unknown => {}
            Ended::Done(Ok(())) => self.slot.model.lock().flushed(began),
            Ended::Done(Err(error)) => self.failed(served, "a flush", &error),
        }
    }

    async fn read(&self, served: &Served, offset: u64, len_bytes: u64) {
        let began = self.slot.model.lock().begin_read();
        let done = self.answer(served, served.volume.read(offset, len_bytes as u32)).await;
        match done {
            Ended::Unknown => {}
            Ended::Done(Ok(data)) => self.check("reads", offset, &data, began),
            Ended::Done(Err(error)) => self.failed(served, "a read", &error),
        }
        self.slot.model.lock().end_read(began);
    }

    fn read_now(&self, served: &Served, offset: u64, len_bytes: u64) {
        let mut buf = vec![0xff; len_bytes as usize];
        let began = self.slot.model.lock().begin_read();
        if let Some(Ok(())) = served.volume.try_read_now(offset, &mut buf) {
            self.check("reads at once", offset, &buf, began);
        }
        self.slot.model.lock().end_read(began);
    }

    fn check(&self, check: &'static str, offset: u64, data: &[u8], began: u64) {
        let first = data.first_chunk::<8>().map_or(0, |tag| u64::from_le_bytes(*tag));
        self.world.note("read", [self.slot.number << 8 | self.number, offset, first]);
        if let Err(why) = self.slot.model.lock().check_read(offset, data, began) {
            self.world.fail(check, format!("{}: {why}", self.slot.name));
        }
    }

    async fn allocation(&self, served: &Served, offset: u64, len_bytes: u64) {
        let began = self.slot.model.lock().begin_read();
        if let Ended::Done(Ok(runs)) = self.answer(served, served.volume.allocation(offset, len_bytes, 1000)).await {
            let mut at = offset;
            for (len, is_zero) in runs {
                let model = self.slot.model.lock();
                let checked = if is_zero { model.check_zero(at, len, began) } else { Ok(()) };
                if let Err(why) = checked {
                    self.world.fail("allocation", format!("{}: {why}", self.slot.name));
                }
                at += len;
            }
        }
        self.slot.model.lock().end_read(began);
    }

    /// A write where the volume does not belong must be refused.
    async fn trespass(&self, elsewhere: &Served) {
        let writing = elsewhere.volume.write(0, fill(0x00de_ad00_0000_0001, 512).into(), false);
        let holder = self.slot.holder();
        if let Ended::Done(Ok(())) = self.answer(elsewhere, writing).await
            && holder != elsewhere.process.side
            && (elsewhere.process.side == Side::Source || self.slot.holder() == holder)
        {
            let side = elsewhere.process.side;
            self.world
                .fail("ownership", format!("{}: the {side:?} took a write that is not its owner", self.slot.name));
        }
    }
}
