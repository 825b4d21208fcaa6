//! `serve`: reads the configuration, sets the log up, and hands over to the node.
//! Must not know what a node is made of.

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogLevel};

use super::args::ServeArgs;
use super::console::{CliError, Console};
use super::daemon;

pub(super) fn serve(args: &ServeArgs, console: &mut Console<'_>) -> Result<(), CliError> {
    let path = daemon::config_path(args.config.as_deref(), args.state.as_deref(), console);
    let config = Config::load(&path, console.environment())?;
    log_to_stderr(&filter_for(config.log.level), console)?;
    let listeners = crate::node::nbd_listeners(&config.nbd).map_err(|error| CliError::Usage(error.to_string()))?;
    crate::node::run(config, listeners).map_err(|error| CliError::Failed(format!("{error:#}")))
}

/// Verbs that only ask say nothing of themselves, unless `RUST_LOG` wants it.
pub(super) fn log_for_clients(console: &Console<'_>) -> Result<(), CliError> {
    if console.variable("RUST_LOG").is_some() { log_to_stderr("off", console) } else { Ok(()) }
}

/// Libraries only warn: at `debug` they would bury what blockferry has to say.
fn filter_for(level: LogLevel) -> String {
    match level {
        LogLevel::Off | LogLevel::Error => level.as_str().to_owned(),
        LogLevel::Warn | LogLevel::Info | LogLevel::Debug | LogLevel::Trace => {
            format!("warn,blockferry={}", level.as_str())
        }
    }
}

/// `RUST_LOG` overrides `filter`.
fn log_to_stderr(filter: &str, console: &Console<'_>) -> Result<(), CliError> {
    let wanted = console.variable("RUST_LOG").filter(|wanted| !wanted.is_empty());
    let filter = EnvFilter::try_new(wanted.unwrap_or(filter)).map_err(|error| {
        CliError::Usage(format!("RUST_LOG is not a log filter ({error}): write RUST_LOG=info,blockferry=debug"))
    })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A program that uses this library may have set a log up already; that one stays.
    let _ = log.with_ansi(console.watched).try_init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_a_filter() {
        let all = [LogLevel::Off, LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];
        for level in all {
            assert!(EnvFilter::try_new(filter_for(level)).is_ok(), "{level:?}");
        }
    }
}
