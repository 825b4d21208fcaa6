//! `torture-run`: what `tools/torture` runs once everything is built. Real sites, a real image that moves between them
//! while clients write to it, SIGKILL, lost stores and dead links at random moments, and an operator who gives up,
//! removes, adds, swaps and reclaims in between; what was acknowledged is checked after every restart.
//! Must not know blockferry's library: it sees what a user sees, the command line, NBD and the files.

mod cli;
mod cycle;
mod guest;
mod lost;
mod model;
mod operator;
mod record;
mod relocation;
mod report;
mod run;
mod sites;
mod terabyte;
mod verb;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match run::run(&cli::Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}
