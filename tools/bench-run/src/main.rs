//! `bench-run`: what `tools/bench` runs once everything is built. Real daemons, measured side by side in one run: on a shared
//! machine only ratios count.
//! Must not know blockferry's library: it sees what a user sees.

mod figures;
mod nbd;
mod safety;
mod servers;

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
    Safety(SafetyOptions),
    /// The NBD server: fio on it, on qemu-nbd, and on nbdkit
    #[command(after_help = "Example:\n  bench-run nbd --rounds 5 --seconds 4")]
    Nbd(NbdOptions),
}

#[derive(Debug, Args)]
struct SafetyOptions {
    /// Rounds, in each of which everybody gets a turn
    #[arg(long, value_name = "N", default_value_t = 40)]
    rounds: usize,
    /// Writes of a turn
    #[arg(long, value_name = "N", default_value_t = 30)]
    writes: usize,
    #[command(flatten)]
    places: Places,
}

#[derive(Debug, Args)]
struct NbdOptions {
    /// Rounds, in each of which everybody gets a turn
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Length of a turn in seconds
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    #[command(flatten)]
    places: Places,
}

/// What every measurement takes.
#[derive(Debug, Args)]
struct Places {
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
    let done = match Cli::parse().what {
        What::Safety(options) => safety::run(&options),
        What::Nbd(options) => nbd::run(&options),
    };
    match done {
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
        for what in command.get_subcommands() {
            let name = what.get_name();
            assert!(script.contains(&format!("\n  {name} ")), "{name}");
            for option in what.get_arguments().filter(|option| !option.is_hide_set()) {
                let long = option.get_long().unwrap();
                assert!(script.contains(&format!("\n  --{long} ")), "{name} --{long}");
            }
        }
    }
}
