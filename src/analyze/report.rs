//! What an analysis found: the numbers for programs (serde, stable names, sizes in bytes, times in seconds) and the
//! table for people. Must not know how they were counted.

use std::fmt::Write;

use serde::Serialize;

use super::count::Tally;
use crate::core::ids::BlockSize;

/// Everything that [`super::analyze`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The images that would be relocated, in order.
    pub images: Vec<ImageSize>,
    /// Those whose blocks the destination is taken to have.
    pub prewarmed: Vec<ImageSize>,
    /// The level at which the unique blocks were compressed.
    pub zstd_level: i32,
    /// The link that `seconds` are for.
    pub link: Option<Link>,
    /// What is sent besides compressed blocks.
    pub model: WireModel,
    /// The block size with the fewest `wire_bytes` in total.
    pub best_block_size_bytes: u32,
    /// The smallest first.
    pub block_sizes: Vec<SizeSavings>,
}

/// An image and its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageSize {
    /// As it was given (bytes that are no UTF-8 replaced).
    pub path: String,
    /// In bytes, holes included.
    pub size_bytes: u64,
}

/// A link to predict times for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Bits per second.
    pub bits_per_s: u64,
    /// A round trip, in milliseconds.
    pub rtt_ms: f64,
}

/// How `wire_bytes` and `seconds` follow from the counts:
/// `wire = (compressed + unique blocks * block_overhead + manifest) * packet / packet_payload`, and
/// `seconds = wire * 8 / bits_per_s + setup_round_trips * rtt`.
/// The manifest has `manifest_bytes_per_id` for each page, and for each non-zero block in a page that no image before had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WireModel {
    /// Bytes for each block besides its payload: its id, the headers of its stream and of its frame.
    pub block_overhead_bytes: u64,
    /// Bytes for each id in the manifest.
    pub manifest_bytes_per_id: u64,
    /// Bytes of an IPv4 packet, full, at an MTU of 1500: what quinn's MTU discovery ends at.
    pub packet_bytes: u64,
    /// Bytes of those for our streams: without IP, UDP, QUIC and stream headers, and the AEAD's tag.
    pub packet_payload_bytes: u64,
    /// Round trips before the first block: TLS, hello, manifest root, first page.
    pub setup_round_trips: u64,
}

impl WireModel {
    /// What this program sends.
    pub const BLOCKFERRY: WireModel = WireModel {
        block_overhead_bytes: 48,
        manifest_bytes_per_id: 32,
        packet_bytes: 1480,
        packet_payload_bytes: 1410,
        setup_round_trips: 4,
    };

    fn wire_bytes(&self, tally: &Tally, manifest_bytes: u64) -> u64 {
        let sent = tally.compressed_bytes + tally.unique_blocks * self.block_overhead_bytes + manifest_bytes;
        (u128::from(sent) * u128::from(self.packet_bytes)).div_ceil(u128::from(self.packet_payload_bytes)) as u64
    }

    fn seconds(&self, wire_bytes: u64, link: Link) -> f64 {
        wire_bytes as f64 * 8.0 / link.bits_per_s as f64 + self.setup_round_trips as f64 * link.rtt_ms / 1000.0
    }
}

/// What one block size would save.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SizeSavings {
    /// In bytes.
    pub block_size_bytes: u32,
    /// All images together, relocated one after the other.
    pub total: Savings,
    /// Each image, in order.
    pub images: Vec<ImageSavings>,
}

/// What one block size would save of one image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageSavings {
    /// As in [`Report::images`].
    pub path: String,
    /// The numbers.
    #[serde(flatten)]
    pub savings: Savings,
}

/// Bytes by step: `zero + within + across + prewarmed + unique = total`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Savings {
    /// Size, holes included.
    pub total_bytes: u64,
    /// In blocks that are all zero.
    pub zero_bytes: u64,
    /// In blocks that are equal to an earlier one of the same image.
    pub within_bytes: u64,
    /// In blocks that an earlier image of the list has.
    pub across_bytes: u64,
    /// In blocks that only a prewarmed image has.
    pub prewarmed_bytes: u64,
    /// In all others: these have to be sent.
    pub unique_bytes: u64,
    /// How many these are.
    pub unique_blocks: u64,
    /// What zstd leaves of `unique_bytes`.
    pub compressed_bytes: u64,
    /// The manifest; see [`WireModel`].
    pub manifest_bytes: u64,
    /// Everything in packets; see [`WireModel`].
    pub wire_bytes: u64,
    /// Time on the link; None where none was given.
    pub seconds: Option<f64>,
}

