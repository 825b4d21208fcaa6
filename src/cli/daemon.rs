//! Where the daemon is, and what it was told: from options, or from the places where they usually are.
//! Must not know what it is asked.

use std::path::{Path, PathBuf};

use crate::config::{CONTROL_SOCKET_NAME, Config, ConfigError, FILE_NAME};
use crate::control::ControlClient;

use super::args::DaemonArgs;
use super::console::Console;

/// The daemon that `args` mean: its socket, or the socket of its configuration, or of its state directory.
pub(super) fn find(args: &DaemonArgs, console: &Console<'_>) -> Result<ControlClient, ConfigError> {
    if let Some(socket) = &args.socket {
        return Ok(ControlClient::new(socket));
    }
    let socket = |path: &Path| Config::load(path, console.environment()).map(|config| config.control.socket);
    if let Some(config) = &args.config {
        return Ok(ControlClient::new(socket(config)?));
    }
    let state = args.state.clone().unwrap_or_else(|| default_state_dir(console));
    let config = state.join(FILE_NAME);
    // A daemon whose configuration lies elsewhere still has its socket here, unless it was told otherwise.
    Ok(ControlClient::new(if config.exists() { socket(&config)? } else { state.join(CONTROL_SOCKET_NAME) }))
}

/// The configuration that `--config`, `--state` or the defaults mean.
pub(super) fn config_path(config: Option<&Path>, state: Option<&Path>, console: &Console<'_>) -> PathBuf {
    match (config, state) {
        (Some(config), _) => config.to_owned(),
        (None, Some(state)) => state.join(FILE_NAME),
        (None, None) => default_state_dir(console).join(FILE_NAME),
    }
}

/// `/var/lib/blockferry` for root, `$XDG_STATE_HOME/blockferry` or `~/.local/state/blockferry` for everybody else.
pub(super) fn default_state_dir(console: &Console<'_>) -> PathBuf {
    state_dir_of(nix::unistd::geteuid().is_root(), console.variable("XDG_STATE_HOME"), console.variable("HOME"))
}

fn state_dir_of(is_root: bool, state_home: Option<&str>, home: Option<&str>) -> PathBuf {
    let system = PathBuf::from("/var/lib/blockferry");
    if is_root {
        return system;
    }
    // The specification of these variables says that a relative path is to be ignored.
    let absolute = |path: Option<&str>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    match (absolute(state_home), absolute(home)) {
        (Some(state), _) => state.join("blockferry"),
        (None, Some(home)) => home.join(".local/state/blockferry"),
        (None, None) => system,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_where_such_things_lie() {
        for (is_root, state_home, home, expected) in [
            (true, Some("/s"), Some("/h"), "/var/lib/blockferry"),
            (false, Some("/s"), Some("/h"), "/s/blockferry"),
            (false, Some("s"), Some("/h"), "/h/.local/state/blockferry"),
            (false, None, None, "/var/lib/blockferry"),
        ] {
            assert_eq!(state_dir_of(is_root, state_home, home), Path::new(expected));
        }
    }
}
