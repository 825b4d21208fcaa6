//! What can go wrong with the relay, said so that the reader knows what to do next.
//! Must not know: the emulation.

use std::net::SocketAddr;
use std::path::PathBuf;

/// An error of the relay or of its command line.
#[derive(Debug, thiserror::Error)]
pub enum WanError {
    /// An option or a control command that does not parse.
    #[error("{0}")]
    Usage(String),
    /// The address that clients send to could not be bound.
    #[error("cannot listen on udp {address}: {source}; choose another --listen address (port 0 picks a free one)")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The control socket could not be made.
    #[error("cannot make the control socket {address}: {source}; choose another --control address")]
    Control {
        /// The address asked for, as written.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Another relay answers on the unix control socket.
    #[error("the control socket {0} is in use by another relay: stop that one or choose another path")]
    ControlInUse(PathBuf),
    /// The operating system refused something that the relay cannot do without.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The relay's thread has ended.
    #[error("the relay has stopped: start it again")]
    Stopped,
    /// The relay answered a control command with an error.
    #[error("the relay refused: {0}")]
    Refused(String),
    /// A self-test found a figure outside its bound.
    #[error("self-test failed: {0}")]
    SelfTest(String),
}

impl WanError {
    /// The exit status of the program: 2 for wrong usage, 1 for anything that failed.
    pub fn exit_status(&self) -> u8 {
        match self {
            WanError::Usage(_) => 2,
            _ => 1,
        }
    }

    pub(crate) fn system(action: &'static str) -> impl FnOnce(std::io::Error) -> WanError {
        move |source| WanError::System { action, source }
    }
}
