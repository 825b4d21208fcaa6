//! Runs one checked request on an export. Must not know sockets or the form of replies.

use bytes::Bytes;

use super::{Export, ReadData};
use crate::core::nbd::{Command, ContextIndex, Extent, MAX_EXTENTS, NbdErrno, Request, fit_extents};

/// What a request without payload counts for in the budget: its future, and the reply of a BLOCK_STATUS.
pub(super) const SMALL_REQUEST_BYTES: u64 = 4 << 10;

/// A request that has been run.
pub(super) struct Finished {
    pub(super) request: Request,
    /// What it took from the budget.
    pub(super) taken_bytes: u64,
    pub(super) outcome: Outcome,
}

/// How it went.
pub(super) enum Outcome {
    /// A READ.
    Data(Result<ReadData, NbdErrno>),
    /// What is answered without data.
    Done(Result<(), NbdErrno>),
    /// A BLOCK_STATUS: the extents of each context, made to fit.
    Status(Result<Vec<(ContextIndex, Vec<Extent>)>, NbdErrno>),
    /// One piece of a READ or a WRITE that is run in pieces.
    Part(Result<Option<ReadData>, NbdErrno>),
}

/// What a BLOCK_STATUS needs beyond its range.
pub(super) struct StatusQuery {
    pub(super) contexts: Vec<ContextIndex>,
    pub(super) size_bytes: u64,
    pub(super) max_extent_bytes: u64,
}

/// Runs a request, whose payload is complete.
pub(super) async fn execute(
    export: &dyn Export,
    command: Command,
    payload: Option<Bytes>,
    query: Option<StatusQuery>,
) -> Outcome {
    match command {
        Command::Read { offset, len_bytes, .. } => Outcome::Data(export.read(offset, len_bytes).await),
        Command::Write { offset, fua, .. } => {
            Outcome::Done(export.write(offset, payload.unwrap_or_default(), fua).await)
        }
        Command::Flush => Outcome::Done(export.flush().await),
        Command::Trim { offset, len_bytes, fua } => Outcome::Done(export.trim(offset, len_bytes, fua).await),
        Command::Cache { offset, len_bytes } => Outcome::Done(export.cache(offset, len_bytes).await),
        Command::WriteZeroes { offset, len_bytes, flags, fua } => {
            Outcome::Done(export.write_zeroes(offset, len_bytes, flags, fua).await)
        }
        Command::BlockStatus { offset, len_bytes, one } => {
            let query = query.unwrap_or(StatusQuery { contexts: Vec::new(), size_bytes: 0, max_extent_bytes: 1 });
            Outcome::Status(block_status(export, offset, len_bytes, one, query).await)
        }
        // Neither is ever started.
        Command::Disconnect | Command::BlockStatusOf { .. } => Outcome::Done(Err(NbdErrno::Inval)),
    }
}

async fn block_status(
    export: &dyn Export,
    offset: u64,
    len_bytes: u64,
    one: bool,
    query: StatusQuery,
) -> Result<Vec<(ContextIndex, Vec<Extent>)>, NbdErrno> {
    let mut answer = Vec::with_capacity(query.contexts.len());
    let max_extents = if one { 1 } else { MAX_EXTENTS };
    for context in query.contexts {
        let extents = export.extents(context, offset, len_bytes, max_extents).await?;
        let fitted = fit_extents(&extents, offset, len_bytes, query.size_bytes, query.max_extent_bytes, one);
        answer.push((context, fitted));
    }
    Ok(answer)
}

/// What a request takes from the budget.
pub(super) fn cost_bytes(command: &Command) -> u64 {
    match command {
        Command::Read { len_bytes, .. } | Command::Write { len_bytes, .. } => u64::from(*len_bytes),
        _ => SMALL_REQUEST_BYTES,
    }
}
