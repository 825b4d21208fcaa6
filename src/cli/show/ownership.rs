//! Reports of ownership: what a cancelled or reclaimed volume has lost, what peers are yet to be told, what has left.
//! Must not know where the reports come from; pure text, not yet broken into lines of a width.

use crate::control::{CancelAnswer, Left, Owed, OwedOfVolume, ReclaimAnswer};
use crate::core::ids::Name;
use crate::units::approx_bytes;

/// What came of giving a relocation up. A daemon of an earlier version says nothing about it.
pub(in crate::cli) fn cancelled(name: &Name, answer: Option<&CancelAnswer>) -> String {
    let Some(CancelAnswer { discarded_bytes, owner }) = answer else {
        return format!("{name}: relocation given up\n");
    };
    let thrown_away = match discarded_bytes {
        0 => "nothing".to_owned(),
        bytes => format!("{} that its guest wrote here", exact_bytes(*bytes)),
    };
    super::wrapped(&format!("{name}: relocation given up; {owner} owns it now\n  thrown away: {thrown_away}\n"), 2)
}

/// What a reclaimed volume has lost, and who is fenced.
pub(in crate::cli) fn reclaimed(name: &Name, answer: &ReclaimAnswer) -> String {
    let ReclaimAnswer { epoch, is_owner, lost, lost_bytes, fenced } = answer;
    let mut lines = vec![match is_owner {
        true => format!("{name}: reclaimed; this site owns it now, epoch {epoch}"),
        false => format!("{name}: given up at epoch {epoch}; this site does not own it, and never did"),
    }];
    let mut line = |label: &str, value: &str| lines.push(format!("  {label:<8} {value}"));
    for sentence in lost {
        line("lost", sentence);
    }
    match (lost_bytes, lost.is_empty()) {
        (Some(0), true) => line("lost", "nothing"),
        (Some(bytes), _) => line("in all", &exact_bytes(*bytes)),
        (None, _) => line("in all", "nobody knows how much"),
    }
    match fenced {
        Some(peer) => line("fenced", &format!("{peer}: should it come back, it serves {name} no more and says why")),
        None => line("fenced", "nobody"),
    }
    super::wrapped(&(lines.join("\n") + "\n"), 11)
}

/// What a peer is yet to be told of a volume.
pub(super) fn owed(owed: &Owed) -> String {
    format!("{} is yet to be told: {} (since epoch {})", owed.peer, owed.what, owed.since_epoch)
}

/// The same, where it is not plain which volume is meant.
pub(super) fn owed_of_volume(owed: &OwedOfVolume) -> String {
    let OwedOfVolume { volume, peer, what, since_epoch } = owed;
    format!("owed {volume}: {peer} is yet to be told: {what} (since epoch {since_epoch})")
}

/// A name that left.
pub(super) fn left(left: &Left) -> String {
    format!("left {}: to {} in epoch {}", left.name, left.peer, left.epoch)
}

/// `196608 bytes (192 KiB)`: a loss is told exactly.
fn exact_bytes(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{bytes} bytes ({})", approx_bytes(bytes)) }
}
