//! The laboratory: two sites, each a daemon with a directory of its own, and the relay between them. Free ports and
//! sockets in the directory throughout. Must not know what is relocated.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blockferry_wan::WanStats;
use blockferry_wan::units::{Rate, Span};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::process::{self, Asked, Daemon, Said};

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
    /// Those in `dir`, or beside this program.
    ///
    /// # Errors
    /// When one is missing.
    pub fn find(dir: Option<&Path>) -> Result<Programs> {
        let dir = match dir {
            Some(dir) => dir.to_owned(),
            None => std::env::current_exe().context("where is this program?")?.with_file_name(""),
        };
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
        Ok(Site { name, dir, blockferry, fingerprint, daemon: None, peer_address: "127.0.0.1:0".to_owned() })
    }

    /// Configures it for one peer. A site that has no address for its peer waits to be dialled. `more` are lines for
    /// `[peer]`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, peer: &Site, address: Option<&str>, more: &str) -> Result<()> {
        self.configure_for(&[(peer, address)], more)
    }

    /// The same for several peers.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure_for(&self, peers: &[(&Site, Option<&str>)], more: &str) -> Result<()> {
        let mut config = format!(
            "[site]\nname = \"{}\"\nstate_dir = \".\"\n\n[peer]\nlisten = \"{}\"\n{more}\n",
            self.name, self.peer_address
        );
        for (peer, address) in peers {
            let address = address.map_or(String::new(), |address| format!("address = \"{address}\"\n"));
            config.push_str(&format!(
                "[[peers]]\nname = \"{}\"\n{address}fingerprint = \"{}\"\nvolumes = [\"*\"]\n",
                peer.name, peer.fingerprint
            ));
        }
        let path = self.config();
        fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Starts its daemon and waits until it is ready; how long that took. At every start but the first, peers reach it
    /// where they did before.
    ///
    /// # Errors
    /// When the daemon does not get ready.
    pub fn start(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.begin()?;
        if let Some(daemon) = &mut self.daemon {
            let address = daemon.ready("peer")?;
            if self.peer_address != address {
                let text = fs::read_to_string(self.config()).context("the configuration is gone")?;
                let text =
                    text.replace(&format!("listen = \"{}\"", self.peer_address), &format!("listen = \"{address}\""));
                fs::write(self.config(), text).context("cannot write the configuration")?;
                self.peer_address = address;
            }
        }
        Ok(begun.elapsed())
    }

    /// Starts its daemon and waits for nothing.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn begin(&mut self) -> Result<()> {
        let mut serve = process::command(&self.blockferry);
        serve.args(["serve", "--config"]).arg(self.config());
        self.daemon = Some(Daemon::start(&format!("site {}", self.name), &mut serve, &self.dir.join("serve.log"))?);
        Ok(())
    }

    /// SIGKILL: it says nothing, flushes nothing.
    ///
    /// # Errors
    /// When it had ended by itself before.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::kill)
    }

    /// How it is called.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn config(&self) -> PathBuf {
        self.dir.join("blockferry.toml")
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

    /// The same, begun and not waited for.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn ask_later(&self, arguments: &[&str]) -> Result<Asked> {
        let mut command = process::command(&self.blockferry);
        Asked::start(command.args(arguments).arg("--state").arg(&self.dir))
    }

    /// What `blockferry` comes to, whether it succeeds or not; `None`: nothing within `patience`.
    ///
    /// # Errors
    /// When the daemon has ended by itself, or the program cannot be started.
    pub fn say(&mut self, arguments: &[&str], patience: Duration) -> Result<Option<Said>> {
        self.check()?;
        let mut command = process::command(&self.blockferry);
        process::said(command.args(arguments).arg("--state").arg(&self.dir), patience)
    }

    /// Whether its daemon was started, and not stopped since.
    pub fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    /// Its status.
    ///
    /// # Errors
    /// When it cannot be had, or lacks what these programs need.
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
    /// Starts it; `name` is that of its socket and its log in `run_dir`.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn start(
        programs: &Programs,
        run_dir: &Path,
        name: &str,
        to: &str,
        rate: Rate,
        Span(rtt): Span,
    ) -> Result<Relay> {
        let control = format!("unix:{}", run_dir.join(name).with_extension("sock").display());
        let mut wan: Command = process::command(&programs.wan);
        wan.args(["--to", to, "--rate", &rate.to_string(), "--rtt", &format!("{}us", rtt.as_micros())]);
        wan.args(["--mtu", "1500", "--control", &control]);
        let mut daemon = Daemon::start("the WAN", &mut wan, &run_dir.join(name).with_extension("log"))?;
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

    /// Nothing passes any more.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cut(&mut self) -> Result<()> {
        self.ask("cut").map(drop)
    }

    /// What is offered passes again.
    ///
    /// # Errors
    /// When it has ended.
    pub fn mend(&mut self) -> Result<()> {
        self.ask("mend").map(drop)
    }

    /// Changes the bottleneck, both ways; `None`: there is none.
    ///
    /// # Errors
    /// When it has ended.
    pub fn set_rate(&mut self, rate: Option<Rate>) -> Result<()> {
        let rate = rate.map_or("unlimited".to_owned(), |rate| rate.to_string());
        self.ask(&format!("set rate={rate}")).map(drop)
    }

    fn ask(&mut self, command: &str) -> Result<WanStats> {
        self.daemon.check()?;
        let mut wan = process::command(&self.program);
        wan.args(["ctl", &self.control]).args(command.split(' '));
        parse(&process::output(&mut wan, false)?)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end in good order.
    pub fn stop(self) -> Result<()> {
        self.daemon.stop()
    }
}

/// What these programs read of `blockferry status --json`.
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
    #[serde(default)]
    pub epoch: u64,
    pub image: PathBuf,
    pub size_bytes: u64,
    pub block_size_bytes: u64,
    pub blocks: Blocks,
    pub moved: Moved,
    pub demand_latency_ms: DaemonLatency,
    pub eta_s: Option<f64>,
    #[serde(default)]
    pub guest_written_bytes: u64,
    #[serde(default)]
    pub owed: Vec<Owed>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[allow(missing_docs, reason = "as above")]
pub struct Owed {
    pub peer: String,
    pub what: String,
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
