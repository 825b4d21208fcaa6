//! Images made so that their savings are known to the byte.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A folder of images that are made of numbered blocks: 0 is zeros, every other number is its own random content.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        Lab { dir: tempfile::tempdir().expect("a folder") }
    }

    fn image(&self, name: &str, size_bytes: u64, pieces: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.dir.path().join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(size_bytes).expect("a size");
        for (offset, bytes) in pieces {
            file.write_all_at(bytes, *offset).expect("a write");
        }
        path
    }

    /// Blocks of 64 KiB.
    fn blocks(&self, name: &str, numbers: &[u64]) -> PathBuf {
        let pieces: Vec<_> = (0..).zip(numbers).map(|(i, number)| (i * 64 * KIB, content(*number, 64 * KIB))).collect();
        self.image(name, numbers.len() as u64 * 64 * KIB, &pieces)
    }
}

fn content(number: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    if number != 0 {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    }
    bytes
}

fn options(block_kib: &[u64]) -> AnalyzeOptions<'static> {
    let block_sizes = block_kib.iter().map(|kib| BlockSize::new(kib * KIB).expect("a block size")).collect();
    AnalyzeOptions { block_sizes, threads: 2, ..AnalyzeOptions::default() }
}

/// Zero, within, across, prewarmed, unique: in KiB.
fn steps(savings: &Savings) -> [u64; 5] {
    let s = savings;
    let bytes = [s.zero_bytes, s.within_bytes, s.across_bytes, s.prewarmed_bytes, s.unique_bytes];
    assert_eq!(bytes.iter().sum::<u64>(), s.total_bytes);
    bytes.map(|bytes| {
        assert_eq!(bytes % KIB, 0);
        bytes / KIB
    })
}

#[test]
fn every_step_is_counted_once() {
    let lab = Lab::new();
    let template = lab.blocks("template", &[1, 2, 3, 0]);
    let first = lab.blocks("first", &[0, 1, 2, 10, 10, 11, 0, 1]);
    let second = lab.blocks("second", &[10, 1, 3, 12, 12, 12, 0, 11]);
    let report = analyze(&[first.clone(), second], &[template], &options(&[64])).expect("a report");
    let [size] = &report.block_sizes[..] else { panic!("{report:?}") };
    // first: 1 and 2 are prewarmed, 10 and 11 unique, the second 10 and the second 1 are repeated.
    assert_eq!(steps(&size.images[0].savings), [128, 128, 0, 128, 128]);
    // second: 10, 11 and 1 are in the first (although 1 is prewarmed, too), 3 is prewarmed, 12 unique and twice repeated.
    assert_eq!(steps(&size.images[1].savings), [64, 128, 192, 64, 64]);
    assert_eq!(steps(&size.total), [192, 256, 192, 192, 192]);
    assert_eq!(size.total.unique_blocks, 3);
    // Random bytes do not shrink.
    assert_eq!(size.total.compressed_bytes, 192 * KIB);
    assert_eq!(size.images[0].path, first.to_string_lossy());
    // A page each, with 6 and 7 blocks that are not zero.
    assert_eq!(size.images[0].savings.manifest_bytes, 32 * (1 + 6));
    assert_eq!(size.images[1].savings.manifest_bytes, 32 * (1 + 7));
    assert_eq!(size.total.manifest_bytes, 32 * (2 + 13));
}

#[test]
fn all_block_sizes_come_from_one_pass() {
    let lab = Lab::new();
    // Two MiB: 64 KiB of 1, then zeros, then the same again one MiB later but for the last 16 KiB of the piece.
    let mut changed = content(1, 64 * KIB);
    changed[48 * KIB as usize..].copy_from_slice(&content(2, 16 * KIB));
    let image = lab.image("image", 2 * MIB, &[(0, content(1, 64 * KIB)), (MIB, changed)]);
    let report = analyze(&[image], &[], &options(&[1024, 64, 32, 16, 64])).expect("a report");
    let found: Vec<_> =
        report.block_sizes.iter().map(|size| (size.block_size_bytes / 1024, steps(&size.total))).collect();
    assert_eq!(
        found,
        [
            (16, [1920, 48, 0, 0, 80]),
            (32, [1920, 32, 0, 0, 96]),
            (64, [1920, 0, 0, 0, 128]),
            (1024, [0, 0, 0, 0, 2048])
        ]
    );
    assert_eq!(report.best_block_size_bytes, 16 << 10);
}

