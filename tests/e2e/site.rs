//! A site as its operator sees it: a directory, a configuration, a `serve` process, and the command line. And two of
//! them with a relay between. Every process ends with its test, and every wait has a bound.
//! Must not know what any of it is for.

use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use blockferry_wan::{LinkOptions, Rate, Wan, WanOptions, WanStats};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::nbd_client::{NbdClient, Replies};

/// For whatever takes seconds on a quiet machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Asks again and again until there is an answer; fails with what was last seen instead of one.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if begun.elapsed() > PATIENCE => panic!("not within {PATIENCE:?}: {what}; last seen: {seen}"),
            Err(_) => std::thread::sleep(Duration::from_millis(40)),
        }
    }
}

/// What a command said.
pub struct Ran {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

/// Runs a command to its end, or ends it.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let (mut stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let out = std::thread::spawn(move || {
        let mut text = Vec::new();
        stdout.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let err = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let status = end_of(&mut child, PATIENCE);
    let is_late = status.is_none();
    let status = status.unwrap_or_else(|| {
        let _ = child.kill();
        child.wait().expect("ends when it is killed")
    });
    let text = |thread: std::thread::JoinHandle<std::io::Result<String>>| thread.join().expect("reads").expect("reads");
    let ran = Ran { status, out: text(out), err: text(err) };
    assert!(!is_late, "{command:?} did not end within {PATIENCE:?}; it said: {}{}", ran.out, ran.err);
    ran
}

fn end_of(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("can be waited for") {
            return Some(status);
        }
        if begun.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A `[[peers]]` entry.
#[derive(Clone, Debug)]
pub struct Peer {
    pub name: &'static str,
    pub address: Option<SocketAddr>,
    pub fingerprint: String,
    pub volumes: &'static [&'static str],
}

/// A site and its daemon, which ends when this is dropped.
pub struct Site {
    pub name: &'static str,
    pub dir: PathBuf,
    pub fingerprint: String,
    pub peers: Vec<Peer>,
    /// Lines for `[peer]` besides `listen`.
    pub peer_lines: String,
    /// Lines for `[nbd]` besides `listen`.
    pub nbd_lines: String,
    /// Further sections of the configuration.
    pub sections: String,
    /// What `serve` is started by, if not directly: it ends in `exec "$@"`.
    pub launcher: Vec<String>,
    /// Port 0 until the first start; the same address ever after.
    pub listen: SocketAddr,
    pub nbd_tcp: Option<SocketAddr>,
    child: Option<Child>,
}

impl Site {
    /// Makes the identity; nothing is started.
    pub fn new(folder: &Path, name: &'static str) -> Site {
        let dir = folder.join(name);
        let made = run(blockferry().args(["init", "--json", "--name", name, "--state"]).arg(&dir));
        assert!(made.status.success(), "init: {}", made.err);
        let made: Value = serde_json::from_str(&made.out).expect("init --json is JSON");
        Site {
            name,
            fingerprint: made["fingerprint"].as_str().expect("a fingerprint").to_owned(),
            dir,
            peers: Vec::new(),
            peer_lines: String::new(),
            nbd_lines: String::new(),
            sections: String::new(),
            launcher: Vec::new(),
            listen: "127.0.0.1:0".parse().expect("an address"),
            nbd_tcp: None,
            child: None,
        }
    }

