//! The laboratory: two sites, each a daemon with a directory of its own, and the relay between them. Free ports and
//! sockets in the directory throughout. Must not know what is relocated.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use blockferry_wan::WanStats;
use blockferry_wan::units::{Rate, Span};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::process::{self, Daemon};

/// The programs of this repository.
pub struct Programs {
    /// The program that is shown.
    pub blockferry: PathBuf,
    /// The WAN.
    pub wan: PathBuf,
    /// Makes the images.
    pub fleet: PathBuf,
}

impl Programs {
    /// Those in `dir`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn find(dir: &Path) -> Result<Programs> {
        let find = |name: &str| {
            let path = dir.join(name);
            if path.exists() { Ok(path) } else { bail!("{} is missing: run tools/demo, it builds it", path.display()) }
        };
        Ok(Programs { blockferry: find("blockferry")?, wan: find("wan")?, fleet: find("fleet")? })
    }
}

/// A site.
pub struct Site {
    name: &'static str,
    dir: PathBuf,
    blockferry: PathBuf,
    fingerprint: String,
    daemon: Option<Daemon>,
    peer_address: String,
}

impl Site {
    /// Makes its identity.
    ///
    /// # Errors
    /// When that fails.
    pub fn init(programs: &Programs, run_dir: &Path, name: &'static str) -> Result<Site> {
        #[derive(Deserialize)]
        struct Init {
            fingerprint: String,
        }
        let dir = run_dir.join(name);
        let mut init = process::command(&programs.blockferry);
        init.args(["init", "--json", "--name", name, "--state"]).arg(&dir);
        let Init { fingerprint } = parse(&process::output(&mut init, false)?)?;
        let blockferry = programs.blockferry.clone();
        Ok(Site { name, dir, blockferry, fingerprint, daemon: None, peer_address: String::new() })
    }

    /// Configures it for one peer and starts its daemon. A site that has no address for its peer waits to be dialled.
    ///
    /// # Errors
    /// When the daemon does not get ready.
    pub fn start(&mut self, peer: &Site, address: Option<&str>) -> Result<()> {
        let address = address.map_or(String::new(), |address| format!("address = \"{address}\"\n"));
        let config = format!(
            "[site]\nname = \"{}\"\nstate_dir = \".\"\n\n[peer]\nlisten = \"127.0.0.1:0\"\n\n\
             [[peers]]\nname = \"{}\"\n{address}fingerprint = \"{}\"\nvolumes = [\"*\"]\n",
            self.name, peer.name, peer.fingerprint
        );
        let path = self.dir.join("blockferry.toml");
        fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
        let mut serve = process::command(&self.blockferry);
        serve.args(["serve", "--config"]).arg(path);
        let mut daemon = Daemon::start(&format!("site {}", self.name), &mut serve, &self.dir.join("serve.log"))?;
        self.peer_address = daemon.ready("peer")?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Where other sites reach it.
    pub fn peer_address(&self) -> &str {
        &self.peer_address
    }

    /// Where guests find their disks.
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// Fails when its daemon has ended by itself.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check(&mut self) -> Result<()> {
        self.daemon.as_mut().map_or(Ok(()), Daemon::check)
    }

    /// What `blockferry` says when it is asked about this site.
    ///
    /// # Errors
    /// Its own.
    pub fn ask(&mut self, arguments: &[&str]) -> Result<String> {
        self.check()?;
        let mut command = process::command(&self.blockferry);
        process::output(command.args(arguments).arg("--state").arg(&self.dir), false)
    }

    /// Its status.
    ///
    /// # Errors
    /// When it cannot be had, or lacks what the demo needs.
    pub fn status(&mut self) -> Result<SiteStatus> {
        parse(&self.ask(&["status", "--json"])?)
    }

    /// The most memory that its daemon has had.
    pub fn peak_memory_bytes(&self) -> u64 {
        self.daemon.as_ref().and_then(Daemon::peak_memory_bytes).unwrap_or(0)
    }

    /// Stops its daemon.
    ///
    /// # Errors
    /// When it does not end in good order.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::stop)
    }
}

/// The WAN.
pub struct Relay {
    program: PathBuf,
    control: String,
    daemon: Daemon,
    /// Where the destination finds the source.
    pub address: String,
}

impl Relay {
    /// Starts it.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn start(programs: &Programs, run_dir: &Path, to: &str, rate: Rate, Span(rtt): Span) -> Result<Relay> {
        let control = format!("unix:{}", run_dir.join("wan.sock").display());
        let mut wan: Command = process::command(&programs.wan);
        wan.args(["--to", to, "--rate", &rate.to_string(), "--rtt", &format!("{}us", rtt.as_micros())]);
        wan.args(["--mtu", "1500", "--control", &control]);
        let mut daemon = Daemon::start("the WAN", &mut wan, &run_dir.join("wan.log"))?;
        let address = daemon.ready("listen")?;
        Ok(Relay { program: programs.wan.clone(), control, daemon, address })
    }

    /// What it has counted since the last reset.
    ///
    /// # Errors
    /// When it has ended.
    pub fn stats(&mut self) -> Result<WanStats> {
        self.ask("stats")
    }

    /// Counts from zero.
    ///
    /// # Errors
    /// When it has ended.
    pub fn reset(&mut self) -> Result<()> {
        self.ask("reset").map(|_| ())
    }

    fn ask(&mut self, command: &str) -> Result<WanStats> {
        self.daemon.check()?;
        parse(&process::output(process::command(&self.program).args(["ctl", &self.control, command]), false)?)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end in good order.
    pub fn stop(self) -> Result<()> {
        self.daemon.stop()
    }
}

/// What the demo reads of `blockferry status --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct SiteStatus {
    /// By name.
    pub volumes: Vec<VolumeStatus>,
}

/// Of one volume.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[allow(missing_docs, reason = "the names are those of blockferry's interface")]
pub struct VolumeStatus {
    pub name: String,
    pub phase: String,
    pub phase_reason: String,
    pub owner: String,
    pub image: PathBuf,
    pub size_bytes: u64,
    pub block_size_bytes: u64,
    pub blocks: Blocks,
    pub moved: Moved,
    pub demand_latency_ms: DaemonLatency,
    pub eta_s: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[allow(missing_docs, reason = "as above")]
pub struct Blocks {
    pub total: u64,
    pub absent: u64,
    pub written: u64,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[allow(missing_docs, reason = "as above")]
pub struct Moved {
    pub zero_bytes: u64,
    pub store_bytes: u64,
    pub joined_bytes: u64,
    pub wire_raw_bytes: u64,
    pub wire_bytes: u64,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[allow(missing_docs, reason = "as above")]
pub struct DaemonLatency {
    pub count: u64,
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// JSON of one of our programs.
///
/// # Errors
/// With the text, when it is something else.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| format!("not the JSON that was expected: {}", text.trim()))
}
