//! The program `fleet`: see the library. Exit status: 0 done, 1 failed, 2 wrong usage.

use std::process::ExitCode;

use blockferry_fleet::cli::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    match cli::run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleet: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}
