//! Reports for people, 80 columns wide: a site, its volumes, one volume, a store.
//! Must not know where the reports come from; pure text.

mod ownership;

use std::fmt::Write;

use crate::control::{LinkState, PeerStatus, Phase, PrewarmStatus, Role, SiteStatus, StoreStats, VolumeStatus};
use crate::units::{approx_bytes, approx_rate, approx_seconds};

pub(super) use self::ownership::{cancelled, reclaimed};

/// Columns of a report.
const WIDTH: usize = 80;

/// The whole site.
pub(super) fn site(status: &SiteStatus) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "site {}, up {}, version {}\nfingerprint\n  {}",
        status.site,
        approx_seconds(status.uptime_s),
        status.version,
        status.fingerprint
    );
    for peer in &status.peers {
        let _ = writeln!(text, "peer {}: {}", peer.name, peer_line(peer));
    }
    for line in status.owed.iter().map(ownership::owed_of_volume).chain(status.left.iter().map(ownership::left)) {
        let _ = writeln!(text, "{line}");
    }
    text = wrapped(&text, 2);
    text.push('\n');
    text + &volumes(&status.volumes)
}

/// A table of volumes.
pub(super) fn volumes(volumes: &[VolumeStatus]) -> String {
    if volumes.is_empty() {
        return "no volumes yet: `blockferry volume add` serves an image, `blockferry relocate` brings one here\n"
            .into();
    }
    let longest = volumes.iter().map(|volume| volume.name.as_str().len()).max().unwrap_or(0);
    let width = longest.clamp(6, 20);
    let mut text = format!(
        "{:<width$} {:<10} {:>4} {:>8} {:>8} {:>8} {:>8} {:>7}\n",
        "VOLUME", "PHASE", "DONE", "SIZE", "ZERO", "STORE", "WIRE", "LEFT"
    );
    for volume in volumes {
        let moved = &volume.moved;
        let came = |bytes: u64| match volume.role {
            Role::Source => "-".to_owned(),
            Role::Destination => approx_bytes(bytes),
        };
        let _ = writeln!(
            text,
            "{:<width$} {:<10} {:>4} {:>8} {:>8} {:>8} {:>8} {:>7}",
            shortened(volume.name.as_str(), width),
            phase_word(volume.phase),
            format!("{}%", percent_done(volume)),
            approx_bytes(volume.size_bytes),
            came(moved.zero_bytes),
            came(moved.store_bytes + moved.joined_bytes),
            came(moved.wire_bytes),
            volume.eta_s.map_or("-".to_owned(), approx_seconds),
        );
        if !volume.phase_reason.is_empty() {
            let _ = writeln!(text, "{:<width$} {}", "", volume.phase_reason);
        }
    }
    wrapped(&text, width + 1)
}

