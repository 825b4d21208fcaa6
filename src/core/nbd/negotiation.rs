//! The handshake as a machine: fixed newstyle, from the greeting to the transmission phase. Pure: bytes come in and go
//! out through buffers, and what only the server knows (names, exports) is asked for in between.
//!
//! ```text
//! driver: send greeting()
//!         loop { match step(input, output) {
//!             NeedInput      => send output, read more into input
//!             AskNames       => answer_names(...)
//!             AskExport(n)   => answer_export(...)
//!             StartTls       => send output, do the TLS handshake; from then on input and output are TLS's
//!             Enter(session) => send output; what is left of input are requests
//!             Close(why)     => send output, close
//!         } }
//! ```

use bytes::{Buf, BufMut, BytesMut};

use super::limits::{DEFAULT_PREFERRED_BYTES, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, MIN_BLOCK_BYTES};
use super::option::{Queries, parse_info, parse_meta, parse_name};
use super::reply::{ReplyStyle, clip};
use super::request::{ContextIndex, Session};
use super::wire::{self, handshake, info, opt, rep, transmission};

/// What a server says about an export during the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// Its canonical name, which differs from the one asked for when the default export was.
    pub name: String,
    /// A description for people.
    pub description: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused for as long as the connection lasts.
    pub read_only: bool,
    /// The size at which requests are efficient; anything but a power of two from 512 up counts as 4096.
    pub preferred_block_bytes: u32,
    /// The names of its metadata contexts, in the order of their [`ContextIndex`].
    pub contexts: Vec<String>,
}

/// Why an export cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is none of that name.
    Unknown,
    /// There is one, but not now: the reason, for people.
    NotNow(String),
    /// The server is being shut down.
    Shutdown,
}

/// Whether connections of a listener may, or have to, be upgraded to TLS by STARTTLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsPolicy {
    /// It has no TLS: the specification's NOTLS mode.
    #[default]
    Off,
    /// At the client's option: SELECTIVETLS mode, with no export that insists on it.
    Optional,
    /// Nothing is said of exports before TLS: FORCEDTLS mode.
    Required,
}

/// What the driver has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the output, then read more input.
    NeedInput,
    /// Call [`Negotiation::answer_names`].
    AskNames,
    /// Call [`Negotiation::answer_export`] for the export of this name; the empty name is the default export's.
    AskExport(String),
    /// Send the output, then do the TLS handshake as a server; what is read from then on has been decrypted, what is
    /// written is encrypted. The connection ends if the handshake fails. The input is empty now.
    StartTls,
    /// Send the output; the transmission phase has begun, with the export that was last asked for.
    Enter(Session),
    /// Send the output, then close the connection.
    Close(CloseReason),
}

/// Why a handshake ended without a session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client sent ABORT.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client asked by EXPORT_NAME, which knows no error, for what it cannot have.
    #[error("the client asked for export {0:?}, which it cannot have")]
    Refused(String),
    /// The client asked by EXPORT_NAME, which knows no error, without the TLS that is required.
    #[error("the client asked for an export without TLS, which is required here")]
    TlsRequired,
    /// The client broke the protocol.
    #[error("{0}")]
    Violation(&'static str),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    /// The data of an option that is not understood: dropped as it comes, then answered.
    Skip {
        option: u32,
        left_bytes: usize,
        reply: u32,
    },
    OptionData {
        option: u32,
        len_bytes: usize,
    },
    /// STARTTLS was taken and is about to be granted.
    StartTls,
    AwaitNames,
    AwaitExport {
        name: String,
        purpose: Purpose,
    },
    Entered(Session),
    Closed(CloseReason),
}

#[derive(Debug)]
enum Purpose {
    ExportName,
    Info { go: bool, requests: Vec<u16> },
    Meta { set: bool, queries: Queries },
}

/// One handshake, the server's side.
#[derive(Debug)]
pub struct Negotiation {
    state: State,
    tls: TlsPolicy,
    /// TLS is running.
    secured: bool,
    no_zeroes: bool,
    style: ReplyStyle,
    /// What SET_META_CONTEXT selected, and for which export.
    selected: Option<(String, Vec<ContextIndex>)>,
}

