//! The data of handshake options, taken apart. Pure; every length is the client's and is checked before it is used.

use super::limits::MAX_STRING_BYTES;

/// Why the data of an option is invalid, for the message of `NBD_REP_ERR_INVALID`.
pub(super) type Invalid = &'static str;

/// INFO and GO: "32 bits, length of name (unsigned); MUST be no larger than the option data length - 6; String: name of
/// the export; 16 bits, number of information requests; 16 bits x n - list of NBD_INFO information requests".
pub(super) fn parse_info(data: &[u8]) -> Result<(String, Vec<u16>), Invalid> {
    let mut rest = data;
    let name = parse_name(take_string(&mut rest)?)?;
    let count = usize::from(u16::from_be_bytes(*take_chunk(&mut rest)?));
    let (requests, odd) = rest.as_chunks::<2>();
    if requests.len() != count || !odd.is_empty() {
        return Err("the number of information requests does not fit the length of the option");
    }
    Ok((name, requests.iter().map(|request| u16::from_be_bytes(*request)).collect()))
}

/// LIST and SET_META_CONTEXT: "32 bits, length of export name. String, name of export [...]. 32 bits, number of queries.
/// Zero or more queries, each being: 32 bits, length of query. String, query [...]". A query that is no text can match nothing and
/// is left out, but counted.
pub(super) fn parse_meta(data: &[u8]) -> Result<(String, Queries), Invalid> {
    let mut rest = data;
    let name = parse_name(take_string(&mut rest)?)?;
    let count = u32::from_be_bytes(*take_chunk(&mut rest)?);
    let mut texts = Vec::new();
    for _ in 0..count {
        // Each turn takes at least 4 bytes or fails: the count is not believed.
        let query = take_string(&mut rest)?;
        if query.len() > MAX_STRING_BYTES {
            return Err("a query of more than 4096 bytes");
        }
        if let Ok(text) = std::str::from_utf8(query) {
            texts.push(text.to_owned());
        }
    }
    if !rest.is_empty() {
        return Err("bytes after the last query");
    }
    Ok((name, if count == 0 { Queries::None } else { Queries::Some(texts) }))
}

/// What a client asks about metadata contexts.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Queries {
    /// "If zero queries are sent", which means all of them in a list, and none in a selection.
    None,
    /// These.
    Some(Vec<String>),
}

/// A name: "a sequence of UTF-8 code points, which is not NUL terminated, MUST NOT contain NUL characters, SHOULD be no
/// longer than 256 bytes and MUST be no longer than 4096 bytes".
pub(super) fn parse_name(bytes: &[u8]) -> Result<String, Invalid> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err("an export name of more than 4096 bytes");
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err("an export name that is not UTF-8, or contains a NUL"),
    }
}

fn take_string<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Invalid> {
    let length = u32::from_be_bytes(*take_chunk(rest)?);
    let length = usize::try_from(length).map_err(|_| "a length that is too large")?;
    let (string, tail) = rest.split_at_checked(length).ok_or("a string that is longer than the option")?;
    *rest = tail;
    Ok(string)
}

fn take_chunk<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], Invalid> {
    let (chunk, tail) = rest.split_first_chunk::<N>().ok_or("the option is too short")?;
    *rest = tail;
    Ok(chunk)
}
