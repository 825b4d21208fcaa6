//! The error values that the protocol allows. Must not know where errors come from.

/// "The following error values are defined"; nothing else may stand in an error field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NbdErrno {
    /// "Operation not permitted": a write to what this site does not own, or to a read-only export.
    #[error("operation not permitted")]
    Perm,
    /// "Input/output error".
    #[error("input/output error")]
    Io,
    /// "Cannot allocate memory". "The server SHOULD NOT return NBD_ENOMEM if at all possible."
    #[error("cannot allocate memory")]
    NoMem,
    /// "Invalid argument".
    #[error("invalid argument")]
    Inval,
    /// "No space left on device".
    #[error("no space left on device")]
    NoSpc,
    /// "Value too large": only for a READ with DF.
    #[error("value too large")]
    Overflow,
    /// "Operation not supported": only for a WRITE_ZEROES with FAST_ZERO.
    #[error("operation not supported")]
    NotSup,
    /// "Server is in the process of being shut down".
    #[error("the server is being shut down")]
    Shutdown,
}

impl NbdErrno {
    /// All of them.
    pub const ALL: [NbdErrno; 8] = [
        NbdErrno::Perm,
        NbdErrno::Io,
        NbdErrno::NoMem,
        NbdErrno::Inval,
        NbdErrno::NoSpc,
        NbdErrno::Overflow,
        NbdErrno::NotSup,
        NbdErrno::Shutdown,
    ];

    /// The number on the wire, which does not depend on the machine's own `errno` values.
    pub fn to_wire(self) -> u32 {
        match self {
            NbdErrno::Perm => 1,
            NbdErrno::Io => 5,
            NbdErrno::NoMem => 12,
            NbdErrno::Inval => 22,
            NbdErrno::NoSpc => 28,
            NbdErrno::Overflow => 75,
            NbdErrno::NotSup => 95,
            NbdErrno::Shutdown => 108,
        }
    }

    /// The value with this number on the wire.
    pub fn from_wire(number: u32) -> Option<NbdErrno> {
        NbdErrno::ALL.into_iter().find(|errno| errno.to_wire() == number)
    }
}

impl From<&std::io::Error> for NbdErrno {
    /// What a failed file operation is to a client. "It also SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC."
    fn from(error: &std::io::Error) -> NbdErrno {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => NbdErrno::NoSpc,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => NbdErrno::Perm,
            ErrorKind::InvalidInput => NbdErrno::Inval,
            _ => NbdErrno::Io,
        }
    }
}
