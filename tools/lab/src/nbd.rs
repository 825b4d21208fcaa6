//! A small NBD client, one request at a time: fixed newstyle, GO, simple replies. Written from the protocol's document
//! alone, so that it shares no mistake with the server that it talks to. Must not know what is behind the export.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const FLAG_FUA: u16 = 1;
/// What the client uses, as transmission flags: FLUSH, FUA, TRIM, WRITE_ZEROES.
const NEEDED_FLAGS: u16 = 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
/// No answer for so long is a failure, not patience.
const PATIENCE: Duration = Duration::from_secs(120);

/// The server's answer was an error; the connection is fine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server answered with NBD error {0}")]
pub struct NbdError(pub u32);

/// A connection with one export.
#[derive(Debug)]
pub struct NbdClient {
    stream: UnixStream,
    size_bytes: u64,
    cookie: u64,
}

impl NbdClient {
    /// Connects and opens `export`.
    ///
    /// # Errors
    /// When there is no server, no such export, or one that lacks FLUSH, FUA, TRIM or WRITE_ZEROES.
    pub fn open(socket: &Path, export: &str) -> io::Result<NbdClient> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting[..8] != b"NBDMAGIC" || u64_at(&greeting, 8) != IHAVEOPT || greeting[17] & 3 != 3 {
            return Err(broken("no fixed newstyle NBD server"));
        }
        let mut hello = Vec::new();
        hello.extend(3_u32.to_be_bytes());
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((export.len() as u32 + 6).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0_u16.to_be_bytes());
        stream.write_all(&hello)?;
        let mut facts = None;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let (kind, length) = (u32_at(&head, 12), u32_at(&head, 16));
            if u64_at(&head, 0) != OPTION_REPLY || length > 65_536 {
                return Err(broken("an option reply that is none"));
            }
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data)?;
            match kind {
                REP_ACK => break,
                REP_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                    facts = Some((u64_at(&data, 2), u16::from_be_bytes([data[10], data[11]])));
                }
                REP_INFO => {}
                _ => {
                    let why = String::from_utf8_lossy(&data).into_owned();
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("export refused: {why}")));
                }
            }
        }
        match facts {
            Some((size_bytes, flags)) if flags & NEEDED_FLAGS == NEEDED_FLAGS => {
                Ok(NbdClient { stream, size_bytes, cookie: 0 })
            }
            Some(_) => Err(broken("the export lacks FLUSH, FUA, TRIM or WRITE_ZEROES, or is read-only")),
            None => Err(broken("the export's size is not told")),
        }
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// The server's, or a broken connection.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.ask(CMD_READ, 0, offset, into.len() as u32, &[])?;
        self.answer()?;
        self.stream.read_exact(into)
    }

    /// Reads all of these (offset, length), with all of them under way at a time.
    ///
    /// # Errors
    /// The server's, or a broken connection.
    pub fn read_all(&mut self, wanted: &[(u64, u32)]) -> io::Result<Vec<Vec<u8>>> {
        let first = self.cookie + 1;
        for (offset, length) in wanted {
            self.ask(CMD_READ, 0, *offset, *length, &[])?;
        }
        let mut found = vec![Vec::new(); wanted.len()];
        for _ in wanted {
            let (cookie, errno) = self.reply()?;
            let place = cookie.checked_sub(first).map(|place| place as usize).filter(|place| *place < wanted.len());
            let place = place.ok_or_else(|| broken("a reply to something else"))?;
            if errno != 0 {
                return Err(io::Error::other(NbdError(errno)));
            }
            let mut bytes = vec![0; wanted[place].1 as usize];
            self.stream.read_exact(&mut bytes)?;
            found[place] = bytes;
        }
        Ok(found)
    }

    /// Writes; with `fua`, is done only when it is durable.
    ///
    /// # Errors
    /// As for [`NbdClient::read`].
    pub fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> io::Result<()> {
        self.ask(CMD_WRITE, if fua { FLAG_FUA } else { 0 }, offset, bytes.len() as u32, bytes)?;
        self.answer()
    }

    /// As [`NbdClient::write_zeroes`], by TRIM.
    ///
    /// # Errors
    /// As for [`NbdClient::read`].
    pub fn trim(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.ask(CMD_TRIM, 0, offset, length, &[])?;
        self.answer()
    }

    /// Makes a range zero; with `fua`, is done only when it is durable.
    ///
    /// # Errors
    /// As for [`NbdClient::read`].
    pub fn write_zeroes(&mut self, offset: u64, length: u32, fua: bool) -> io::Result<()> {
        self.ask(CMD_WRITE_ZEROES, if fua { FLAG_FUA } else { 0 }, offset, length, &[])?;
        self.answer()
    }

    /// All writes that were answered are durable afterwards.
    ///
    /// # Errors
    /// As for [`NbdClient::read`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.ask(CMD_FLUSH, 0, 0, 0, &[])?;
        self.answer()
    }

    /// Takes leave.
    ///
    /// # Errors
    /// A broken connection.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.ask(CMD_DISC, 0, 0, 0, &[])
    }

    fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend(REQUEST.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message)
    }

    fn answer(&mut self) -> io::Result<()> {
        match self.reply()? {
            (cookie, _) if cookie != self.cookie => Err(broken("a reply to something else")),
            (_, 0) => Ok(()),
            (_, errno) => Err(io::Error::other(NbdError(errno))),
        }
    }

    /// The next reply's cookie and error.
    fn reply(&mut self) -> io::Result<(u64, u32)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        if u32_at(&head, 0) != SIMPLE_REPLY {
            return Err(broken("no simple reply"));
        }
        Ok((u64_at(&head, 8), u32_at(&head, 4)))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
