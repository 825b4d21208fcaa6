//! What an export says about its extents, made into what a reply may say. Pure.

use super::limits::MAX_EXTENTS;

/// A run of bytes with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// The flags of its metadata context.
    pub flags: u32,
}

impl Extent {
    /// An extent of `len_bytes` with `flags`.
    pub fn new(len_bytes: u64, flags: u32) -> Extent {
        Extent { len_bytes, flags }
    }
}

/// Makes `extents`, consecutive from `offset` on, into a valid answer to a BLOCK_STATUS of `len_bytes` (not 0) on an
/// export of `size_bytes`, in which a descriptor can hold at most `max_len_bytes`.
///
/// Whatever the export said, the result has at least one extent ("the server MUST return at least one status
/// descriptor"), none of length 0 ("MUST be nonzero"), neighbours differ ("SHOULD use different status values between
/// consecutive descriptors"), it ends within the export, and "the sum of the length fields of the first N-1 extents
/// (if any) MUST be less than the requested length". With `one`, it is a single extent and "that descriptor MUST NOT
/// exceed the length of the original request". Where the export said nothing, the status is 0: "a server MAY always
/// safely report a status of 0 for any block".
pub fn fit_extents(
    extents: &[Extent],
    offset: u64,
    len_bytes: u64,
    size_bytes: u64,
    max_len_bytes: u64,
    one: bool,
) -> Vec<Extent> {
    let to_end = size_bytes.saturating_sub(offset).max(1);
    let len_bytes = len_bytes.min(to_end);
    let mut fitted: Vec<Extent> = Vec::with_capacity(extents.len().min(if one { 1 } else { MAX_EXTENTS }));
    let mut covered = 0u64;
    for extent in extents {
        let usable = extent.len_bytes.min(to_end - covered);
        if usable == 0 {
            continue;
        }
        if let Some(last) = fitted.last_mut()
            && last.flags == extent.flags
        {
            last.len_bytes += usable;
        } else if covered >= len_bytes || fitted.len() == if one { 1 } else { MAX_EXTENTS } {
            break;
        } else {
            fitted.push(Extent { len_bytes: usable, flags: extent.flags });
        }
        covered += usable;
    }
    if fitted.is_empty() {
        fitted.push(Extent { len_bytes, flags: 0 });
    }
    if one {
        fitted[0].len_bytes = fitted[0].len_bytes.min(len_bytes);
    }
    // An extent too long for its field ends the answer: the client asks again from there.
    if let Some(at) = fitted.iter().position(|extent| extent.len_bytes > max_len_bytes) {
        fitted.truncate(at + 1);
        fitted[at].len_bytes = max_len_bytes;
    }
    fitted
}