/// All about one volume.
pub(super) fn volume(volume: &VolumeStatus) -> String {
    let mut text = format!("{}: {}", volume.name, phase_word(volume.phase));
    if !volume.phase_reason.is_empty() {
        let _ = write!(text, " ({})", volume.phase_reason);
    }
    let _ = write!(text, ", {}% of {} here", percent_done(volume), approx_bytes(volume.size_bytes));
    if let Some(eta_s) = volume.eta_s {
        let _ = write!(text, ", {} left", approx_seconds(eta_s));
    }
    text.push('\n');
    let mut line = |label: &str, value: String| {
        let _ = writeln!(text, "  {label:<8} {value}");
    };

    let end = match (volume.role, &volume.peer) {
        (Role::Source, Some(peer)) => format!("this site is the source for {peer}"),
        (Role::Source, None) => "this site is the source".to_owned(),
        (Role::Destination, Some(peer)) => format!("this site is the destination, from {peer}"),
        (Role::Destination, None) => "this site is the destination".to_owned(),
    };
    line("owner", format!("{}, epoch {}; {end}", volume.owner, volume.epoch));
    for owed in &volume.owed {
        line("", ownership::owed(owed));
    }
    line("image", volume.image.display().to_string());
    if let Some(why) = &volume.read_only {
        line("", format!("guests may only read it: {why}"));
    }
    let blocks = &volume.blocks;
    line("blocks", format!("{} of {}", blocks.total, approx_bytes(u64::from(volume.block_size_bytes))));
    let counts = format!("{} absent, {} present, {} written", blocks.absent, blocks.present, blocks.written);
    let partly = if blocks.partial == 0 { String::new() } else { format!(", {} written in part", blocks.partial) };
    line("", counts + &partly);
    if volume.guest_written_bytes > 0 {
        line("", format!("{} that only this site has, written by guests", approx_bytes(volume.guest_written_bytes)));
    }
    if let Some(hashed) = volume.hashed_blocks {
        line("hashed", format!("{hashed} of {}", blocks.total));
    }
    let reads = &volume.reads;
    let origins = [
        (reads.resident_bytes, "resident"),
        (reads.zero_bytes, "zero"),
        (reads.store_bytes, "store"),
        (reads.wire_bytes, "wire"),
    ];
    line("reads", list_of_bytes(&origins));
    if reads.partial_bytes > 0 {
        line("", format!("{} from blocks written in part", approx_bytes(reads.partial_bytes)));
    }
    if volume.role == Role::Destination {
        let moved = &volume.moved;
        let origins = [
            (moved.zero_bytes, "zero"),
            (moved.store_bytes, "store"),
            (moved.joined_bytes, "shared"),
            (moved.wire_raw_bytes, "by wire"),
        ];
        line("moved", list_of_bytes(&origins));
        let classes = &moved.wire_by_class;
        let by_class =
            [(classes.demand_bytes, "demand"), (classes.readahead_bytes, "readahead"), (classes.bulk_bytes, "bulk")];
        let saved = moved.wire_raw_bytes.saturating_sub(moved.wire_bytes);
        line("wire", format!("{} sent: {}", approx_bytes(moved.wire_bytes), list_of_bytes(&by_class)));
        line("", format!("{} saved by compression", approx_bytes(saved)));
    }
    let latency = &volume.demand_latency_ms;
    if latency.count > 0 {
        let times = format!("p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms", latency.p50, latency.p99, latency.max);
        line("demand", format!("{} reads waited: {times}", latency.count));
    }
    if let Some(bulk) = &volume.bulk {
        let paused = if bulk.paused { "paused" } else { "running" };
        let limit = match bulk.limit_bytes_per_s {
            Some(limit) => format!("at most {}", approx_rate(limit as f64)),
            None => "no limit".to_owned(),
        };
        line("bulk", format!("{paused}, {}, {limit}", approx_rate(bulk.rate_bytes_per_s)));
    }
    if let Some(link) = &volume.link {
        let mut facts = vec![link_word(link.state).to_owned()];
        facts.extend(link.rtt_ms.map(|rtt| format!("round trip {rtt:.1} ms")));
        facts.extend(link.cwnd_bytes.map(|window| format!("window {}", approx_bytes(window))));
        line("link", facts.join(", "));
    }
    line("clients", volume.nbd_clients.to_string());
    wrapped(&text, 11)
}

/// A line about a relocation under way: rate, share by origin, time left.
pub(super) fn progress(volume: &VolumeStatus) -> String {
    let mut parts = Vec::new();
    if volume.phase != Phase::Copying {
        parts.push(phase_word(volume.phase).to_owned());
    }
    if let Some(bulk) = &volume.bulk
        && volume.phase == Phase::Copying
    {
        parts.push(approx_rate(bulk.rate_bytes_per_s));
    }
    parts.push(shares(volume));
    parts.extend(volume.eta_s.map(|eta_s| format!("{} left", approx_seconds(eta_s))));
    if !volume.phase_reason.is_empty() {
        parts.push(volume.phase_reason.clone());
    }
    parts.retain(|part| !part.is_empty());
    parts.join("  ")
}

/// Where what has arrived came from: `zero 40% store 33% wire 27%`.
pub(super) fn shares(volume: &VolumeStatus) -> String {
    let moved = &volume.moved;
    let all = moved.arrived_bytes();
    if all == 0 {
        return String::new();
    }
    let percent = |bytes: u64| (u128::from(bytes) * 100 + u128::from(all) / 2) / u128::from(all);
    let store = percent(moved.store_bytes + moved.joined_bytes);
    format!("zero {}% store {store}% wire {}%", percent(moved.zero_bytes), percent(moved.wire_raw_bytes))
}

/// What came of a relocation, in one line.
pub(super) fn arrived(volume: &VolumeStatus) -> String {
    let size = approx_bytes(volume.size_bytes);
    let sent = approx_bytes(volume.moved.wire_bytes);
    let shares = shares(volume);
    let shares = if shares.is_empty() { shares } else { format!(": {shares}") };
    format!("{}: {size} here{shares}; {sent} over the wire", volume.name)
}