    pub fn peer(&self, address: Option<SocketAddr>, volumes: &'static [&'static str]) -> Peer {
        Peer { name: self.name, address, fingerprint: self.fingerprint.clone(), volumes }
    }

    fn configure(&self) -> PathBuf {
        let mut text = format!(
            "[site]\nname = \"{}\"\nstate_dir = \".\"\n[peer]\nlisten = \"{}\"\n{}\n",
            self.name, self.listen, self.peer_lines
        );
        for peer in &self.peers {
            let address = peer.address.map(|address| format!("address = \"{address}\"\n")).unwrap_or_default();
            let Peer { name, fingerprint, volumes, .. } = peer;
            text.push_str(&format!(
                "[[peers]]\nname = \"{name}\"\n{address}fingerprint = \"{fingerprint}\"\nvolumes = {volumes:?}\n"
            ));
        }
        let listen = "listen = [\"unix:nbd.sock\", \"127.0.0.1:0\"]";
        text.push_str(&format!("[nbd]\n{listen}\n{}\n{}\n", self.nbd_lines, self.sections));
        let path = self.dir.join("blockferry.toml");
        std::fs::write(&path, text).expect("writes the configuration");
        path
    }

    fn serve(&self) -> Command {
        let config = self.configure();
        let mut serve = match self.launcher.split_first() {
            None => blockferry(),
            Some((program, args)) => {
                let mut launcher = Command::new(program);
                launcher.args(args).arg(env!("CARGO_BIN_EXE_blockferry"));
                without_settings(launcher)
            }
        };
        serve.arg("serve").arg("--config").arg(config).stdin(Stdio::null());
        serve
    }

    /// Starts the daemon and waits for its `ready` line.
    #[track_caller]
    pub fn start(&mut self) {
        if let Err(status) = self.try_start() {
            panic!("serve of site {} ended with {status}:\n{}", self.name, self.log());
        }
    }

    /// The same; what it ended with, if it did instead.
    #[track_caller]
    pub fn try_start(&mut self) -> Result<(), ExitStatus> {
        assert!(self.child.is_none(), "site {} runs already", self.name);
        let out = self.dir.join("ready.out");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("opens the log");
        let stdout = File::create(&out).expect("makes the output");
        self.child = Some(self.serve().stdout(stdout).stderr(log).spawn().expect("serve starts"));
        let line = eventually("the line `ready ...`", || {
            let text = std::fs::read_to_string(&out).unwrap_or_default();
            if let Some((line, _)) = text.split_once('\n') {
                return Ok(Ok(line.to_owned()));
            }
            let child = self.child.as_mut().expect("was started above");
            match child.try_wait().expect("can be waited for") {
                Some(status) => Ok(Err(status)),
                None => Err(text),
            }
        });
        let line = match line {
            Ok(line) => line,
            Err(status) => {
                self.child = None;
                return Err(status);
            }
        };
        assert!(line.starts_with(&format!("ready site={} ", self.name)), "the ready line is {line:?}");
        let value = |key: &str| {
            let values = line.split(' ').filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            values.map(str::to_owned).collect::<Vec<_>>()
        };
        self.listen = value("peer").first().and_then(|peer| peer.parse().ok()).expect("peer=ADDRESS");
        let tcp = |nbd: &String| {
            nbd.strip_prefix("nbd://").or(nbd.strip_prefix("nbds://"))?.trim_end_matches('/').parse().ok()
        };
        self.nbd_tcp = value("nbd").iter().find_map(tcp);
        Ok(())
    }

    /// Runs a daemon that is expected to refuse to serve.
    #[track_caller]
    pub fn refused_start(&self) -> Ran {
        run(&mut self.serve())
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("the daemon runs").id() as i32
    }

    /// SIGKILL: nothing is said, nothing is flushed.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        child.kill().expect("can be killed");
        let status = child.wait().expect("ends");
        assert_eq!(status.signal(), Some(9), "site {} was already gone: {status}", self.name);
    }

    /// SIGTERM: drains, flushes, exits 0.
    #[track_caller]
    pub fn stop(&mut self) {
        let pid = Pid::from_raw(self.pid());
        let mut child = self.child.take().expect("the daemon runs");
        kill(pid, Signal::SIGTERM).expect("can be told to stop");
        let status = end_of(&mut child, PATIENCE);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = status.unwrap_or_else(|| panic!("site {} did not end at SIGTERM:\n{}", self.name, self.log()));
        assert_eq!(status.code(), Some(0), "site {} after SIGTERM:\n{}", self.name, self.log());
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.join("serve.log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// A verb, said to this site.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Ran {
        run(blockferry().args(args).arg("--state").arg(&self.dir))
    }

    /// A verb that succeeds.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.cli(args);
        assert_eq!(ran.status.code(), Some(0), "at {}: {args:?}: {}", self.name, ran.err);
        ran.out
    }

    /// A verb that fails as verbs do: exit status 1, and one line that names these.
    #[track_caller]
    pub fn refused(&self, args: &[&str], names: &[&str]) -> String {
        let ran = self.cli(args);
        // Shown if the test fails, or by --nocapture: errors are read by people.
        println!("{args:?}\n    {}", ran.err.trim_end());
        assert_eq!(ran.status.code(), Some(1), "at {}: {args:?} says: {}{}", self.name, ran.out, ran.err);
        assert_eq!(ran.err.trim_end().lines().count(), 1, "one line on stderr, not: {}", ran.err);
        for name in names {
            assert!(ran.err.contains(name), "{args:?}: no word of {name:?} in: {}", ran.err);
        }
        ran.err
    }

    #[track_caller]
    pub fn status(&self, volume: &str) -> Value {
        serde_json::from_str(&self.ok(&["status", volume, "--json"])).expect("status --json is JSON")
    }

    #[track_caller]
    pub fn phase(&self, volume: &str) -> String {
        self.status(volume)["phase"].as_str().expect("a phase").to_owned()
    }

    /// Waits for a phase; fails early at one that never becomes another.
    #[track_caller]
    pub fn wait_phase(&self, volume: &str, phase: &str) -> Value {
        eventually(&format!("volume {volume} at {} is {phase}", self.name), || {
            let status = self.status(volume);
            match status["phase"].as_str().expect("a phase") {
                now if now == phase => Ok(status),
                _ => Err(status.to_string()),
            }
        })
    }

    /// Waits until this share of the blocks has arrived.
    #[track_caller]
    pub fn wait_share(&self, volume: &str, share: f64) -> Value {
        eventually(&format!("{share} of volume {volume} at {}", self.name), || {
            let status = self.status(volume);
            let count = |what: &str| status["blocks"][what].as_f64().expect("a count");
            let here = 1.0 - count("absent") / count("total");
            if here >= share { Ok(status) } else { Err(status.to_string()) }
        })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    pub fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.socket().display())
    }

    #[track_caller]
    pub fn nbd(&self, volume: &str) -> NbdClient {
        NbdClient::unix(&self.socket(), volume, Replies::Simple).expect("the volume is served")
    }

    #[track_caller]
    pub fn nbd_structured(&self, volume: &str) -> NbdClient {
        let addr = self.nbd_tcp.expect("NBD is served by TCP, too");
        NbdClient::tcp(addr, volume, Replies::Structured).expect("the volume is served")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(30);
            let last: Vec<&str> = log.lines().skip(from).collect();
            eprintln!("--- the last lines of site {}:\n{}", self.name, last.join("\n"));
        }
    }
}

