//! Serves the control protocol on a unix or TCP socket, and speaks it as a client.
//! Must not know: the link, UDP.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use crate::control::{self, Command};
use crate::error::WanError;
use crate::wan::WanHandle;

/// The longest command line, in bytes.
const LINE_MAX: u64 = 4096;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 32;

/// Where the control socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlAddress {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `127.0.0.1:PORT`
    Tcp(SocketAddr),
}

impl FromStr for ControlAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<ControlAddress, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(ControlAddress::Unix(path.into()));
        }
        let wrong = || format!("`{text}` is not a control address: write unix:PATH or 127.0.0.1:PORT");
        let address: SocketAddr = text.parse().map_err(|_| wrong())?;
        // Whoever reaches the socket may end the relay.
        if !address.ip().is_loopback() {
            return Err(format!("`{text}`: the control socket has no access control, so it must be on loopback"));
        }
        Ok(ControlAddress::Tcp(address))
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ControlAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            ControlAddress::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// A serving control socket; dropping it stops accepting and removes a unix socket's file.
#[derive(Debug)]
pub struct ControlSocket {
    address: ControlAddress,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Binds and serves; `quit` gets a message when a client says `quit`.
    ///
    /// # Errors
    /// [`WanError::Control`], or [`WanError::ControlInUse`] when another relay answers at the path.
    pub fn serve(address: &ControlAddress, wan: WanHandle, quit: Sender<()>) -> Result<ControlSocket, WanError> {
        let failed = |source| WanError::Control { address: address.to_string(), source };
        let listener = Listener::bind(address)?;
        let address = listener.address(address).map_err(failed)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let thread = std::thread::Builder::new()
            .name("wan-control".into())
            .spawn(move || accept_loop(&listener, &stop, &wan, &quit))
            .map_err(WanError::system("start the control thread"))?;
        Ok(ControlSocket { address, stopping, thread: Some(thread) })
    }

    /// Where it really is, with the port that was picked.
    pub fn address(&self) -> &ControlAddress {
        &self.address
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // A connection wakes the accept; should it fail, the thread is left to the end of the process.
        if Stream::connect(&self.address).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        if let ControlAddress::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Sends one command to a relay and returns its answer, a line of JSON.
///
/// # Errors
/// [`WanError::Control`] when nobody answers there, [`WanError::Refused`] when the relay says that the command is
/// wrong.
pub fn ask(address: &ControlAddress, command: &str) -> Result<String, WanError> {
    let failed = |source| WanError::Control { address: address.to_string(), source };
    let mut stream = Stream::connect(address).map_err(failed)?;
    stream.write_all(format!("{command}\n").as_bytes()).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(failed)?;
    let answer: serde_json::Value = serde_json::from_str(&line)
        .map_err(|_| failed(io::Error::other("the answer is not JSON: that is not a relay's control socket")))?;
    match answer["error"].as_str() {
        Some(error) => Err(WanError::Refused(error.to_owned())),
        None => Ok(line.trim_end().to_owned()),
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(address: &ControlAddress) -> Result<Listener, WanError> {
        let failed = |source| WanError::Control { address: address.to_string(), source };
        match address {
            ControlAddress::Tcp(tcp) => TcpListener::bind(tcp).map(Listener::Tcp).map_err(failed),
            ControlAddress::Unix(path) => match UnixListener::bind(path) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if UnixStream::connect(path).is_ok() {
                        return Err(WanError::ControlInUse(path.clone()));
                    }
                    // A socket that nobody serves was left by a relay that was killed.
                    std::fs::remove_file(path).map_err(failed)?;
                    UnixListener::bind(path).map(Listener::Unix).map_err(failed)
                }
                other => other.map(Listener::Unix).map_err(failed),
            },
        }
    }

    fn address(&self, asked: &ControlAddress) -> io::Result<ControlAddress> {
        match self {
            Listener::Unix(_) => Ok(asked.clone()),
            Listener::Tcp(tcp) => tcp.local_addr().map(ControlAddress::Tcp),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(unix) => unix.accept().map(|(stream, _)| Stream::Unix(stream)),
            Listener::Tcp(tcp) => tcp.accept().map(|(stream, _)| Stream::Tcp(stream)),
        }
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &ControlAddress) -> io::Result<Stream> {
        match address {
            ControlAddress::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            ControlAddress::Tcp(tcp) => TcpStream::connect(tcp).map(Stream::Tcp),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(buffer),
            Stream::Tcp(stream) => stream.write(buffer),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.flush(),
            Stream::Tcp(stream) => stream.flush(),
        }
    }
}

fn accept_loop(listener: &Listener, stopping: &AtomicBool, wan: &WanHandle, quit: &Sender<()>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = listener.accept();
        if stopping.load(Ordering::SeqCst) {
            return;
        }
        // Out of descriptors, say: let others close theirs.
        let Ok(stream) = stream else {
            std::thread::sleep(std::time::Duration::from_millis(10));
            continue;
        };
        let place = Place::take(&open);
        if open.load(Ordering::SeqCst) > CONNECTIONS_MAX {
            continue;
        }
        let (wan, quit) = (wan.clone(), quit.clone());
        // A thread that cannot be started closes the connection, which its client sees.
        let _ = std::thread::Builder::new().name("wan-control-client".into()).spawn(move || {
            let _place = place;
            // An error says that the client is gone.
            let _ = serve_client(stream, &wan, &quit);
        });
    }
}

/// One of the places for connections, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Place {
        open.fetch_add(1, Ordering::SeqCst);
        Place(open.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve_client(stream: Stream, wan: &WanHandle, quit: &Sender<()>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        if reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() as u64 == LINE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let command = control::parse(&String::from_utf8_lossy(&line));
        let answer = match command {
            Ok(Command::Ask(request)) => wan.ask(request).map_err(|error| error.to_string()),
            Ok(Command::Quit) => wan.ask(crate::relay::Request::Stats).map_err(|error| error.to_string()),
            Err(ref error) => Err(error.clone()),
        };
        reader.get_mut().write_all(format!("{}\n", control::answer(answer)).as_bytes())?;
        if matches!(command, Ok(Command::Quit)) {
            // Nobody listening means that the program is ending already.
            let _ = quit.send(());
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("unix:/a/b".parse(), Ok(ControlAddress::Unix("/a/b".into())));
        assert!(matches!("127.0.0.1:0".parse(), Ok(ControlAddress::Tcp(_))));
        for wrong in ["", "unix:", "/a/b", "0.0.0.0:1", "localhost"] {
            assert!(wrong.parse::<ControlAddress>().is_err(), "{wrong}");
        }
    }
}