impl Savings {
    fn new(tally: &Tally, model: &WireModel, link: Option<Link>) -> Savings {
        let manifest_bytes = (tally.pages + tally.new_page_ids) * model.manifest_bytes_per_id;
        let wire_bytes = model.wire_bytes(tally, manifest_bytes);
        Savings {
            total_bytes: tally.zero_bytes
                + tally.within_bytes
                + tally.across_bytes
                + tally.prewarmed_bytes
                + tally.unique_bytes,
            zero_bytes: tally.zero_bytes,
            within_bytes: tally.within_bytes,
            across_bytes: tally.across_bytes,
            prewarmed_bytes: tally.prewarmed_bytes,
            unique_bytes: tally.unique_bytes,
            unique_blocks: tally.unique_blocks,
            compressed_bytes: tally.compressed_bytes,
            manifest_bytes,
            wire_bytes,
            seconds: link.map(|link| model.seconds(wire_bytes, link)),
        }
    }
}

impl Report {
    /// `by_image` has for each image an entry for each block size.
    pub(super) fn new(
        images: Vec<ImageSize>,
        prewarmed: Vec<ImageSize>,
        zstd_level: i32,
        link: Option<Link>,
        block_sizes: &[BlockSize],
        by_image: Vec<Vec<Tally>>,
    ) -> Report {
        let model = WireModel::BLOCKFERRY;
        let block_sizes: Vec<_> = (0..)
            .zip(block_sizes)
            .map(|(i, size): (usize, &BlockSize)| {
                let mut sum = Tally::default();
                let images = images.iter().zip(&by_image).map(|(image, tallies)| {
                    sum += tallies[i];
                    ImageSavings { path: image.path.clone(), savings: Savings::new(&tallies[i], &model, link) }
                });
                let images = images.collect();
                SizeSavings { block_size_bytes: size.bytes(), total: Savings::new(&sum, &model, link), images }
            })
            .collect();
        let best = block_sizes.iter().min_by_key(|size| size.total.wire_bytes);
        let best_block_size_bytes = best.map_or(0, |size| size.block_size_bytes);
        Report { images, prewarmed, zstd_level, link, model, best_block_size_bytes, block_sizes }
    }

    /// The report for people, in lines of at most 80 columns.
    pub fn to_table(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_table(&mut text);
        text
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let Some(best) = self.block_sizes.iter().find(|size| size.block_size_bytes == self.best_block_size_bytes)
        else {
            return Ok(());
        };
        let sum = |images: &[ImageSize]| human_bytes(images.iter().map(|image| image.size_bytes).sum());
        let count = |images: &[ImageSize]| match images.len() {
            1 => "1 image".to_owned(),
            many => format!("{many} images"),
        };
        write!(out, "{}, {}", count(&self.images), sum(&self.images))?;
        if !self.prewarmed.is_empty() {
            write!(out, "; prewarmed with {}, {}", count(&self.prewarmed), sum(&self.prewarmed))?;
        }
        writeln!(out, "; zstd level {}", self.zstd_level)?;
        if let Some(link) = self.link {
            writeln!(out, "link: {}, round trip {} ms", human_rate(link.bits_per_s), link.rtt_ms)?;
        }

        writeln!(out, "\n    block    zero  within  across prewarm  unique    zstd to    on wire     time")?;
        for size in &self.block_sizes {
            let mark = if size.block_size_bytes == self.best_block_size_bytes { '*' } else { ' ' };
            let block = human_bytes(u64::from(size.block_size_bytes));
            let savings = &size.total;
            let compressed = human_bytes(savings.compressed_bytes);
            writeln!(
                out,
                "{mark}{block:>8}{} {compressed:>10} {:>10}{}",
                Steps(savings),
                human_bytes(savings.wire_bytes),
                savings.seconds.map_or(String::from("        -"), |seconds| format!(" {:>8}", human_seconds(seconds))),
            )?;
        }

        if best.images.len() > 1 {
            let block = human_bytes(u64::from(best.block_size_bytes));
            writeln!(out, "\nBy image, in blocks of {block}:\n")?;
            writeln!(out, "  image                  size    zero  within  across prewarm  unique    on wire")?;
            for image in &best.images {
                let savings = &image.savings;
                writeln!(
                    out,
                    "  {:<16} {:>8}{} {:>10}",
                    tail(&image.path, 16),
                    human_bytes(savings.total_bytes),
                    Steps(savings),
                    human_bytes(savings.wire_bytes),
                )?;
            }
        }

        let time = |bytes| match self.link {
            Some(link) => format!(", {}", human_seconds(self.model.seconds(bytes, link))),
            None => String::new(),
        };
        let (wire, plain) = (best.total.wire_bytes, best.total.total_bytes);
        writeln!(
            out,
            "\n* fewest bytes on the wire: {}{}; a plain copy: {}{}",
            human_bytes(wire),
            time(wire),
            human_bytes(plain),
            time(plain)
        )?;
        writeln!(
            out,
            "\nEvery byte is in one column: all-zero blocks; repeated within the image; in an\n\
             earlier image of the list; prewarmed; unique. On wire: the unique blocks after\n\
             zstd with {} bytes each for headers, the manifest ({} bytes a block, none for\n\
             pages that an earlier image has), and packet headers ({:.1} %).",
            self.model.block_overhead_bytes,
            self.model.manifest_bytes_per_id,
            (self.model.packet_bytes as f64 / self.model.packet_payload_bytes as f64 - 1.0) * 100.0,
        )
    }
}