impl Default for Negotiation {
    fn default() -> Negotiation {
        Negotiation::new()
    }
}

impl Negotiation {
    /// A handshake whose greeting is still to be sent, without TLS.
    pub fn new() -> Negotiation {
        Negotiation::with_tls(TlsPolicy::Off)
    }

    /// A handshake whose greeting is still to be sent.
    pub fn with_tls(tls: TlsPolicy) -> Negotiation {
        let style = ReplyStyle::Simple;
        Negotiation { state: State::ClientFlags, tls, secured: false, no_zeroes: false, style, selected: None }
    }

    /// The server's first bytes: NBDMAGIC, IHAVEOPT, "16 bits, handshake flags".
    pub fn greeting() -> [u8; 18] {
        let mut greeting = [0; 18];
        greeting[..8].copy_from_slice(&wire::NBDMAGIC.to_be_bytes());
        greeting[8..16].copy_from_slice(&wire::IHAVEOPT.to_be_bytes());
        greeting[16..].copy_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        greeting
    }

    /// Takes what it can from the front of `input` and appends replies to `output`. Never wants more than
    /// [`MAX_OPTION_BYTES`] and a header in `input` at once, whatever the client announces.
    pub fn step(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Step {
        loop {
            match &mut self.state {
                State::ClientFlags => {
                    if input.len() < 4 {
                        return Step::NeedInput;
                    }
                    let flags = input.get_u32();
                    // "the server MUST drop the TCP connection if the client sets an unknown flag, or a flag that does
                    // not match something advertised by the server". "Servers MAY choose to honour fixed newstyle from
                    // clients that didn't set this bit": this one does.
                    if flags & !u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) != 0 {
                        self.close(CloseReason::Violation("unknown client flags"));
                        continue;
                    }
                    // "The server MUST operate in NOTLS mode unless the server set flag NBD_FLAG_FIXED_NEWSTYLE and the
                    // client replied with NBD_FLAG_C_FIXED_NEWSTYLE in the fixed newstyle negotiation."
                    if flags & u32::from(handshake::FIXED_NEWSTYLE) == 0 {
                        if self.tls == TlsPolicy::Required {
                            self.close(CloseReason::TlsRequired);
                            continue;
                        }
                        self.tls = TlsPolicy::Off;
                    }
                    self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
                    self.state = State::OptionHeader;
                }
                State::OptionHeader => {
                    // Who speaks another protocol may never send 16 bytes.
                    let magic = wire::IHAVEOPT.to_be_bytes();
                    let there = input.len().min(magic.len());
                    if input[..there] != magic[..there] {
                        self.close(CloseReason::Violation("an option that does not start with IHAVEOPT"));
                        continue;
                    }
                    if input.len() < 16 {
                        return Step::NeedInput;
                    }
                    input.advance(8);
                    let option = input.get_u32();
                    let len_bytes = input.get_u32();
                    self.begin_option(option, len_bytes);
                }
                State::Skip { option, left_bytes, reply } => {
                    let dropped = input.len().min(*left_bytes);
                    input.advance(dropped);
                    *left_bytes -= dropped;
                    if *left_bytes > 0 {
                        return Step::NeedInput;
                    }
                    let (option, reply) = (*option, *reply);
                    match reply {
                        rep::ACK => put_reply(output, option, reply, &[]),
                        rep::ERR_INVALID if option == opt::STARTTLS && self.secured => {
                            put_error(output, option, reply, "TLS is running already");
                        }
                        rep::ERR_INVALID => put_error(output, option, reply, "this option takes no data"),
                        rep::ERR_TLS_REQD => put_error(output, option, reply, "TLS is required here: send STARTTLS"),
                        _ => put_error(output, option, reply, "this server does not know the option"),
                    }
                    self.state = State::OptionHeader;
                    if option == opt::ABORT {
                        self.close(CloseReason::Aborted);
                    }
                }
                State::OptionData { option, len_bytes } => {
                    if input.len() < *len_bytes {
                        return Step::NeedInput;
                    }
                    let option = *option;
                    let data = input.split_to(*len_bytes);
                    self.state = State::OptionHeader;
                    self.take_option(option, &data, output);
                }
                State::StartTls => {
                    // "The client MUST NOT send any option until it has received a final reply to any option it has
                    // sent", nor can a handshake begin before the reply. What came along was put there in the hope that
                    // it would be taken for something that was said under TLS.
                    if !input.is_empty() {
                        self.close(CloseReason::Violation("bytes behind STARTTLS that did not wait for its reply"));
                        continue;
                    }
                    // "When this command succeeds, the server MUST NOT preserve any negotiation state (such as a
                    // request for NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS, or metadata contexts from
                    // NBD_OPT_SET_META_CONTEXT) issued before this command." The client's flags are no option, are not
                    // sent again, and stay.
                    self.style = ReplyStyle::Simple;
                    self.selected = None;
                    self.secured = true;
                    self.state = State::OptionHeader;
                    put_reply(output, opt::STARTTLS, rep::ACK, &[]);
                    return Step::StartTls;
                }
                State::AwaitNames => return Step::AskNames,
                State::AwaitExport { name, .. } => return Step::AskExport(name.clone()),
                State::Entered(session) => return Step::Enter(session.clone()),
                State::Closed(reason) => return Step::Close(reason.clone()),
            }
        }
    }

