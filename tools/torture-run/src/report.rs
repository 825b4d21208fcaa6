//! The tally: numbers for programs (serde), and a table for people. Must not know how it came about.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::cycle::Kind;
use crate::guest::Done;
use crate::model::{Checked, Loss, words};
use crate::operator::Outcome;
use crate::verb::Verb;

/// A whole run.
#[derive(Default, Serialize)]
pub struct Report {
    /// Decides what is written, and what is killed when.
    pub seed: u64,
    /// The image.
    pub size_bytes: u64,
    /// The WAN.
    pub rate_bits_per_s: u64,
    /// The WAN.
    pub rtt_ms: f64,
    /// How often each kind of fault was made.
    pub cycles: BTreeMap<Kind, u64>,
    /// How often an operator did what, and what came of it.
    pub verbs: BTreeMap<Verb, BTreeMap<Outcome, u64>>,
    /// Verbs that had to be refused, and were, with a reason and without an effect.
    pub refusals: u64,
    /// Writes that were tried at sites that do not own the disk: all refused, or the run would have ended.
    pub probes: u64,
    /// Sites killed, all together.
    pub kills: u64,
    /// Relocations to a third site while the first one still had what it released.
    pub hops: u64,
    /// Times that nothing moved although everything was up, or a verb was not answered.
    pub stuck: u64,
    /// What the clients did.
    pub done: Done,
    /// What was looked for after restarts, all together.
    pub checked: Checked,
    /// Blocks that no client wrote, compared with the image after restarts.
    pub untouched_blocks: u64,
    /// Relocations that came to their end, the raw file compared byte by byte.
    pub relocations: u64,
    /// Both ways, by the relays, headers included.
    pub wan_bytes: u64,
    /// From the start of the process to its line `ready`, with a volume in relocation.
    pub destination_ready: Times,
    /// The same at the source.
    pub source_ready: Times,
    /// The same at the destination with a sparse volume of 1 TiB in relocation; none where it could not be made.
    pub terabyte_ready: Times,
    /// Why not, then.
    pub terabyte_skipped: Option<String>,
    /// Panics in the daemons' logs.
    pub panics: u64,
    /// All that was not as it had to be.
    pub losses: Vec<FoundLoss>,
    /// The whole run.
    pub seconds: f64,
}

/// A loss, and when it was found.
#[derive(Clone, Debug, Serialize)]
pub struct FoundLoss {
    /// After which cycle, from 1 on.
    pub cycle: u64,
    /// What was done in it.
    pub after: &'static str,
    /// What was lost.
    #[serde(flatten)]
    pub loss: Loss,
}

/// A set of times in seconds; all 0 where there are none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Times {
    /// How many.
    pub count: usize,
    /// The middle one.
    pub median_s: f64,
    /// The longest.
    pub max_s: f64,
    #[serde(skip)]
    all: Vec<f64>,
}

impl Times {
    /// Adds one.
    pub fn add(&mut self, seconds: f64) {
        self.all.push(seconds);
        self.all.sort_by(f64::total_cmp);
        self.count = self.all.len();
        self.median_s = self.all[self.count / 2];
        self.max_s = self.all.last().copied().unwrap_or_default();
    }

    fn words(&self) -> String {
        match self.count {
            0 => "none".to_owned(),
            count => format!("{count:>4}: median {:.2} s, longest {:.2} s", self.median_s, self.max_s),
        }
    }
}

impl Report {
    /// Whether nothing was lost and nobody panicked.
    pub fn is_right(&self) -> bool {
        self.losses.is_empty() && self.panics == 0 && self.stuck == 0
    }

    /// How many losses are bytes of another disk, and how many are not.
    pub fn foreign_and_lost(&self) -> (usize, usize) {
        let foreign = self.losses.iter().filter(|found| found.loss.is_foreign).count();
        (foreign, self.losses.len() - foreign)
    }

