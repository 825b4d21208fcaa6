//! A refusal in the API's words: what, which volume, and what to do. Must not know who asked.

use crate::control::{ApiError, ErrorKind};
use crate::core::ids::Name;
use crate::core::wire::Refusal;
use crate::fetch::FetchError;
use crate::handover::No;

/// What an operator is told of a machine's refusal.
pub(super) fn api_error(name: &Name, no: &No) -> ApiError {
    let kind = match no {
        No::Unknown => ErrorKind::NotFound,
        No::Journal(_) => ErrorKind::Internal,
        No::Written(_) | No::Needed(_) | No::Arriving(_) => ErrorKind::Refused,
        No::Expired | No::ShuttingDown | No::NoImage => ErrorKind::Unavailable,
        No::Failed(refusal, _) | No::Peer { refusal, .. } => kind_of(*refusal),
        _ => ErrorKind::Conflict,
    };
    let hint = match no {
        No::Unknown => "`blockferry volume list` shows what there is".into(),
        No::Peer { refusal: Refusal::InUse, .. } => No::InUse(0).hint(name),
        No::Peer { peer, .. } => format!("nothing has changed hands; see the log of {peer}"),
        _ => no.hint(name),
    };
    let message = match no {
        No::Unknown => format!("there is no volume {name} here"),
        _ => format!("volume {name}: {no}"),
    };
    ApiError::new(kind, message, hint)
}

/// What an operator is told when a peer does not open a volume.
pub(super) fn refused(name: &Name, peer: &Name, error: &FetchError) -> ApiError {
    let kind = match error {
        FetchError::Refused { refusal, .. } => kind_of(*refusal),
        FetchError::Inconsistent { .. } | FetchError::Contradiction { .. } => ErrorKind::Refused,
        FetchError::Gone | FetchError::UnknownPeer => ErrorKind::Internal,
    };
    ApiError::new(kind, format!("volume {name}: {error}"), format!("nothing was begun; see the log of {peer}"))
}

fn kind_of(refusal: Refusal) -> ErrorKind {
    match refusal {
        Refusal::UnknownVolume => ErrorKind::NotFound,
        Refusal::NotOwner | Refusal::Busy | Refusal::InUse => ErrorKind::Conflict,
        Refusal::ShuttingDown => ErrorKind::Unavailable,
        Refusal::Internal => ErrorKind::Internal,
        _ => ErrorKind::Refused,
    }
}
