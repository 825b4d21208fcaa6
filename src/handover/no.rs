//! Why a question or a verb is refused: one variant for each reason, in words for people and as a number for peers.
//! Must not know who reads it.

use std::fmt;

use crate::core::ids::Name;
use crate::core::wire::Refusal;

use super::Epoch;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum No {
    /// The peer may not have it, or there is no such volume: a peer cannot tell the two apart.
    Unknown,
    /// Another site owns it.
    OwnedBy(Name),
    /// The epoch that was asked for does not follow the one that holds.
    Epoch {
        /// Asked for.
        asked: Epoch,
        /// That holds.
        holds: Epoch,
    },
    /// It is still on its way to this site.
    Arriving(Name),
    /// Its image cannot be opened.
    NoImage,
    /// Clients are connected.
    InUse(u32),
    /// It is being handed over.
    HandingOver(Name),
    /// It is being given back.
    GivingBack(Name),
    /// It is being removed.
    Removing,
    /// An image is being made ready to be served under the name.
    Preparing,
    /// A later question withdrew this one.
    Withdrawn,
    /// The time for the hand-over is over.
    Expired,
    /// The state database cannot be written.
    Journal(String),
    /// A person decided otherwise.
    Reclaimed {
        /// At which site.
        by: Name,
        /// Since when.
        epoch: Epoch,
    },
    /// Another instance with the same identity is about.
    Clone,
    /// Guests wrote here: at least so many bytes.
    Written(u64),
    /// It did not come here from a peer that could take it back.
    NoWayBack,
    /// A peer still needs its blocks.
    Needed(Name),
    /// The person saw another epoch.
    NotThisEpoch(Epoch),
    /// It is being reclaimed.
    Reclaiming,
    /// There is nothing to reclaim.
    NothingToReclaim,
    /// The peer refused, in its own words.
    Peer {
        /// Who.
        peer: Name,
        /// As a number.
        refusal: Refusal,
        /// In words.
        why: String,
    },
    /// Work failed, in the words of whoever did it.
    Failed(Refusal, String),
    /// The site ends.
    ShuttingDown,
}

impl No {
    /// What a peer is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            No::Unknown => Refusal::UnknownVolume,
            No::OwnedBy(_) | No::Epoch { .. } => Refusal::NotOwner,
            No::InUse(_) => Refusal::InUse,
            No::Withdrawn | No::Expired => Refusal::Withdrawn,
            No::Reclaimed { .. } => Refusal::Reclaimed,
            No::Clone => Refusal::Clone,
            No::Journal(_) => Refusal::Internal,
            No::Failed(refusal, _) | No::Peer { refusal, .. } => *refusal,
            No::ShuttingDown => Refusal::ShuttingDown,
            No::Arriving(_)
            | No::NoImage
            | No::Preparing
            | No::HandingOver(_)
            | No::GivingBack(_)
            | No::Removing
            | No::Reclaiming => Refusal::Busy,
            No::Written(_) | No::NoWayBack | No::Needed(_) | No::NotThisEpoch(_) | No::NothingToReclaim => {
                Refusal::BadRequest
            }
        }
    }

    /// What to do about it, for an operator; may be empty. `volume` is its name.
    pub fn hint(&self, volume: &Name) -> String {
        match self {
            No::InUse(_) => "disconnect them, or say --take: their writes fail from then on".into(),
            No::Written(_) => format!(
                "let it complete, `blockferry volume remove {volume}` at its source and relocate it back there, or throw the \
                 writes away: `blockferry cancel {volume} --discard-writes`"
            ),
            No::Needed(to) => format!(
                "wait until {to} says that it is complete, cancel the relocation there, or, if {to} is lost for good, \
                 `blockferry reclaim {volume} --epoch N`"
            ),
            No::Arriving(_) => format!("wait until it is complete, or run `blockferry cancel {volume}`"),
            No::NotThisEpoch(_) => format!("look at `blockferry status {volume}` again before you decide"),
            No::GivingBack(from) => format!(
                "it ends when {from} answers; if {from} is lost for good, `blockferry reclaim {volume} --epoch N`"
            ),
            No::HandingOver(_) | No::Removing | No::Preparing | No::Reclaiming => {
                format!("try again in a moment; see `blockferry status {volume}`")
            }
            No::Journal(_) => "make the state directory writable; it is tried again by itself".into(),
            No::Withdrawn | No::Expired => "nothing has changed hands; try again".into(),
            No::NoWayBack | No::NothingToReclaim => format!("see `blockferry status {volume}`"),
            No::Reclaimed { .. } => {
                format!("`blockferry volume remove {volume}` lets go of what is left here, if anything is")
            }
            _ => String::new(),
        }
    }
}

impl fmt::Display for No {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            No::Unknown => write!(f, "there is no such volume for this peer"),
            No::OwnedBy(site) => write!(f, "it was handed over to {site}"),
            No::Epoch { asked, holds } => write!(f, "it is at epoch {holds}, {asked} cannot follow it"),
            No::Arriving(from) => write!(f, "it is still arriving from {from}"),
            No::NoImage => write!(f, "its image cannot be opened"),
            No::InUse(clients) => write!(f, "it is in use: NBD clients connected to it: {clients}"),
            No::HandingOver(to) => write!(f, "it is being handed over to {to}"),
            No::GivingBack(from) => write!(f, "it is being given back to {from}"),
            No::Removing => write!(f, "it is being removed"),
            No::Preparing => write!(f, "it is being made ready to be served"),
            No::Reclaiming => write!(f, "it is being reclaimed"),
            No::Withdrawn => write!(f, "the hand-over was withdrawn"),
            No::Expired => write!(f, "the hand-over took longer than it may, and was withdrawn"),
            No::Journal(why) => write!(f, "the state database cannot be written: {why}"),
            No::Reclaimed { by, epoch } => write!(f, "it was reclaimed at {by}, at epoch {epoch}"),
            No::Clone => write!(f, "another instance with this site's identity is about"),
            No::Written(bytes) => {
                write!(f, "guests wrote to it since it came here, {bytes} bytes at least: giving it up would lose them")
            }
            No::NoWayBack => write!(f, "it is not being relocated to this site, and cannot be given back"),
            No::Needed(to) => write!(f, "{to} has not fetched all of its blocks yet"),
            No::NotThisEpoch(holds) => write!(f, "it is at epoch {holds} now"),
            No::NothingToReclaim => write!(f, "this site owns it already"),
            No::Peer { peer, why, .. } => write!(f, "peer {peer}: {why}"),
            No::Failed(_, why) => f.write_str(why),
            No::ShuttingDown => write!(f, "the site is shutting down"),
        }
    }
}

impl std::error::Error for No {}