    /// The answer to [`Step::AskNames`]; ignored at any other time.
    pub fn answer_names(&mut self, names: &[String], output: &mut BytesMut) {
        if !matches!(self.state, State::AwaitNames) {
            return;
        }
        // "Return zero or more NBD_REP_SERVER replies, one for each export, followed by NBD_REP_ACK".
        for name in names {
            let mut body = Vec::with_capacity(4 + name.len());
            body.extend_from_slice(&(name.len() as u32).to_be_bytes());
            body.extend_from_slice(name.as_bytes());
            put_reply(output, opt::LIST, rep::SERVER, &body);
        }
        put_reply(output, opt::LIST, rep::ACK, &[]);
        self.state = State::OptionHeader;
    }

    /// The answer to [`Step::AskExport`]; ignored at any other time.
    pub fn answer_export(&mut self, answer: Result<&ExportFacts, Refusal>, output: &mut BytesMut) {
        let (name, purpose) = match std::mem::replace(&mut self.state, State::OptionHeader) {
            State::AwaitExport { name, purpose } => (name, purpose),
            other => {
                self.state = other;
                return;
            }
        };
        match (purpose, answer) {
            (Purpose::ExportName, Ok(facts)) => {
                let session = self.session(facts);
                output.put_u64(session.size_bytes);
                output.put_u16(session.flags);
                // "124 bytes, zeroes (reserved) (unless NBD_FLAG_C_NO_ZEROES was negotiated by the client)".
                if !self.no_zeroes {
                    output.put_bytes(0, 124);
                }
                self.state = State::Entered(session);
            }
            // "If the chosen export does not exist [...], the server MUST terminate the session."
            (Purpose::ExportName, Err(_)) => self.close(CloseReason::Refused(name)),
            (Purpose::Info { go, requests }, answer) => self.answer_info(go, &requests, answer, output),
            (Purpose::Meta { set, queries }, answer) => self.answer_meta(set, queries, answer, output),
        }
    }

    fn close(&mut self, reason: CloseReason) {
        self.state = State::Closed(reason);
    }