/// What came of a prewarm, in one line.
pub(super) fn prewarmed(status: &PrewarmStatus) -> String {
    let images = status.images.len();
    let plural = if images == 1 { "" } else { "s" };
    format!(
        "{images} image{plural}, {}: {} blocks new, {} known, {} zero",
        approx_bytes(status.bytes_done),
        status.blocks_new,
        status.blocks_known,
        status.blocks_zero
    )
}

/// The content store.
pub(super) fn store(stats: &StoreStats) -> String {
    let percent = |part: u64, whole: u64| {
        (u128::from(part) * 100).checked_div(u128::from(whole)).map_or("-".to_owned(), |percent| format!("{percent}%"))
    };
    let StoreStats { stored_bytes, capacity_bytes, hits, puts, put_raw_bytes, put_stored_bytes, .. } = *stats;
    let lookups = hits + stats.misses;
    let (stored, capacity) = (approx_bytes(stored_bytes), approx_bytes(capacity_bytes));
    let (raw, frames) = (approx_bytes(put_raw_bytes), approx_bytes(put_stored_bytes));
    [
        ("size", format!("{stored} of {capacity} ({})", percent(stored_bytes, capacity_bytes))),
        ("blocks", format!("about {}", stats.blocks_estimate)),
        ("memory", approx_bytes(stats.memory_bytes)),
        ("hit rate", format!("{} of {lookups} look-ups", percent(hits, lookups))),
        ("hits", format!("{hits} blocks, {}", approx_bytes(stats.hit_raw_bytes))),
        (
            "puts",
            format!("{puts} blocks, {raw}, compressed to {frames} ({})", percent(put_stored_bytes, put_raw_bytes)),
        ),
        ("renewed", format!("{} blocks", stats.renewed)),
        ("damaged", format!("{} blocks found and dropped", stats.corrupt_dropped)),
    ]
    .iter()
    .fold(String::new(), |mut text, (label, value)| {
        let _ = writeln!(text, "{label:<8}  {value}");
        text
    })
}

/// Whole per cent of the blocks that are here; 100 only when all of them are.
pub(super) fn percent_done(volume: &VolumeStatus) -> u64 {
    let blocks = &volume.blocks;
    let here = u128::from(blocks.total.saturating_sub(blocks.absent));
    (here * 100).checked_div(u128::from(blocks.total)).map_or(100, |percent| percent as u64)
}

/// A phase as the tables call it.
pub(super) fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::ReleasedFromSource => "done",
        // The column has ten places.
        Phase::GivingBack => "returning",
        other => other.as_str(),
    }
}

/// `text` in at most `width` columns.
pub(super) fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// `text` with every line broken at spaces that is too long, and gone on with behind `indent` spaces; not within the
/// first `indent` columns, where labels are. A word that does not fit stays whole, so that paths can be copied.
fn wrapped(text: &str, indent: usize) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let (mut rest, mut margin) = (line, 0);
        while let Some((most, _)) = rest.char_indices().nth(WIDTH - margin) {
            let label = indent - margin;
            let spaces = || rest.match_indices(' ').map(|(at, _)| at).filter(|at| *at >= label.max(1));
            let Some(at) = spaces().take_while(|at| *at <= most).last().or_else(|| spaces().next()) else { break };
            let _ = writeln!(out, "{:margin$}{}", "", rest[..at].trim_end());
            rest = rest[at..].trim_start();
            margin = indent;
        }
        let _ = writeln!(out, "{:margin$}{rest}", "");
    }
    out
}

fn peer_line(peer: &PeerStatus) -> String {
    let mut text = link_word(peer.state).to_owned();
    if let Some(rtt_ms) = peer.rtt_ms {
        let _ = write!(text, ", round trip {rtt_ms:.1} ms");
    }
    if let Some(error) = peer.last_error.as_ref().filter(|_| peer.state != LinkState::Connected) {
        let _ = write!(text, ", {error}");
    }
    text
}

fn link_word(state: LinkState) -> &'static str {
    match state {
        LinkState::Idle => "idle",
        LinkState::Connecting => "connecting",
        LinkState::Connected => "connected",
        LinkState::Down => "down",
    }
}

/// `3.0 MiB wire, 1.0 MiB zero`: what there is, in the given order.
fn list_of_bytes(origins: &[(u64, &str)]) -> String {
    let there: Vec<_> = origins
        .iter()
        .filter(|(bytes, _)| *bytes > 0)
        .map(|(bytes, what)| format!("{} {what}", approx_bytes(*bytes)))
        .collect();
    if there.is_empty() { "none".to_owned() } else { there.join(", ") }
}
