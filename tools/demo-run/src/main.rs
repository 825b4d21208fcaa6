//! `demo-run`: what `tools/demo` runs once everything is built. Two sites, a WAN between them, similar images that move
//! while a client reads and writes them, and a check of every byte.
//! Must not know blockferry's library: it sees what a user sees, the command line, NBD and the files.

mod bound;
mod cli;
mod guest;
mod report;
mod run;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match run::run(&cli::Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
