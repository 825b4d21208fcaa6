//! The NBD servers of others, each over one raw file and on a unix socket of its own, and a first connection to any server.
//! Must not know what is measured.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blockferry_lab::nbd::NbdClient;
use blockferry_lab::process::{self, Daemon, check_interrupt};

const PATIENCE: Duration = Duration::from_secs(20);

/// Where the server called `name` listens.
pub fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_extension("sock")
}

/// qemu-nbd, which ends with what this gives; `more` are arguments.
///
/// # Errors
/// When it cannot be started.
pub fn qemu_nbd(dir: &Path, name: &str, more: &[&str], image: &Path) -> Result<Daemon> {
    let mut qemu = process::command("qemu-nbd");
    qemu.args(["--persistent", "--format=raw"]).args(more).arg("--socket").arg(socket(dir, name)).arg(image);
    let daemon = Daemon::start("qemu-nbd", &mut qemu, &dir.join(name).with_extension("log"));
    daemon.context("is qemu-utils installed?")
}

/// nbdkit with its plugin for files, which ends with what this gives.
///
/// # Errors
/// When it cannot be started.
pub fn nbdkit(dir: &Path, name: &str, image: &Path) -> Result<Daemon> {
    let mut nbdkit = process::command("nbdkit");
    nbdkit.args(["--foreground", "--unix"]).arg(socket(dir, name)).arg("file").arg(image);
    let daemon = Daemon::start("nbdkit", &mut nbdkit, &dir.join(name).with_extension("log"));
    daemon.context("is nbdkit installed?")
}

/// What `program` says when run with `args`.
///
/// # Errors
/// When it is missing, which says what to install, or fails.
pub fn require(program: &str, args: &[&str], package: &str) -> Result<String> {
    process::output(process::command(program).args(args), false).map_err(|error| {
        let io = error.root_cause().downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| io.kind() == ErrorKind::NotFound) {
            error.context(format!("{program} is missing: apt-get install {package}"))
        } else {
            error
        }
    })
}

/// Connects to `export`, as soon as the server is there.
///
/// # Errors
/// When it is not there in time; when `server`, where given, has ended: with the end of its log.
pub fn open(socket: &Path, export: &str, mut server: Option<&mut Daemon>) -> Result<NbdClient> {
    let begun = Instant::now();
    loop {
        check_interrupt()?;
        if let Some(server) = &mut server {
            server.check()?;
        }
        match NbdClient::open(socket, export) {
            Ok(nbd) => return Ok(nbd),
            Err(error) if begun.elapsed() > PATIENCE => {
                return Err(error).with_context(|| format!("no export `{export}` at {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The URI of an export on a unix socket.
///
/// # Errors
/// When the path is no text.
pub fn uri(socket: &Path, export: &str) -> Result<String> {
    let Some(path) = socket.to_str() else { bail!("{} is no UTF-8: say --dir DIR", socket.display()) };
    let mut uri = format!("nbd+unix:///{export}?socket=");
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' => uri.push(char::from(byte)),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_has_no_character_that_means_something_there() {
        let uri = uri(Path::new("/a b/c&d-1.sock"), "x").unwrap();
        assert_eq!(uri, "nbd+unix:///x?socket=/a%20b/c%26d-1.sock");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = require("no-such-program-of-a-bench", &[], "some-package").unwrap_err();
        let said = format!("{error:#}");
        assert!(said.starts_with("no-such-program-of-a-bench is missing: apt-get install some-package"), "{said}");
    }
}