    /// Cycles of all kinds.
    pub fn all_cycles(&self) -> u64 {
        self.cycles.values().sum()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(text, "cycles {:>53}", self.all_cycles());
        for (kind, count) in &self.cycles {
            let _ = writeln!(text, "  {:<50}{count:>8}", kind.words());
        }
        let verbs: u64 = self.verbs.values().flat_map(|outcomes| outcomes.values()).sum();
        let _ = writeln!(text, "operator's verbs {verbs:>43}");
        for (verb, outcomes) in &self.verbs {
            let _ = writeln!(text, "  {:<50}{:>8}", verb.words(), outcomes.values().sum::<u64>());
            for (outcome, count) in outcomes {
                let _ = writeln!(text, "    {outcome:<48}{count:>8}");
            }
        }
        let (foreign, lost) = self.foreign_and_lost();
        let mut line = |what: &str, value: String| {
            let _ = writeln!(text, "{what:<40}{value:>20}");
        };
        line("writes acknowledged", self.done.writes.to_string());
        line("flushes acknowledged", self.done.flushes.to_string());
        line("reads compared", self.done.reads.to_string());
        line("writes checked after a restart", self.checked.writes.to_string());
        line("  flushed, or FUA", self.checked.flushed_writes.to_string());
        line("  sectors compared", self.checked.sectors.to_string());
        line("untouched blocks compared", self.untouched_blocks.to_string());
        line("relocations completed", self.relocations.to_string());
        line("bytes over the WAN", format!("{} MiB", self.wan_bytes >> 20));
        line("  to a third site", self.hops.to_string());
        line("sites killed", self.kills.to_string());
        line("verbs refused, as they had to be", self.refusals.to_string());
        line("writes refused where not owned", self.probes.to_string());
        line("lost", lost.to_string());
        line("foreign", foreign.to_string());
        line("stuck", self.stuck.to_string());
        line("panics", self.panics.to_string());
        let _ = writeln!(text, "ready again, destination    {}", self.destination_ready.words());
        let _ = writeln!(text, "ready again, source         {}", self.source_ready.words());
        let terabyte = self.terabyte_skipped.as_ref().map(|why| format!("skipped: {why}"));
        let terabyte = terabyte.unwrap_or_else(|| self.terabyte_ready.words());
        let _ = writeln!(text, "ready again, 1 TiB volume   {terabyte}");
        text
    }

    /// What is needed to look into each loss.
    pub fn losses(&self) -> String {
        let mut text = String::new();
        for FoundLoss { cycle, after, loss } in &self.losses {
            let durable = if loss.was_flushed { "flushed" } else { "acknowledged, not flushed" };
            let expected = match loss.expected_sequence {
                0 => "the image's own bytes".to_owned(),
                sequence => format!("{} ({durable})", words(sequence)),
            };
            let what = if loss.is_foreign { "FOREIGN" } else { "LOST" };
            let _ = writeln!(
                text,
                "{what}: seed {}, cycle {cycle} ({after}): byte {}: expected {expected}, found {}; {} sectors are wrong",
                self.seed, loss.offset, loss.found, loss.wrong_sectors
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tally_says_what_is_needed() {
        let mut report = Report { seed: 7, ..Report::default() };
        assert!(report.is_right() && report.table().contains("none"));
        report.cycles.insert(Kind::StoreLost, 3);
        report.destination_ready.add(0.2);
        report.destination_ready.add(0.1);
        let loss = Loss {
            offset: 4096,
            expected_sequence: crate::record::sequence(1, 12),
            was_flushed: true,
            found: "write 9 of disk 1".to_owned(),
            wrong_sectors: 2,
            is_foreign: false,
        };
        report.losses.push(FoundLoss { cycle: 2, after: "source killed", loss });
        assert!(!report.is_right());
        let said = report.losses();
        for word in ["seed 7", "cycle 2", "byte 4096", "write 12 of disk 1 (flushed)", "found write 9", "2 sectors"] {
            assert!(said.contains(word), "{said}");
        }
        let table = report.table();
        assert!(table.contains("store deleted") && table.contains("longest 0.20 s"), "{table}");
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains("\"store_lost\":3") && json.contains("\"found\":\"write 9 of disk 1\""), "{json}");
    }
}