#[test]
fn a_size_that_is_no_multiple_of_the_block_is_counted_exactly() {
    let lab = Lab::new();
    let size = 3 * MIB + 64 * KIB + 20 * KIB;
    let tail = (3 * MIB + 64 * KIB, content(7, 20 * KIB));
    let first = lab.image("first", size, &[(0, content(1, 64 * KIB)), tail.clone()]);
    // The same short block at the end; a whole block that begins with it is another.
    let second = lab.image("second", size, &[tail, (64 * KIB, content(7, 20 * KIB))]);
    let report = analyze(&[first, second], &[], &options(&[64, 256])).expect("a report");
    let of_64 = &report.block_sizes[0];
    assert_eq!(steps(&of_64.images[0].savings), [3 * 1024, 0, 0, 0, 84]);
    assert_eq!(steps(&of_64.images[1].savings), [3 * 1024, 0, 20, 0, 64]);
    let of_256 = &report.block_sizes[1];
    // The last block has 84 KiB: 64 of zeros and the tail.
    assert_eq!(steps(&of_256.images[0].savings), [3 * 1024 - 256, 0, 0, 0, 256 + 84]);
    assert_eq!(steps(&of_256.images[1].savings), [3 * 1024 - 256, 0, 84, 0, 256]);
}

#[test]
fn the_same_image_twice_costs_nothing_the_second_time() {
    let lab = Lab::new();
    let image = lab.blocks("image", &[1, 2, 0, 3]);
    let report = analyze(&[image.clone(), image.clone()], &[], &options(&[16, 64])).expect("a report");
    for size in &report.block_sizes {
        assert_eq!(steps(&size.images[0].savings), [64, 0, 0, 0, 192]);
        let again = &size.images[1].savings;
        assert_eq!(steps(again), [64, 0, 192, 0, 0]);
        // One entry in the manifest's root.
        assert_eq!((again.compressed_bytes, again.manifest_bytes), (0, 32));
    }
    let report =
        analyze(std::slice::from_ref(&image), std::slice::from_ref(&image), &options(&[64])).expect("a report");
    let savings = &report.block_sizes[0].total;
    assert_eq!(steps(savings), [64, 0, 0, 192, 0]);
    assert_eq!(savings.manifest_bytes, 32 * (1 + 3), "prewarming brings no manifest");
}

#[test]
fn what_shrinks_is_counted_as_zstd_leaves_it() {
    let lab = Lab::new();
    let text = b"blockferry ".repeat(6000)[..65536].to_vec();
    let frame = crate::core::frame::Frame::encode(&text.clone().into(), 3);
    let image = lab.image("image", 256 * KIB, &[(0, text.clone()), (128 * KIB, text)]);
    let report = analyze(&[image], &[], &options(&[64])).expect("a report");
    let savings = &report.block_sizes[0].total;
    assert_eq!(steps(savings), [128, 64, 0, 0, 64]);
    assert_eq!(savings.compressed_bytes, frame.payload.len() as u64);
    assert!(savings.compressed_bytes < 1000);
}

#[test]
fn a_huge_hole_is_not_read() {
    let lab = Lab::new();
    let size = 1 << 40;
    let image = lab.image("image", size, &[(size / 2 + 4096, content(1, 4 * KIB))]);
    let steps_done = RefCell::new(Vec::new());
    let note = |done, total| steps_done.borrow_mut().push((done, total));
    let report = analyze(&[image], &[], &AnalyzeOptions { progress: Some(&note), ..options(&[64]) }).expect("a report");
    let savings = &report.block_sizes[0].total;
    assert_eq!((savings.total_bytes, savings.unique_bytes), (size, 64 * KIB));
    // A hole, a chunk, a hole: had a hole been read, there would be a million steps.
    let steps_done = steps_done.into_inner();
    assert_eq!(steps_done, [(size / 2, size), (size / 2 + MIB, size), (size, size)]);
    // 2^14 entries in the root, and one page with one id.
    assert_eq!(savings.manifest_bytes, 32 * (16384 + 1));
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let lab = Lab::new();
    let numbers = |seed: u64| (0..200).map(|i| (i * seed * 7919) % 90).collect::<Vec<_>>();
    let images = [lab.blocks("a", &numbers(1)), lab.blocks("b", &numbers(2)), lab.blocks("c", &numbers(5))];
    let template = [lab.blocks("t", &numbers(3)[..50])];
    let with = |threads| {
        let options = AnalyzeOptions { threads, ..options(&[16, 64, 512]) };
        analyze(&images, &template, &options).expect("a report")
    };
    let report = with(1);
    assert!(report.block_sizes[1].total.within_bytes > 0 && report.block_sizes[1].total.prewarmed_bytes > 0);
    assert_eq!(report, with(2));
    assert_eq!(report, with(5));
}

