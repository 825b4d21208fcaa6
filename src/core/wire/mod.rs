//! The wire between two sites: every frame's layout in one place. Pure: must not know QUIC, files or volumes.
//!
//! Control frames travel in order, one stream each way; data messages have a stream each and arrive in any order. All
//! integers are little-endian and of fixed width. `docs/wire.md` has the same tables for people.
//!
//! ```text
//! destination                                  source
//!     | -- Hello{versions, site, last, next} ----> |     version offer
//!     | <------------- Welcome{version, site} ---- |     and choice, or Unwelcome{code, why}
//!     | -- Open{volume} -------------------------> |
//!     | <-- Opened{handle, geometry, epoch} ------ |
//!     | -- TakeOver{epoch+1, volume} ------------> |     from here on the source refuses writes
//!     | <-------------------- Done{epoch+1} ------ |
//!     | -- Roots, Page, Wants, Promote, Forget --> |
//!     | <== Roots, Page, Block, Failed =========== |     data messages, by class
//!     | -- Completed{epoch+1, volume} -----------> |
//!     | <-------------------- Done{epoch+1} ------ |
//!     | -- Close{handle} ------------------------> |
//! ```

mod codec;
mod control;
mod data;

pub use codec::WireError;
pub use control::{Control, MAX_WANTS_PER_FRAME, Want};
pub use data::{Data, MAX_ROOTS_PER_MESSAGE, RootEntry};

/// The first bytes of a Hello: what a peer that speaks something else will not say.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BFRY");

/// Protocol versions, each with the reason for its existence.
///
/// | version | why |
/// |---|---|
/// | 1 | the first: whole blocks, inline zstd frames; never released, and not spoken any more |
/// | 2 | questions of ownership name the volume and carry flags; instance nonces; Close |
pub const VERSIONS: std::ops::RangeInclusive<u16> = 2..=2;

/// The newest version that both speak, if there is one.
pub fn choose_version(offered_min: u16, offered_max: u16) -> Option<u16> {
    let newest = offered_max.min(*VERSIONS.end());
    (newest >= offered_min && newest >= *VERSIONS.start()).then_some(newest)
}

/// Why a peer says no. The number is what crosses the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Refusal {
    /// No common protocol version.
    Version = 1,
    /// There is no such volume, or this peer was not granted it: a peer cannot tell the two apart.
    UnknownVolume = 2,
    /// The volume belongs to another site, or is being relocated to one.
    NotOwner = 3,
    /// The image is not the one that was hashed: somebody wrote it behind our back.
    ImageChanged = 4,
    /// The image could not be read.
    ReadFailed = 5,
    /// A request that makes no sense: an index behind the end, an unknown handle.
    BadRequest = 6,
    /// The site is shutting down.
    ShuttingDown = 7,
    /// Guests or clients still use the volume in a way that forbids what was asked.
    Busy = 8,
    /// The site could not write its own journal.
    Internal = 9,
    /// Another instance with this identity has been here since: one of the two is a copy of the other.
    Clone = 10,
    /// Clients are connected at the source, and it was not told to take the volume although they are.
    InUse = 11,
    /// A person took the volume back; the epoch says since when.
    Reclaimed = 12,
    /// The question was withdrawn by a later one.
    Withdrawn = 13,
}

impl Refusal {
    /// All of them, by number.
    pub const ALL: [Refusal; 13] = {
        use Refusal::*;
        [
            Version,
            UnknownVolume,
            NotOwner,
            ImageChanged,
            ReadFailed,
            BadRequest,
            ShuttingDown,
            Busy,
            Internal,
            Clone,
            InUse,
            Reclaimed,
            Withdrawn,
        ]
    };

    /// The refusal with this number.
    pub fn from_wire(number: u16) -> Option<Refusal> {
        Refusal::ALL.into_iter().find(|refusal| *refusal as u16 == number)
    }

    /// Whether asking again later, without anybody doing anything, may succeed.
    pub fn is_transient(self) -> bool {
        matches!(self, Refusal::ReadFailed | Refusal::ShuttingDown | Refusal::Busy | Refusal::Internal)
    }
}

#[cfg(test)]
mod tests;
