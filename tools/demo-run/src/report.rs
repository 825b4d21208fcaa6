//! What came out: numbers for programs (serde), tables of 80 columns for people. Must not know how it came about.

use std::fmt::Write;

use serde::Serialize;

use crate::bound::MustMove;
use crate::guest::GuestReport;
use blockferry_lab::site::VolumeStatus;

/// The second image may cost so much for each byte that has to move: packet headers, acknowledgements, manifest.
pub const RATIO_BOUND: f64 = 1.06;
/// A demand read may take so much more than a round trip and its block's time on the wire.
pub const DEMAND_SLACK_MS: f64 = 30.0;

/// A whole run.
#[derive(Default, Serialize)]
pub struct Report {
    /// The WAN.
    pub rate_bits_per_s: u64,
    /// The WAN.
    pub rtt_ms: f64,
    /// A round trip, 64 KiB on the wire, and [`DEMAND_SLACK_MS`].
    pub demand_bound_ms: f64,
    /// Whether the bound on bytes is judged: images too small or links too fast for it are not.
    pub ratio_is_judged: bool,
    /// What was relocated together, in order.
    pub phases: Vec<Phase>,
    /// Most memory of site a's and site b's daemon.
    pub peak_memory_bytes: [u64; 2],
}

/// Volumes that were relocated together.
#[derive(Serialize)]
pub struct Phase {
    /// In the order of the command.
    pub volumes: Vec<Volume>,
    /// By the relay: from the source to the destination, headers included.
    pub relay_down_bytes: u64,
    /// By the relay: from the destination to the source.
    pub relay_up_bytes: u64,
    /// Datagrams that the relay's queue had no room for.
    pub relay_dropped_packets: u64,
    /// Datagrams that the machine was too slow to relay; not 0: do not trust the times.
    pub relay_late_packets: u64,
}

/// One volume.
#[derive(Serialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// What had to cross the WAN: counted here.
    pub must_move: MustMove,
    /// From the command to the last block.
    pub seconds: f64,
    /// By the destination's daemon, at the end.
    pub status: VolumeStatus,
    /// By the client.
    pub guest: GuestReport,
    /// `qemu-img compare` of the export with the expected image.
    pub export_is_right: bool,
    /// The raw file, compared after the daemon's end.
    pub file_is_right: bool,
}

impl Phase {
    fn must_move_bytes(&self) -> u64 {
        self.volumes.iter().map(|volume| volume.must_move.compressed_bytes).sum()
    }

    fn ratio(&self) -> f64 {
        (self.relay_down_bytes + self.relay_up_bytes) as f64 / self.must_move_bytes().max(1) as f64
    }

    fn names(&self) -> String {
        self.volumes.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>().join("+")
    }
}

impl Report {
    /// Whether every byte of every image is right.
    pub fn is_right(&self) -> bool {
        let mut volumes = self.phases.iter().flat_map(|phase| &phase.volumes);
        volumes.all(|volume| volume.export_is_right && volume.file_is_right)
    }

    /// Whether the similar images cost no more than they may, where that is judged.
    pub fn is_frugal(&self) -> bool {
        !self.ratio_is_judged || self.phases.iter().skip(1).all(|phase| phase.ratio() <= RATIO_BOUND)
    }