#[test]
fn what_cannot_be_analyzed_is_said_clearly() {
    let lab = Lab::new();
    let image = lab.blocks("image", &[1]);
    let missing = lab.dir.path().join("missing.raw");
    for (images, prewarmed) in [(vec![image.clone(), missing.clone()], vec![]), (vec![image.clone()], vec![missing])] {
        let error = analyze(&images, &prewarmed, &options(&[64])).expect_err("an image is missing");
        assert!(matches!(error, AnalyzeError::Image(ImageError::Missing { .. })), "{error:?}");
        assert!(error.to_string().contains("missing.raw"), "{error}");
    }
    let images = [image];
    assert!(matches!(analyze(&[], &[], &options(&[64])), Err(AnalyzeError::NoImages)));
    assert!(matches!(analyze(&images, &[], &options(&[])), Err(AnalyzeError::NoBlockSizes)));
    for (link_bits_per_s, rtt_ms) in [(Some(0), None), (Some(1), Some(-1.0)), (Some(1), Some(f64::NAN))] {
        let options = AnalyzeOptions { link_bits_per_s, rtt_ms, ..options(&[64]) };
        assert!(matches!(analyze(&images, &[], &options), Err(AnalyzeError::BadLink(_))));
    }
}

#[test]
fn the_table_fits_in_80_columns() {
    let lab = Lab::new();
    let first = lab.blocks("a-rather-long-name-of-an-image.raw", &[0, 1, 2, 10, 10, 11, 0, 1]);
    let second = lab.blocks("second", &[10, 1, 3, 12, 12, 12, 0, 11]);
    let options =
        AnalyzeOptions { link_bits_per_s: Some(100_000_000), rtt_ms: Some(40.0), ..AnalyzeOptions::default() };
    let table = analyze(&[first.clone(), second], &[first], &options).expect("a report").to_table();
    println!("{table}");
    for line in table.lines() {
        assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
    }
    for text in ["2 images, 1 MiB", "100 Mbit/s, round trip 40 ms", "*  64 KiB", "By image", "second", "12.50%"] {
        assert!(table.contains(text), "{text} is not in\n{table}");
    }
}

#[test]
fn the_names_in_json_are_stable() {
    let lab = Lab::new();
    let image = lab.blocks("image", &[0, 1]);
    let options = AnalyzeOptions { link_bits_per_s: Some(8_000), ..options(&[64]) };
    let report = analyze(&[image], &[], &options).expect("a report");
    let json = serde_json::to_value(&report).expect("JSON");
    let keys = |value: &serde_json::Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        keys(&json),
        ["best_block_size_bytes", "block_sizes", "images", "link", "model", "prewarmed", "zstd_level"]
    );
    let size = &json["block_sizes"][0];
    assert_eq!(keys(size), ["block_size_bytes", "images", "total"]);
    let names = [
        "across_bytes",
        "compressed_bytes",
        "manifest_bytes",
        "prewarmed_bytes",
        "seconds",
        "total_bytes",
        "unique_blocks",
        "unique_bytes",
        "wire_bytes",
        "within_bytes",
        "zero_bytes",
    ];
    assert_eq!(keys(&size["total"]), names);
    assert_eq!(size["images"][0]["zero_bytes"], 65536);
    assert_eq!(size["total"]["seconds"], size["total"]["wire_bytes"].as_f64().expect("a number") / 1000.0);
}
