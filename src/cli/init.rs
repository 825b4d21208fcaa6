//! `init`: a site's identity, and a configuration to begin with. Never overwrites.
//! Must not know what an identity is made of.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::{Config, EXAMPLE, FILE_NAME};
use crate::core::ids::Name;
use crate::transport::Identity;

use super::args::InitArgs;
use super::console::{CliError, Console};
use super::daemon;

#[derive(Serialize)]
struct InitReport {
    site: Name,
    fingerprint: String,
    config: PathBuf,
    /// Whether the configuration was written now.
    config_is_new: bool,
    state_dir: PathBuf,
    /// For the configuration of the other site.
    peer_snippet: String,
}

pub(super) fn init(args: &InitArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let directory = args.state.clone().unwrap_or_else(|| daemon::default_state_dir(console));
    let failed = |what: &str, path: &Path, error: io::Error| {
        CliError::Failed(format!("cannot {what} {}: {error}; check the path and its permissions", path.display()))
    };
    let directory = std::path::absolute(&directory).map_err(|error| failed("use", &directory, error))?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    made.map_err(|error| failed("make the directory", &directory, error))?;

    let path = directory.join(FILE_NAME);
    let exists = path.try_exists().map_err(|error| failed("look for", &path, error))?;
    let is_new = !exists && {
        let name = args.name.clone().map_or_else(name_of_host, Ok)?;
        write_new(&path, &first_config(&name)).map_err(|error| failed("write", &path, error))?
    };
    let config = Config::load(&path, console.environment())?;
    if let Some(wanted) = args.name.as_ref().filter(|wanted| **wanted != config.site.name) {
        let path = path.display();
        let is = &config.site.name;
        return Err(CliError::Usage(format!("{path} calls this site {is}, not {wanted}; edit it to rename the site")));
    }
    let identity = Identity::load_or_create(&config.site.state_dir);
    let identity = identity.map_err(|error| CliError::Failed(error.to_string()))?;
    let fingerprint = identity.fingerprint().to_string();
    let report = InitReport {
        peer_snippet: peer_snippet(&config, &fingerprint),
        site: config.site.name,
        fingerprint,
        config: path,
        config_is_new: is_new,
        state_dir: config.site.state_dir,
    };
    if args.json { console.say_json(&report) } else { tell(&report, console) }
}

fn tell(report: &InitReport, console: &mut Console<'_>) -> Result<(), CliError> {
    let config = report.config.display();
    console.say(format!("site           {}", report.site))?;
    console.say(format!("configuration  {config} ({})", if report.config_is_new { "new" } else { "kept" }))?;
    console.say(format!("state          {}", report.state_dir.display()))?;
    console.say(format!("fingerprint    {}", report.fingerprint))?;
    console.say("\nFor the configuration of each site that is to be this one's peer:\n")?;
    console.say(&report.peer_snippet)?;
    console.say(format!("Add that site's own [[peers]] here, then: blockferry serve --config {config}"))
}

/// What the other site pastes. It has to parse as it is, so every line is true or harmless.
fn peer_snippet(config: &Config, fingerprint: &str) -> String {
    let listen = config.peer.listen;
    let host = if listen.ip().is_unspecified() { host_name() } else { listen.ip().to_string() };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let name = &config.site.name;
    // An endpoint that picks its port anew at each start cannot be dialled.
    let address = match listen.port() {
        0 => String::new(),
        port => format!("address = \"{host}:{port}\"  # if {name} can be reached there\n"),
    };
    format!(
        "[[peers]]\nname = \"{name}\"\n{address}fingerprint = \"{fingerprint}\"\n\
         volumes = []  # the volumes there that {name} may have; [\"*\"] means all\n"
    )
}

/// The example with this site's name, and without its example of a peer.
fn first_config(name: &Name) -> String {
    let mut text = String::new();
    let mut in_peer = false;
    for line in EXAMPLE.lines() {
        in_peer = line == "[[peers]]" || in_peer && !line.is_empty();
        if in_peer && !line.starts_with('#') {
            text.push_str("# ");
        }
        text.push_str(line);
        text.push('\n');
    }
    text.replacen("name = \"site-a\"", &format!("name = \"{name}\""), 1)
}

/// Writes the file whole or not at all, and never over another; whether it did.
fn write_new(path: &Path, text: &str) -> io::Result<bool> {
    let unfinished = path.with_extension("toml.new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    // Unlike a rename, a link fails when somebody else was faster.
    let linked = std::fs::hard_link(&unfinished, path);
    std::fs::remove_file(&unfinished)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the host is called; a placeholder if it does not tell.
fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let text = text.trim();
    if text.is_empty() { "this-host".to_owned() } else { text.to_owned() }
}

fn name_of_host() -> Result<Name, CliError> {
    let usable = host_name().parse();
    usable.map_err(|error| CliError::Usage(format!("the host's name cannot be the site's: {error}; give --name")))
}