    fn begin_option(&mut self, option: u32, len_bytes: u32) {
        let len_bytes = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        // Before anything is allocated for it.
        if len_bytes > MAX_OPTION_BYTES {
            return self.close(CloseReason::Violation("an option that announces more than 64 KiB of data"));
        }
        // "If the server receives any other option, including NBD_OPT_INFO and unsupported options, it MUST reply with
        // NBD_REP_ERR_TLS_REQD if TLS has not been initiated". "The server MUST NOT send NBD_REP_ERR_TLS_REQD in reply to
        // any option if TLS has already been initiated."
        if self.tls == TlsPolicy::Required && !self.secured && !matches!(option, opt::STARTTLS | opt::ABORT) {
            // "If the server receives a request to enter transmission mode via NBD_OPT_EXPORT_NAME when TLS has not been
            // initiated, then as this request cannot error, it MUST terminate the session."
            if option == opt::EXPORT_NAME {
                return self.close(CloseReason::TlsRequired);
            }
            self.state = State::Skip { option, left_bytes: len_bytes, reply: rep::ERR_TLS_REQD };
            return;
        }
        self.state = match option {
            // "a server SHOULD ignore any data sent by the client rather than rejecting the request as invalid".
            opt::ABORT => State::Skip { option, left_bytes: len_bytes, reply: rep::ACK },
            opt::EXPORT_NAME if len_bytes > MAX_STRING_BYTES => {
                return self.close(CloseReason::Violation("an export name of more than 4096 bytes"));
            }
            // "The client MUST NOT send any additional data with the option, and the server SHOULD reject a request
            // that includes data with NBD_REP_ERR_INVALID."
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS if len_bytes > 0 => {
                State::Skip { option, left_bytes: len_bytes, reply: rep::ERR_INVALID }
            }
            opt::LIST
            | opt::STRUCTURED_REPLY
            | opt::EXTENDED_HEADERS
            | opt::EXPORT_NAME
            | opt::INFO
            | opt::GO
            | opt::LIST_META_CONTEXT
            | opt::SET_META_CONTEXT => State::OptionData { option, len_bytes },
            // "If the server receives NBD_OPT_STARTTLS prior to negotiating TLS, it MUST reply with NBD_REP_ACK." "The
            // server MUST either reply with NBD_REP_ACK after which point the connection is upgraded to TLS, or an error
            // reply explicitly permitted by this document (for example, NBD_REP_ERR_INVALID if the client included
            // data)." "If the server receives NBD_OPT_STARTTLS when TLS has already been negotiated, it [...] MUST reply
            // with NBD_REP_ERR_INVALID."
            opt::STARTTLS if self.tls != TlsPolicy::Off => {
                if len_bytes == 0 && !self.secured {
                    State::StartTls
                } else {
                    State::Skip { option, left_bytes: len_bytes, reply: rep::ERR_INVALID }
                }
            }
            // "Servers that receive messages which they do not implement MUST reply to them with NBD_REP_ERR_UNSUP, and
            // MUST NOT fail to parse the next message received." STARTTLS is among them where there is no TLS: "it MUST
            // respond with [...] NBD_REP_ERR_UNSUP (if it does not support the NBD_OPT_STARTTLS option at all)".
            _ => State::Skip { option, left_bytes: len_bytes, reply: rep::ERR_UNSUP },
        };
    }

