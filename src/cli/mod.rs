//! The command line: parses it, asks the daemon, shows the answer.
//! Must not know how a site works: it speaks with one through [`crate::control::ControlClient`], or starts one by
//! [`crate::node::run`].

mod analyze;
mod args;
mod console;
mod daemon;
mod fleet;
mod follow;
mod init;
mod serve;
mod show;
mod verbs;
mod verdict;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use self::args::{Cli, Verb};
use self::console::{CliError, Console, Pace};

/// The program. Exit status: 0 done; 1 the operation failed; 2 wrong usage or configuration.
pub fn main() -> ExitCode {
    let watched = std::io::stderr().is_terminal();
    let mut console = Console {
        out: &mut std::io::stdout(),
        err: &mut std::io::stderr(),
        watched,
        redraws: std::io::stdout().is_terminal(),
        pace: Pace {
            poll: if watched { Duration::from_millis(500) } else { Duration::from_secs(1) },
            line: Duration::from_secs(5),
            absence: Duration::from_secs(60),
            quiet: Duration::from_secs(2),
            slack: Duration::from_secs(30),
        },
        // A variable that is not text cannot be one of ours.
        variables: std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect(),
    };
    ExitCode::from(run(std::env::args_os(), &mut console))
}

/// Does what `arguments` say (the first is the program's name); the exit status.
fn run(arguments: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors. Colours only where somebody sees them.
            let (stream, colours) = if error.use_stderr() {
                (&mut *console.err, console.watched)
            } else {
                (&mut *console.out, console.redraws)
            };
            let text = error.render();
            let _ = if colours { write!(stream, "{}", text.ansi()) } else { write!(stream, "{text}") };
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    let result = execute(cli.verb, console).and_then(|()| Ok(console.out.flush()?));
    match result {
        Ok(()) => 0,
        Err(error) => {
            let status = error.status();
            if status != 0 {
                console.note(format!("blockferry: {error}"));
            }
            status
        }
    }
}

fn execute(verb: Verb, console: &mut Console<'_>) -> Result<(), CliError> {
    match verb {
        Verb::Serve(args) => serve::serve(&args, console),
        Verb::Init(args) => init::init(&args, console),
        Verb::Analyze(args) => analyze::analyze(&args, console),
        verb => {
            serve::log_for_clients(console)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| CliError::Failed(format!("cannot start: {error}")))?;
            runtime.block_on(verbs::ask(verb, console))
        }
    }
}

#[cfg(test)]
mod tests;