    /// All tables.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_bytes(&mut text);
        let _ = self.write_wire(&mut text);
        let _ = self.write_latency(&mut text);
        let _ = self.write_checks(&mut text);
        text
    }

    fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.phases.iter().flat_map(|phase| &phase.volumes)
    }

    fn write_bytes(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "Where the bytes came from, as site b counted them (MiB)\n")?;
        writeln!(out, "  image     total     zero    store   shared  fetched     sent     time  served")?;
        for volume in self.volumes() {
            let moved = &volume.status.moved;
            writeln!(
                out,
                "  {:<6}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>7.1} s{:>6.2} s",
                volume.name,
                mib(volume.status.size_bytes),
                mib(moved.zero_bytes),
                mib(moved.store_bytes),
                mib(moved.joined_bytes),
                mib(moved.wire_raw_bytes),
                mib(moved.wire_bytes),
                volume.seconds,
                volume.guest.first_read_s,
            )?;
        }
        writeln!(
            out,
            "\n  shared: fetched once for several volumes. fetched: came over the wire; sent:\n  \
             the same, compressed. served: until the first read through NBD was answered.\n  \
             What the client overwrote before it came is in no column.\n"
        )
    }

    fn write_wire(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "Over the WAN, as the relay counted it, all headers included (MiB)\n")?;
        writeln!(out, "  relocated   must move   site b says     a to b   b to a     sum   ratio")?;
        for (place, phase) in self.phases.iter().enumerate() {
            let sent: u64 = phase.volumes.iter().map(|volume| volume.status.moved.wire_bytes).sum();
            let ratio = phase.ratio();
            let verdict = match (place, self.ratio_is_judged) {
                (0, _) | (_, false) => "",
                _ if ratio <= RATIO_BOUND => "  PASS",
                _ => "  FAIL",
            };
            writeln!(
                out,
                "  {:<11}{:>10}{:>14}{:>11}{:>9}{:>8}{:>8.4}{verdict}",
                phase.names(),
                mib(phase.must_move_bytes()),
                mib(sent),
                mib(phase.relay_down_bytes),
                mib(phase.relay_up_bytes),
                mib(phase.relay_down_bytes + phase.relay_up_bytes),
                ratio,
            )?;
        }
        writeln!(
            out,
            "\n  must move: blocks that no earlier image has, each compressed with zstd -3;\n  \
             counted apart from the program. ratio: sum to must move."
        )?;
        if self.ratio_is_judged {
            writeln!(out, "  At most {RATIO_BOUND} is allowed where site b had a similar image.\n")
        } else {
            writeln!(out, "  Not judged: the bound is for 1GiB images at up to 100Mbit/s.\n")
        }?;
        let dropped: u64 = self.phases.iter().map(|phase| phase.relay_dropped_packets).sum();
        let late: u64 = self.phases.iter().map(|phase| phase.relay_late_packets).sum();
        if dropped > 0 {
            writeln!(out, "  The WAN's queue was full for {dropped} packets.\n")?;
        }
        if late > 0 {
            writeln!(out, "  This machine was too slow to relay {late} packets: do not trust the times.\n")?;
        }
        Ok(())
    }

    fn write_latency(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "Reads that had to cross the WAN, while the bulk copy ran (ms)\n")?;
        writeln!(out, "          as the client saw them (in one block)  as site b counted them")?;
        writeln!(out, "  image   reads     p50     p99     max        reads     p50     p99    bound")?;
        for volume in self.volumes() {
            let (client, daemon) = (&volume.guest.wan_reads, &volume.status.demand_latency_ms);
            let verdict = match client.count {
                0 => "none",
                _ if client.p99_ms <= self.demand_bound_ms => "PASS",
                _ => "over",
            };
            writeln!(
                out,
                "  {:<6}{:>7}{:>8.1}{:>8.1}{:>8.1}{:>13}{:>8.1}{:>8.1}  {:>5.1} {verdict}",
                volume.name,
                client.count,
                client.p50_ms,
                client.p99_ms,
                client.max_ms,
                daemon.count,
                daemon.p50,
                daemon.p99,
                self.demand_bound_ms,
            )?;
        }
        writeln!(
            out,
            "\n  The client takes a read that lasted a round trip ({} ms) or more for one that\n  \
             crossed. bound: p99, a round trip + 64 KiB on the wire + {DEMAND_SLACK_MS} ms. It is shown,\n  \
             not judged: other work on this machine lengthens it.\n",
            self.rtt_ms
        )
    }

    fn write_checks(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "Every byte\n")?;
        writeln!(out, "  image   reads checked     written, FUA, flushes      by NBD        raw file")?;
        for volume in self.volumes() {
            let word = |right: bool| if right { "identical" } else { "DIFFERENT" };
            let guest = &volume.guest;
            let reads = format!("{} ({} MiB)", guest.reads, mib(guest.read_bytes));
            let written = format!("{} ({} MiB)", guest.writes, mib(guest.written_bytes));
            writeln!(
                out,
                "  {:<6}{reads:>17}  {written:>16}{:>5}{:>5}    {:<12}  {:<9}",
                volume.name,
                guest.fua_writes,
                guest.flushes,
                word(volume.export_is_right),
                word(volume.file_is_right),
            )?;
        }
        let [a, b] = self.peak_memory_bytes.map(mib);
        writeln!(
            out,
            "\n  Compared with the source image plus what the client wrote: the export with\n  \
             qemu-img compare, the file after the daemon had ended. Most memory: site a\n  \
             {a} MiB, site b {b} MiB."
        )
    }
}

/// One place after the point.
pub fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Latency;
    use blockferry_lab::site::parse;

    fn volume(name: &str) -> Volume {
        let status = r#"{"name":"vm01","phase":"released_from_source","phase_reason":"","owner":"b","image":"/x",
            "size_bytes":1073741824,"block_size_bytes":65536,"blocks":{"total":16384,"absent":0,"written":120},
            "moved":{"zero_bytes":420000000,"store_bytes":1073741824,"joined_bytes":90000000,
            "wire_raw_bytes":653741824,"wire_bytes":251000000},
            "demand_latency_ms":{"count":12345,"p50":48.25,"p99":1234.5,"max":2345.6},"eta_s":null}"#;
        let guest = GuestReport {
            reads: 12_345,
            read_bytes: 400_000_000,
            writes: 2_345,
            written_bytes: 80_000_000,
            fua_writes: 234,
            flushes: 77,
            wan_reads: Latency { count: 1234, p50_ms: 48.1, p99_ms: 1234.5, max_ms: 2345.6 },
            ..GuestReport::default()
        };
        Volume {
            name: name.into(),
            must_move: MustMove { blocks: 9000, compressed_bytes: 250_000_000 },
            seconds: 123.4,
            status: parse(status).unwrap(),
            guest,
            export_is_right: true,
            file_is_right: true,
        }
    }

    fn report(relay_down_bytes: u64) -> Report {
        let phase = |names: &[&str]| Phase {
            volumes: names.iter().map(|name| volume(name)).collect(),
            relay_down_bytes: relay_down_bytes * names.len() as u64,
            relay_up_bytes: 3_000_000,
            relay_dropped_packets: 7,
            relay_late_packets: 9,
        };
        Report {
            rate_bits_per_s: 100_000_000,
            rtt_ms: 40.0,
            demand_bound_ms: 75.2,
            ratio_is_judged: true,
            phases: vec![phase(&["vm01"]), phase(&["vm02", "vm03"])],
            peak_memory_bytes: [150 << 20, 1150 << 20],
        }
    }

    #[test]
    fn tables_fit_80_columns() {
        for line in report(262_000_000).tables().lines() {
            assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn verdicts() {
        assert!(report(262_000_000).is_frugal());
        assert!(!report(266_000_000).is_frugal());
        assert!(Report { ratio_is_judged: false, ..report(266_000_000) }.is_frugal());
        let mut wrong = report(1);
        assert!(wrong.is_right());
        wrong.phases[1].volumes[1].file_is_right = false;
        assert!(!wrong.is_right() && wrong.tables().contains("DIFFERENT"));
    }
}
