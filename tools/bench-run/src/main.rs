//! `bench-run`: what `tools/bench` runs once everything is built. Real daemons, measured side by side in one run: on a shared
//! machine only ratios count.
//! Must not know blockferry's library: it sees what a user sees.

mod safety;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Measurements of blockferry side by side with others.
#[derive(Debug, Parser)]
#[command(name = "bench-run", after_help = "Example:\n  bench-run safety --rounds 80")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What safety costs: 4 KiB write and flush, in relocation, complete, and on qemu-nbd
    #[command(after_help = "Example:\n  bench-run safety --rounds 80")]
    Safety(Options),
}

/// What every measurement takes.
#[derive(Debug, Args)]
struct Options {
    /// Rounds, in each of which everybody gets a turn
    #[arg(long, value_name = "N", default_value_t = 40)]
    rounds: usize,
    /// Writes of a turn
    #[arg(long, value_name = "N", default_value_t = 30)]
    writes: usize,
    /// Where files lie while it runs: the file system that is measured [default: ~/.cache/blockferry/bench]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Where the programs are
    #[arg(long, value_name = "DIR", hide = true)]
    programs: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Cli { what: What::Safety(options) } = Cli::parse();
    match safety::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_the_script_has_every_option() {
        Cli::command().debug_assert();
        let script = include_str!("../../bench");
        let command = Cli::command();
        let safety = command.find_subcommand("safety").unwrap();
        for option in safety.get_arguments().filter(|option| !option.is_hide_set()) {
            let long = option.get_long().unwrap();
            assert!(script.contains(&format!("\n  --{long} ")), "--{long}");
        }
    }
}