    fn take_option(&mut self, option: u32, data: &[u8], output: &mut BytesMut) {
        match option {
            opt::LIST => self.state = State::AwaitNames,
            opt::STRUCTURED_REPLY => {
                // "This error is also used to indicate that the server is unable to downgrade to structured replies
                // (via NBD_OPT_STRUCTURED_REPLY) if extended headers have already been enabled."
                if self.style == ReplyStyle::Extended {
                    put_error(output, option, rep::ERR_EXT_HEADER_REQD, "extended headers are in force");
                } else {
                    self.style = ReplyStyle::Structured;
                    put_reply(output, option, rep::ACK, &[]);
                }
            }
            opt::EXTENDED_HEADERS => {
                // "A client MAY request structured replies first, although a server SHOULD support this option even if
                // structured replies are not negotiated."
                self.style = ReplyStyle::Extended;
                put_reply(output, option, rep::ACK, &[]);
            }
            opt::EXPORT_NAME => {
                // "Once extended headers are successfully requested, a client MUST NOT use NBD_OPT_EXPORT_NAME."
                if self.style == ReplyStyle::Extended {
                    return self.close(CloseReason::Violation("EXPORT_NAME after EXTENDED_HEADERS"));
                }
                match parse_name(data) {
                    Ok(name) => self.state = State::AwaitExport { name, purpose: Purpose::ExportName },
                    Err(invalid) => self.close(CloseReason::Violation(invalid)),
                }
            }
            opt::INFO | opt::GO => match parse_info(data) {
                Ok((name, requests)) => {
                    let purpose = Purpose::Info { go: option == opt::GO, requests };
                    self.state = State::AwaitExport { name, purpose };
                }
                Err(invalid) => put_error(output, option, rep::ERR_INVALID, invalid),
            },
            _ => {
                let set = option == opt::SET_META_CONTEXT;
                if set {
                    // "Issuing this command replaces all previously-set metadata contexts (including when this command
                    // fails)".
                    self.selected = None;
                    // "This option MUST NOT be requested unless structured replies or extended headers have been
                    // negotiated first. If a client attempts to do so, a server SHOULD send NBD_REP_ERR_INVALID or
                    // NBD_REP_ERR_EXT_HEADER_REQD."
                    if self.style == ReplyStyle::Simple {
                        let message = "metadata contexts need structured replies or extended headers";
                        return put_error(output, option, rep::ERR_INVALID, message);
                    }
                }
                match parse_meta(data) {
                    Ok((name, queries)) => {
                        self.state = State::AwaitExport { name, purpose: Purpose::Meta { set, queries } };
                    }
                    // "If the option request is syntactically invalid [...], the server MUST fail the request with
                    // NBD_REP_ERR_INVALID."
                    Err(invalid) => put_error(output, option, rep::ERR_INVALID, invalid),
                }
            }
        }
    }

