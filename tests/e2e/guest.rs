//! A guest that reads and writes at random over several NBD connections at once, and a model of its disk in memory:
//! every read is compared. Requests under way at the same time never overlap with a write, so each has one right answer.
//! Must not know sites.

use std::ops::Range;

use crate::disk::{Rng, assert_same, noise};
use crate::nbd_client::{Cookie, NbdClient};

/// Requests under way at a time.
const DEPTH: usize = 8;

pub struct Guest {
    pub model: Vec<u8>,
    clients: Vec<NbdClient>,
    rng: Rng,
    under_way: Vec<Request>,
    pub reads: u64,
    pub writes: u64,
}

struct Request {
    client: usize,
    cookie: Cookie,
    range: Range<usize>,
    /// What a read has to bring; None for a write.
    expected: Option<Vec<u8>>,
}

impl Guest {
    pub fn new(model: Vec<u8>, clients: Vec<NbdClient>, seed: u64) -> Guest {
        for client in &clients {
            assert_eq!(client.size_bytes, model.len() as u64, "the export has the disk's size");
        }
        Guest { model, clients, rng: Rng(seed), under_way: Vec::new(), reads: 0, writes: 0 }
    }

    /// So many requests, several under way at a time; the last ones are still under way afterwards.
    #[track_caller]
    pub fn run(&mut self, requests: usize) {
        for _ in 0..requests {
            while self.under_way.len() >= DEPTH {
                self.finish_one();
            }
            self.submit();
        }
    }

    /// Waits for everything under way, flushes, and takes the disk along.
    #[track_caller]
    pub fn finish(mut self) -> Vec<u8> {
        self.settle();
        self.clients[0].flush();
        std::mem::take(&mut self.model)
    }

    #[track_caller]
    pub fn settle(&mut self) {
        while !self.under_way.is_empty() {
            self.finish_one();
        }
    }

    /// Everything is as it ought to be.
    #[track_caller]
    pub fn check_all(&mut self) {
        self.settle();
        let read = self.clients[0].read_all();
        assert_same("the disk as read by NBD", &read, &self.model);
    }

    fn submit(&mut self) {
        let size = self.model.len();
        let client = self.rng.below(self.clients.len() as u64) as usize;
        let kind = self.rng.below(100);
        let mut len = match self.rng.below(10) {
            0 => 1 + self.rng.below(511) as usize,
            1..6 => 4096,
            6..9 => 512 * (1 + self.rng.below(40) as usize),
            _ => 200_000,
        };
        let mut start = self.rng.below((size - len) as u64) as usize;
        // Most guests write whole sectors; some writes of this one begin and end within one.
        if kind < 92 && len >= 512 {
            start -= start % 512;
        } else if kind >= 98 {
            // The end of a disk that is no multiple of anything.
            len = len.min(10_000);
            start = size - len;
        }
        let range = start..start + len;
        let is_write = kind >= 55;
        let collides = |other: &Request| {
            let overlaps = other.range.start < range.end && range.start < other.range.end;
            overlaps && (is_write || other.expected.is_none())
        };
        if self.under_way.iter().any(collides) {
            return;
        }
        let (seed, to) = (self.rng.next(), &mut self.clients[client]);
        let at = start as u64;
        let (cookie, expected) = if !is_write {
            self.reads += 1;
            (to.submit_read(at, len), Some(self.model[range.clone()].to_vec()))
        } else if kind < 60 {
            self.writes += 1;
            self.model[range.clone()].fill(0);
            (to.submit_write_zeroes(at, len), None)
        } else if kind < 63 {
            (to.submit_flush(), None)
        } else {
            self.writes += 1;
            let data = noise(len, seed);
            self.model[range.clone()].copy_from_slice(&data);
            (to.submit_write(at, &data, kind < 66), None)
        };
        self.under_way.push(Request { client, cookie, range, expected });
    }

    fn finish_one(&mut self) {
        let nth = self.rng.below(self.under_way.len() as u64) as usize;
        let Request { client, cookie, range, expected } = self.under_way.swap_remove(nth);
        let outcome = self.clients[client].wait(cookie);
        let bytes = outcome.unwrap_or_else(|errno| panic!("the request for bytes {range:?} failed: errno {errno}"));
        if let Some(expected) = expected {
            assert_same(&format!("a read of bytes {range:?}"), &bytes, &expected);
        }
    }
}
