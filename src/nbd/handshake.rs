//! Drives [`Negotiation`] over a socket. Must not know what the protocol says: that is the machine's.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;

use super::socket::Socket;
use super::{Export, Exports, NbdTls, OpenError};
use crate::core::nbd::{CloseReason, ExportFacts, Negotiation, Refusal, Session, Step};

/// Input that is read at once.
const INPUT_BYTES: usize = 8 << 10;

/// Output is sent at the latest when this much waits.
const FLUSH_BYTES: usize = 64 << 10;

/// How a handshake ended.
pub(super) enum Shaken {
    /// Transmission begins; `input` is what came behind the handshake.
    Enter { session: Session, name: String, export: Arc<dyn Export>, input: BytesMut },
    /// It does not, and the client has been told what there is to tell.
    Close(CloseReason),
}

/// Speaks the handshake to its end, TLS included. The caller sets the deadline.
pub(super) async fn shake_hands(
    mut socket: Socket,
    exports: &dyn Exports,
    tls: &NbdTls,
) -> io::Result<(Socket, Shaken)> {
    socket.write_all(&Negotiation::greeting()).await?;
    let mut machine = Negotiation::with_tls(tls.policy());
    let mut input = BytesMut::with_capacity(INPUT_BYTES);
    let mut output = BytesMut::new();
    let mut opened = None;
    loop {
        let step = machine.step(&mut input, &mut output);
        let asks = matches!(step, Step::AskNames | Step::AskExport(_));
        // A client that sends options without reading the answers must not make them pile up.
        if !output.is_empty() && (!asks || output.len() >= FLUSH_BYTES) {
            socket.write_all(&output).await?;
            output.clear();
        }
        match step {
            Step::NeedInput => {
                input.reserve(INPUT_BYTES);
                if socket.read(&mut input, INPUT_BYTES).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Step::AskNames => machine.answer_names(&exports.names(), &mut output),
            Step::AskExport(name) => match open(exports, &name) {
                Ok((facts, export)) => {
                    machine.answer_export(Ok(&facts), &mut output);
                    opened = Some((facts.name, export));
                }
                Err(refusal) => machine.answer_export(Err(refusal), &mut output),
            },
            Step::Enter(session) => {
                // The machine enters only on an answer that was `Ok`.
                let Some((name, export)) = opened.take() else {
                    return Err(io::Error::other("a handshake ended without an export"));
                };
                return Ok((socket, Shaken::Enter { session, name, export, input }));
            }
            Step::StartTls => {
                let Some(config) = tls.config() else {
                    return Err(io::Error::other("a handshake came to TLS where there is none"));
                };
                let peer = socket.peer();
                socket = socket.start_tls(config).await.inspect_err(|error| {
                    tracing::info!(%peer, %error, "an nbd client failed the tls handshake");
                })?;
            }
            Step::Close(reason) => return Ok((socket, Shaken::Close(reason))),
        }
    }
}

fn open(exports: &dyn Exports, name: &str) -> Result<(ExportFacts, Arc<dyn Export>), Refusal> {
    // "A special, "empty", name (i.e., the length field is zero and no name is specified), is reserved for a "default"
    // export, to be used in cases where explicitly specifying an export name makes no sense."
    let name = match name {
        "" => exports.default_export().ok_or(Refusal::Unknown)?,
        name => name.to_owned(),
    };
    let export = exports.open(&name).map_err(|error| match error {
        OpenError::Unknown => Refusal::Unknown,
        OpenError::NotNow(reason) => Refusal::NotNow(reason),
    })?;
    let facts = ExportFacts {
        name,
        description: export.description(),
        size_bytes: export.size_bytes(),
        read_only: export.is_read_only(),
        preferred_block_bytes: export.preferred_block_bytes(),
        contexts: export.contexts(),
    };
    Ok((facts, export))
}
