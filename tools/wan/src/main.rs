//! The program `wan`: see the library. Exit status: 0 done, 1 failed, 2 wrong usage.

use std::process::ExitCode;

use blockferry_wan::cli::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wan: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}