/// The program under test; what the environment of the tests says must not reach it.
pub fn blockferry() -> Command {
    without_settings(Command::new(env!("CARGO_BIN_EXE_blockferry")))
}

fn without_settings(mut command: Command) -> Command {
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("BLOCKFERRY_") || key == "RUST_LOG" {
            command.env_remove(key);
        }
    }
    command
}

/// Source `a`, destination `b`, and the WAN between them. `b` dials `a` through the relay.
pub struct Pair {
    pub b: Site,
    pub a: Site,
    pub wan: Wan,
    pub dir: TempDir,
}

impl Pair {
    #[track_caller]
    pub fn start(link: LinkOptions) -> Pair {
        Pair::with(link, |_, _| {})
    }

    /// `change` may change both sites before they are started; its first is the source.
    #[track_caller]
    pub fn with(link: LinkOptions, change: impl FnOnce(&mut Site, &mut Site)) -> Pair {
        let dir = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
        let (mut a, mut b) = (Site::new(dir.path(), "a"), Site::new(dir.path(), "b"));
        a.peers.push(b.peer(None, &["*"]));
        b.peers.push(a.peer(None, &["*"]));
        change(&mut a, &mut b);
        a.start();
        let wan = Wan::start(WanOptions::new(a.listen, link)).expect("the relay starts");
        if let Some(peer) = b.peers.iter_mut().find(|peer| peer.name == "a") {
            peer.address = Some(wan.local_addr());
        }
        b.start();
        Pair { b, a, wan, dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Everything that crossed the WAN, both ways, with the headers of IP and UDP.
    pub fn wire_bytes(&self) -> u64 {
        let WanStats { up, down, .. } = self.wan.stats().expect("the relay runs");
        up.wire_bytes + down.wire_bytes
    }

    /// Says `relocate a/NAME --image` at the destination, whoever is connected at the source; returns the file's path.
    #[track_caller]
    pub fn relocate(&self, volume: &str, more: &[&str]) -> PathBuf {
        let path = self.path(&format!("{volume}-at-b.raw"));
        let remote = format!("a/{volume}");
        let args = [&["relocate", &remote, "--take", "--image", text(&path)][..], more].concat();
        self.b.ok(&args);
        path
    }

    /// Adds an image to the source.
    #[track_caller]
    pub fn add(&self, volume: &str, disk: &crate::disk::Disk) -> PathBuf {
        let path = self.path(&format!("{volume}-at-a.raw"));
        disk.write_to(&path);
        self.a.ok(&["volume", "add", volume, "--image", text(&path)]);
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the tests is UTF-8")
}

/// A link of so many Mbit/s and milliseconds of round trip.
pub fn link(mbit_per_s: u64, rtt_ms: u64) -> LinkOptions {
    let rate = Rate::from_bits_per_second(mbit_per_s * 1_000_000);
    LinkOptions { rate, ..LinkOptions::default() }.with_rtt(Duration::from_millis(rtt_ms))
}

/// Says that a check was left out, and why; to tools/test, too, which collects it in the file that LEFT_OUT_TESTS names.
pub fn skipped(test: &str, why: &str) {
    eprintln!("skipped: {test}: {why}");
    let Some(list) = std::env::var_os("LEFT_OUT_TESTS") else { return };
    let list = std::fs::OpenOptions::new().append(true).create(true).open(list);
    // In one write: tests run side by side.
    list.and_then(|mut list| list.write_all(format!("{test}: {why}\n").as_bytes())).expect("the list can be added to");
}
