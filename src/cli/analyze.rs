//! `analyze`: what dedup would save, without a daemon.
//! Must not know how it is worked out.

use std::cell::RefCell;
use std::time::Instant;

use crate::analyze::{AnalyzeError, AnalyzeOptions};
use crate::units::approx_bytes;

use super::args::AnalyzeArgs;
use super::console::{CliError, Console};
use super::follow::bar_of_bytes;

pub(super) fn analyze(args: &AnalyzeArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let defaults = AnalyzeOptions::default();
    let block_sizes = if args.block_sizes.is_empty() { defaults.block_sizes } else { args.block_sizes.clone() };
    let bar = console.watched.then(|| bar_of_bytes("analyze"));
    let lines = RefCell::new((Instant::now(), &mut *console.err));
    let pace = console.pace.line;
    let progress = |done: u64, total: u64| match &bar {
        Some(bar) => {
            bar.set_length(total);
            bar.set_position(done);
        }
        None => {
            let (last, err) = &mut *lines.borrow_mut();
            if last.elapsed() >= pace {
                *last = Instant::now();
                let percent = done.saturating_mul(100) / total.max(1);
                let _ = writeln!(err, "analyze  {percent}% of {}", approx_bytes(total));
            }
        }
    };
    let options = AnalyzeOptions {
        block_sizes,
        zstd_level: args.level,
        threads: args.threads,
        link_bits_per_s: args.link.map(|rate| rate.as_bits_per_s()),
        rtt_ms: args.rtt.map(|rtt| rtt.0),
        progress: Some(&progress),
    };
    let report = crate::analyze::analyze(&args.images, &args.prewarmed, &options);
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let report = report.map_err(|error| match error {
        AnalyzeError::Image(_) => CliError::Failed(error.to_string()),
        _ => CliError::Usage(error.to_string()),
    })?;
    if args.json { console.say_json(&report) } else { console.say(report.to_table().trim_end()) }
}