/// The five steps in percent, eight columns each.
struct Steps<'a>(&'a Savings);

impl std::fmt::Display for Steps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let s = self.0;
        for bytes in [s.zero_bytes, s.within_bytes, s.across_bytes, s.prewarmed_bytes, s.unique_bytes] {
            let percent = if s.total_bytes == 0 { 0.0 } else { bytes as f64 * 100.0 / s.total_bytes as f64 };
            write!(f, "{percent:>7.2}%")?;
        }
        Ok(())
    }
}

fn human_bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        // Where the rounded number would be 1000 or more.
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "B" || value >= 99.95 || value.fract() == 0.0 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

fn human_rate(bits_per_s: u64) -> String {
    let (mut value, mut unit) = (bits_per_s as f64, "bit/s");
    for larger in ["kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"] {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1000.0, larger);
    }
    format!("{value} {unit}")
}

fn human_seconds(seconds: f64) -> String {
    if seconds < 99.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86400);
    match () {
        () if hours == 0 => format!("{minutes}m{:02}s", whole % 60),
        () if days == 0 => format!("{hours}h{:02}m", minutes % 60),
        () => format!("{days}d{:02}h", hours % 24),
    }
}

/// The end of a path, in at most `columns` characters.
fn tail(path: &str, columns: usize) -> String {
    let count = path.chars().count();
    if count <= columns {
        path.to_owned()
    } else {
        format!("~{}", path.chars().skip(count - columns + 1).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let bytes = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (65536, "64 KiB"),
            (1 << 20, "1 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1536 << 20, "1.5 GiB"),
            (12 << 40, "12 TiB"),
            (150_000_000, "143 MiB"),
        ];
        for (bytes, text) in bytes {
            assert_eq!(human_bytes(bytes), text);
        }
        let seconds =
            [(0.04, "0.0 s"), (35.25, "35.2 s"), (99.96, "1m40s"), (3599.6, "1h00m"), (86400.0 * 2.5, "2d12h")];
        for (seconds, text) in seconds {
            assert_eq!(human_seconds(seconds), text);
        }
        assert_eq!(human_rate(100_000_000), "100 Mbit/s");
        assert_eq!(human_rate(2_500_000_000), "2.5 Gbit/s");
        assert_eq!(tail("/images/vm-web-01.raw", 12), "~-web-01.raw");
        assert_eq!(tail("vm.raw", 12), "vm.raw");
    }

    #[test]
    fn the_wire_is_as_the_model_says() {
        let model = WireModel::BLOCKFERRY;
        let tally = Tally { compressed_bytes: 1_000_000, unique_blocks: 100, ..Tally::default() };
        let sent = 1_000_000 + 100 * 48 + 3200u64;
        assert_eq!(model.wire_bytes(&tally, 3200), (sent * 1480).div_ceil(1410));
        let seconds = model.seconds(12_500_000, Link { bits_per_s: 100_000_000, rtt_ms: 40.0 });
        assert!((seconds - 1.16).abs() < 1e-9, "{seconds}");
    }
}