    fn answer_info(
        &mut self,
        go: bool,
        requests: &[u16],
        answer: Result<&ExportFacts, Refusal>,
        output: &mut BytesMut,
    ) {
        let option = if go { opt::GO } else { opt::INFO };
        let facts = match answer {
            Ok(facts) => facts,
            Err(refusal) => return put_refusal(output, option, refusal),
        };
        let session = self.session(facts);
        // "the server MUST send at least one NBD_REP_INFO, with an NBD_INFO_EXPORT information type".
        let mut body = Vec::with_capacity(12);
        body.extend_from_slice(&info::EXPORT.to_be_bytes());
        body.extend_from_slice(&session.size_bytes.to_be_bytes());
        body.extend_from_slice(&session.flags.to_be_bytes());
        put_reply(output, option, rep::INFO, &body);
        // "The server MUST ignore any information requests it does not understand." "A particular information type
        // SHOULD only appear once".
        for kind in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            if !requests.contains(&kind) {
                continue;
            }
            let mut body = kind.to_be_bytes().to_vec();
            match kind {
                info::NAME => body.extend_from_slice(facts.name.as_bytes()),
                info::DESCRIPTION => {
                    body.extend_from_slice(clip(&facts.description, MAX_STRING_BYTES).as_bytes());
                }
                _ => {
                    for size in [MIN_BLOCK_BYTES, preferred_bytes(facts), MAX_PAYLOAD_BYTES] {
                        body.extend_from_slice(&size.to_be_bytes());
                    }
                }
            }
            put_reply(output, option, rep::INFO, &body);
        }
        // "The server MUST NOT send any zero padding bytes after the NBD_REP_ACK data, whether or not the client
        // negotiated the NBD_FLAG_C_NO_ZEROES flag."
        put_reply(output, option, rep::ACK, &[]);
        if go {
            self.state = State::Entered(session);
        }
    }

    fn answer_meta(
        &mut self,
        set: bool,
        queries: Queries,
        answer: Result<&ExportFacts, Refusal>,
        output: &mut BytesMut,
    ) {
        let option = if set { opt::SET_META_CONTEXT } else { opt::LIST_META_CONTEXT };
        let facts = match answer {
            Ok(facts) => facts,
            Err(refusal) => return put_refusal(output, option, refusal),
        };
        let mut selected = Vec::new();
        for (index, name) in facts.contexts.iter().enumerate() {
            let wanted = match &queries {
                // "If zero queries are sent, then the server MUST return all the metadata contexts that are available";
                // "If zero queries are sent, the server MUST select no metadata contexts."
                Queries::None => !set,
                // "the server MUST ignore query strings belonging to an unknown namespace"; "base: - the server MUST
                // ignore this form during NBD_OPT_SET_META_CONTEXT, and MUST support this as a wildcard during
                // NBD_OPT_LIST_META_CONTEXT". The other namespaces here are queried alike.
                Queries::Some(texts) => texts.iter().any(|text| text == name || (!set && is_wildcard_of(text, name))),
            };
            if !wanted {
                continue;
            }
            let context = ContextIndex(index as u32);
            // "one for each selected metadata context, each with a unique metadata context ID"; in a list "the metadata
            // context ID in these replies is reserved and SHOULD be set to zero".
            let id = if set { context.0 } else { 0 };
            let mut body = id.to_be_bytes().to_vec();
            body.extend_from_slice(name.as_bytes());
            put_reply(output, option, rep::META_CONTEXT, &body);
            selected.push(context);
        }
        put_reply(output, option, rep::ACK, &[]);
        if set {
            self.selected = Some((facts.name.clone(), selected));
        }
    }

    fn session(&self, facts: &ExportFacts) -> Session {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES
            | transmission::SEND_FAST_ZERO
            | transmission::SEND_CACHE
            | transmission::CAN_MULTI_CONN;
        if facts.read_only {
            flags |= transmission::READ_ONLY;
        }
        // "MUST leave this flag clear if neither structured replies nor extended headers have been negotiated".
        if self.style != ReplyStyle::Simple {
            flags |= transmission::SEND_DF;
        }
        // "A client MUST NOT send NBD_CMD_BLOCK_STATUS unless [...] the final time it was sent, it referred to the same
        // export name that was ultimately selected for transmission phase".
        let contexts = match &self.selected {
            Some((name, contexts)) if *name == facts.name => contexts.clone(),
            _ => Vec::new(),
        };
        // "Servers MUST NOT advertise this bit unless the client successfully negotiates extended headers via
        // NBD_OPT_EXTENDED_HEADERS, and SHOULD NOT advertise this bit in response to NBD_OPT_EXPORT_NAME or NBD_OPT_GO if
        // the client does not negotiate metacontexts with NBD_OPT_SET_META_CONTEXT".
        if self.style == ReplyStyle::Extended && !contexts.is_empty() {
            flags |= transmission::BLOCK_STATUS_PAYLOAD;
        }
        Session { style: self.style, flags, size_bytes: facts.size_bytes, contexts }
    }
}

/// `x:` stands for all contexts of the namespace `x`.
fn is_wildcard_of(query: &str, name: &str) -> bool {
    query.ends_with(':') && name.split_inclusive(':').next() == Some(query)
}

/// "If advertised, this MUST be a power of 2 at least as large as the maximum of the minimum block size and 2^9".
fn preferred_bytes(facts: &ExportFacts) -> u32 {
    let bytes = facts.preferred_block_bytes;
    if bytes.is_power_of_two() && bytes >= 512 { bytes.min(64 << 10) } else { DEFAULT_PREFERRED_BYTES }
}

fn put_reply(output: &mut BytesMut, option: u32, kind: u32, body: &[u8]) {
    output.put_u64(wire::OPTION_REPLY_MAGIC);
    output.put_u32(option);
    output.put_u32(kind);
    output.put_u32(body.len() as u32);
    output.put_slice(body);
}

fn put_error(output: &mut BytesMut, option: u32, kind: u32, message: &str) {
    put_reply(output, option, kind, clip(message, MAX_STRING_BYTES).as_bytes());
}

fn put_refusal(output: &mut BytesMut, option: u32, refusal: Refusal) {
    match refusal {
        Refusal::Unknown => put_error(output, option, rep::ERR_UNKNOWN, "there is no export of this name"),
        Refusal::NotNow(reason) => put_error(output, option, rep::ERR_POLICY, &reason),
        Refusal::Shutdown => put_error(output, option, rep::ERR_SHUTDOWN, "the server is being shut down"),
    }
}
